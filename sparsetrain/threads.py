"""Chooses the number of CPU threads while a run goes on."""

import os
import statistics


class Threads:
    """Chooses between one CPU thread and all of them while training, by timing a few steps of each.

    A second thread nearly doubles the speed of an idle machine and halves that of a busy one, and which of the two
    it is changes during a run. The bits do not depend on the choice (a test holds this).

    Args:
        fixed: a number of threads to keep to, or None to choose.
    """

    PERIOD, TRIALS = 60, 3

    def __init__(self, fixed: int | None):
        n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.counts = [fixed] if fixed else sorted({1, n_cores})
        self.times: dict[int, list[float]] = {}
        self.n_steps = 0

    def choose(self) -> int:
        """The number of threads for the next step."""
        trial, at = divmod(self.n_steps % self.PERIOD, self.TRIALS)
        if at == 0 and trial == 0:
            self.times = {n: [] for n in self.counts}
        if trial < len(self.counts):
            return self.counts[trial]
        return min(self.counts, key=lambda n: statistics.median(self.times[n]))

    def record(self, n_threads: int, seconds: float) -> None:
        """Note how long a step took."""
        self.times[n_threads].append(seconds)
        self.n_steps += 1
