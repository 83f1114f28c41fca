"""Extract the circuit that carries a task: one graph, one Circuit and one set of measures for every method."""
