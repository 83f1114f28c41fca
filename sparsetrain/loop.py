"""The loop of every training: steps, numbers, evaluations, checkpoints, signals, and how long it will take."""

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from sparsetrain import memory, parallel
from sparsetrain.config import RunOptions, TrainOptions
from sparsetrain.record import Recorder
from sparsetrain.threads import Threads, n_cores

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training that cannot go on; the last good checkpoint is kept."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; the run was checkpointed and can be resumed."""

    exit_status = 130


class Steps(Protocol):
    """What a loop moves on.

    Attributes:
        folder: where metrics and TensorBoard's files go.
        device: where it computes.
        step: steps done; `advance` counts it.
        seconds: spent in steps, from the first one on; the loop counts it.
        tokens_per_step: what speed is told in.
    """

    folder: Path
    device: torch.device
    step: int
    seconds: float
    tokens_per_step: int

    def advance(self) -> Tensor:
        """Take one step; the loss that it lowered, 0-d."""
        ...

    def numbers(self, loss: float) -> dict[str, float]:
        """What is recorded of the last step, whose loss was this."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Numbers on held-out text, the one to tell the user first."""
        ...

    def record(self, recorder: Recorder, histograms: bool) -> None:
        """Record what is no number, or takes long: with each evaluation, and with `histograms` when those are due."""
        ...

    def save(self) -> None:
        """Write a checkpoint."""
        ...

    def broken(self, what: str, step: int) -> TrainingError:
        """The error that says what went wrong at a step, and what is left."""
        ...


def run_steps(it: Steps, options: TrainOptions, run: RunOptions) -> None:
    """Step to the end of a training, and evaluate and save on the way.

    Args:
        it: what is trained.
        options: when to do what.
        run: how many CPU threads, and the type of products.

    Raises:
        TrainingError: a loss was not finite.
        Interrupted: a signal came; a checkpoint was written.
    """
    if it.device.type == "cpu":
        memory.keep_freed()
    threads = Threads(_fixed_threads(run, it.device))
    losses = _Losses(it)
    logged_at, seconds_then = it.step, it.seconds
    bar = tqdm(total=options.steps, initial=it.step, unit=" steps", disable=parallel.rank() > 0 or None, smoothing=0.05)
    with bar, Recorder(it.folder, it.step) as recorder, _stop_signals() as stopped:
        while it.step < options.steps:
            _timed_step(it, threads, losses, options.log_every)
            stops = parallel.anyone(stopped.is_set())
            bar.update()
            last = it.step == options.steps
            if it.step % options.log_every == 0:
                speed = it.tokens_per_step * (it.step - logged_at) / (it.seconds - seconds_then)
                logged_at, seconds_then = it.step, it.seconds
                bar.set_postfix_str(f"loss {losses.newest:.3f}, {speed:,.0f} tokens/s")
                recorder.numbers(it.step, {**it.numbers(losses.newest), "tokens_per_second": speed})
            if last or it.step % options.eval_every == 0:
                found = it.evaluate()
                recorder.numbers(it.step, {**found, "seconds": it.seconds})
                _tell(it, options.steps, losses.newest, next(iter(found.values())))
            histograms = it.step % options.histogram_every == 0
            if last or histograms or it.step % options.eval_every == 0:
                it.record(recorder, histograms)
            if last or stops or it.step % options.checkpoint_every == 0:
                losses.check()
                it.save()
            if stops and not last:
                raise Interrupted(f"stopped after step {it.step}; the same command goes on from there")


def _fixed_threads(run: RunOptions, device: torch.device) -> int | None:
    """CPU threads for all steps; None where they are chosen while it goes on.

    They are not in bfloat16: the bits of oneDNN's products depend on their number, on processors with bfloat16 units.
    """
    if device.type != "cpu":
        return torch.get_num_threads()
    if run.threads or parallel.n_ranks() > 1:
        return run.threads or 1
    return n_cores() if run.dtype == "bfloat16" else None


def _timed_step(it: Steps, threads: Threads, losses: "_Losses", log_every: int) -> None:
    n_threads = threads.choose()
    if n_threads != torch.get_num_threads():
        torch.set_num_threads(n_threads)
    began = time.perf_counter()
    losses.add(it.advance())
    if it.step % log_every == 0 or it.device.type == "cpu":
        losses.check()
    seconds = time.perf_counter() - began
    threads.record(n_threads, seconds)
    it.seconds += seconds


class _Losses:
    """The losses not looked at yet: looking waits for the device, so it is done now and then."""

    def __init__(self, it: Steps):
        self.it = it
        self.waiting: list[tuple[int, Tensor]] = []
        self.newest = math.nan

    def add(self, loss: Tensor) -> None:
        """Keep the loss of the step just taken."""
        self.waiting.append((self.it.step, loss))

    def check(self) -> None:
        """Raises TrainingError, naming the step, if a loss is not finite."""
        for step, loss in self.waiting:
            self.newest = loss.item()
            if not math.isfinite(self.newest):
                raise self.it.broken(f"the loss became {self.newest}", step)
        self.waiting.clear()


def _tell(it: Steps, steps: int, loss: float, held_out: float) -> None:
    left = it.seconds / it.step * (steps - it.step)
    log.info(
        "step %d of %d: loss %.3f, held out %.3f; %.0f s done, about %.0f s left",
        it.step, steps, loss, held_out, it.seconds, left,
    )  # fmt: skip


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second Ctrl-C ends the process at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def stop(number, frame):
        log.warning("stopping after this step; once more to stop at once")
        stopped.set()
        for s, handler in before.items():
            signal.signal(s, handler)

    for s in before:
        signal.signal(s, stop)
    try:
        yield stopped
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
