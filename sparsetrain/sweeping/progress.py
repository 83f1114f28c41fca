"""What a sweep tells while it runs: a bar with the time left, and a line for each point, on standard error."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sparsetrain.sweeping.plan import duration
from sparsetrain.sweeping.points import Point
from sparsetrain.sweeping.records import LOG, Job


class Progress:
    """The live display, as a context; where standard error is no terminal there is no bar, only the lines.

    Args:
        total: points of the sweep.
        expected: seconds that each point that is left may take, by its id.
    """

    def __init__(self, total: int, expected: dict[str, float]):
        form = "{n_fmt}/{total_fmt} points |{bar}| {elapsed}{postfix}"
        self.bar = tqdm(total=total, initial=total - len(expected), disable=None, bar_format=form)
        self.expected = dict(expected)
        self.planned = self.spent = 0.0  # of the points that are over: what was expected, and what it was
        self.job: Job | None = None
        self.began = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def begins(self, point: Point, job: Job) -> None:
        """A job of a point begins."""
        if self.job is None or self.job.folder != job.folder:
            self.began = time.monotonic()
        self.job = job
        self.tick()

    def tick(self) -> None:
        """Show how far the job is."""
        if self.job is not None and not self.bar.disable:
            step = f", step {_last_step(self.job.folder)}" if self.job.stage == "train" else ""
            self.bar.set_postfix_str(f"{self._left()}, {self.job.folder.name}: {self.job.name}{step}")

    def failed(self, job: Job, error: str) -> None:
        """Tell of a failure."""
        tqdm.write(f"{job.folder.name}: {job.name} failed: {error}; see {job.folder / LOG}", file=sys.stderr)

    def finished(self, point: Point, rows: list[dict[str, Any]]) -> None:
        """Tell the numbers of a point that is over."""
        took = time.monotonic() - self.began
        self.spent += took
        self.planned += self.expected.pop(point.id, 0.0)
        self.bar.update()
        tqdm.write(f"{point.id}: {_numbers(rows)}{took:.0f} s; {self._left()}", file=sys.stderr)

    def _left(self) -> str:
        """The time left: what is expected, corrected by how the points so far took longer or shorter."""
        if not self.planned:
            return "time left not known yet"
        return f"about {duration(sum(self.expected.values()) * self.spent / self.planned)} left"


def _numbers(rows: list[dict[str, Any]]) -> str:
    if not rows or rows[0]["val_loss"] is None:
        return ""
    tasks = [row for row in rows if row["task"]]
    reached = sum(row["reached"] is True for row in tasks)
    return f"held-out loss {rows[0]['val_loss']:.3f}, " + (f"{reached} of {len(tasks)} tasks, " if tasks else "")


def _last_step(folder: Path) -> str:
    """The last step that a run has logged."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 2000))
            return str(json.loads(file.read().splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError):
        return "0"
