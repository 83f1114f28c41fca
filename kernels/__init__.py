"""Floor 0: the ops that make sparse training cheap. Knows torch alone; `ops` is the one door."""
