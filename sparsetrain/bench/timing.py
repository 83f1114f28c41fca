"""Times functions side by side, in one process."""

import random
import statistics
import time
from collections.abc import Callable

import torch

LONGEST = 10.0  # seconds that all rounds of one case may take: what is slower has fewer rounds


def interleaved(
    cases: dict[str, Callable[[], object]], rounds: int, device: torch.device, longest: float = LONGEST
) -> dict[str, list[float]]:
    """Call every case once a round, so that a busy machine slows all of them alike.

    Each round has another order (the same in every run): what a case finds in the caches depends on the one before it.

    Args:
        cases: functions of no arguments, by name.
        rounds: how many times each is timed, after two calls that are not; fewer where that would take over `longest`.
        device: on CUDA, events on the stream are timed; on a CPU, the clock.
        longest: seconds that a case may take.

    Returns:
        For each name the seconds of its rounds, in order: the i-th of two names were taken side by side.
    """
    for case in cases.values():
        case()  # compiles, and makes what is made once
    allowed = {name: min(rounds, max(1, int(longest / _seconds(case, device)))) for name, case in cases.items()}
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds):
        for name in random.Random(i).sample(list(cases), len(cases)):
            if i < allowed[name]:
                taken[name].append(_seconds(cases[name], device))
    return taken


def ratio(slower: list[float], faster: list[float]) -> tuple[float, float, float]:
    """How many times faster: the median, least and greatest ratio over rounds taken side by side."""
    ratios = [s / f for s, f in zip(slower, faster, strict=False)]
    return statistics.median(ratios), min(ratios), max(ratios)


def copy_seconds(n_bytes: int, device: torch.device) -> Callable[[], object]:
    """A function that moves `n_bytes` through memory, half read and half written: the floor of any op that must."""
    source = torch.ones(max(1, n_bytes // 8), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def multiply_adds_per_second(device: torch.device) -> float:
    """What the device reaches in a dense fp32 product: the floor of multiply-adds on vector units.

    On CUDA torch takes no TF32 by default, so this is the rate of its fp32 units, not of its matrix units.
    """
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device)
    return size**3 / min(_seconds(lambda: a @ a, device) for _ in range(5))


def _seconds(case: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        case()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    case()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3
