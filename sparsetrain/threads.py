"""Chooses the number of CPU threads while a run goes on."""

import os
import statistics
import time


class Threads:
    """Chooses between one CPU thread and all of them while training, by timing a few steps of each.

    A second thread nearly doubles the speed of an idle machine and halves that of a busy one, and which of the two
    it is changes during a run. In float32 the bits do not depend on the choice: a test holds this, and MKL is told so
    when the package is imported.

    Args:
        fixed: a number of threads to keep to, or None to choose.
    """

    PERIOD, TRIALS = 60, 3

    def __init__(self, fixed: int | None):
        self.counts = [fixed] if fixed else _candidates()
        self.times: dict[int, list[float]] = {}
        self.n_steps = 0

    def choose(self) -> int:
        """The number of threads for the next step."""
        at = self.n_steps % self.PERIOD
        if at == 0:
            self.times = {n: [] for n in self.counts}
        trial = at // self.TRIALS
        if trial < len(self.counts):  # the period begins with TRIALS steps of each count
            return self.counts[trial]
        return min(self.counts, key=lambda n: statistics.median(self.times[n]))

    def record(self, n_threads: int, seconds: float) -> None:
        """Note how long a step took."""
        self.times[n_threads].append(seconds)
        self.n_steps += 1


def use_faster_count() -> None:
    """Set torch's threads to one or all, whichever multiplies matrices faster just now; takes some 50 ms."""
    import torch

    x = torch.zeros(512, 512)

    def seconds(n_threads: int) -> float:
        torch.set_num_threads(n_threads)
        x @ x
        times = []
        for _ in range(10):
            began = time.perf_counter()
            (x @ x).relu_()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    torch.set_num_threads(min(_candidates(), key=seconds))


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _candidates() -> list[int]:
    return sorted({1, n_cores()})
