"""What a sweep tells while it runs, on standard error: a bar with the time left, a line for each point under way below
it, and one for each that is over."""

import json
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from statistics import fmean
from typing import Any

from tqdm import tqdm

from sparsetrain.sweeping.complete import Over, left_jobs, under_way
from sparsetrain.sweeping.plan import duration
from sparsetrain.sweeping.points import Point
from sparsetrain.sweeping.records import LOG
from sparsetrain.sweeping.rows import outcomes
from sparsetrain.sweeping.sweep_config import Sweep

SHOWN = 8  # points under way, at most
TELL_SECONDS = 300.0  # between two looks at the points under way, where there is no terminal


class Progress:
    """The live display, as a context; where standard error is no terminal, lines now and then in place of bars.

    Args:
        config: the sweep.
        total: points of the sweep.
        n_more: of these, points that are not known yet.
        expected: seconds that each point that is left may take, by its id; 0 where that is not known.
        at_once: points that run at once; None where that is not known.
    """

    def __init__(self, config: Sweep, total: int, n_more: int, expected: dict[str, float], at_once: int | None):
        form = "{n_fmt}/{total_fmt} points |{bar}| {elapsed}{postfix}"
        self.bar = tqdm(total=total, initial=total - n_more - len(expected), disable=None, bar_format=form)
        self.lines: list[tqdm] = []
        self.told = time.monotonic()
        self.config, self.expected, self.at_once = config, expected, at_once or 1
        known = [seconds for seconds in expected.values() if seconds]
        self.mean = fmean(known) if known else 1.0
        self.rest = sum(seconds or self.mean for seconds in expected.values()) + n_more * self.mean
        self.planned = self.spent = 0.0  # of the points that are over: what was expected, and what it was

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        for line in (*self.lines, self.bar):
            line.close()

    def tick(self, given: Iterable[Point]) -> None:
        """Show which of the points that an engine has are under way, and how far."""
        if self.bar.disable and time.monotonic() - self.told < TELL_SECONDS:
            return
        self.told = time.monotonic()
        busy = [point for point in given if under_way(point)]
        shown = [f"{point.id}: {self._doing(point)}" for point in busy[:SHOWN]]
        shown += [f"{len(busy) - SHOWN} more"] * (len(busy) > SHOWN)
        if self.bar.disable:
            tqdm.write("\n".join(["under way:", *(f"  {line}" for line in shown)]), file=sys.stderr)
            return
        self.bar.set_postfix_str(self._left())
        while len(self.lines) < len(shown):
            self.lines.append(tqdm(bar_format="  {desc}", position=len(self.lines) + 1, leave=False))
        for i, line in enumerate(self.lines):
            line.set_description_str(shown[i] if i < len(shown) else "")

    def finished(self, over: Over, rows: list[dict[str, Any]], took: float) -> None:
        """Tell the numbers of a point that is over, and what failed."""
        for failure in over.failures:
            log = over.point.folder / LOG
            tqdm.write(f"{over.point.id}: {failure.job} failed: {failure.error}; see {log}", file=sys.stderr)
        planned = self.expected.get(over.point.id) or self.mean
        self.rest -= planned
        if took:
            self.spent += took
            self.planned += planned
        self.bar.update()
        tqdm.write(f"{over.point.id}: {_numbers(rows)}{took:.0f} s; {self._left()}", file=sys.stderr)

    def _doing(self, point: Point) -> str:
        job = next(left_jobs(self.config, point), None)
        if job is None:
            return ""
        return f"{job.name}{_how_far(point)}" if job.stage == "train" else job.name

    def _left(self) -> str:
        """The time left: what is expected, corrected by how the points so far took longer or shorter."""
        if not self.planned:
            return "time left not known yet"
        return f"about {duration(max(0, self.rest) * self.spent / self.planned / self.at_once)} left"


def _numbers(rows: list[dict[str, Any]]) -> str:
    if not rows or rows[0]["val_loss"] is None:
        return ""
    tasks = outcomes(rows)
    return f"held-out loss {rows[0]['val_loss']:.3f}, " + (f"{sum(tasks)} of {len(tasks)} tasks, " if tasks else "")


def _how_far(point: Point) -> str:
    """The last step that a run has logged, and its loss."""
    last: dict[str, Any] = {}
    with suppress(OSError, ValueError, IndexError), open(point.folder / "metrics.jsonl", "rb") as file:
        file.seek(max(0, file.seek(0, 2) - 2000))
        last = json.loads(file.read().splitlines()[-1])
    loss = f", loss {last['loss/train']:.3f}" if "loss/train" in last else ""
    return f", step {last.get('step', 0)} of {point.config.train.steps}{loss}"
