"""Does what a point still needs: the unit that every engine runs."""

import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsetrain.files import write_json
from sparsetrain.sweeping.points import Point
from sparsetrain.sweeping.records import RECORDS, Job, Recorded, jobs, read_records, recorded
from sparsetrain.sweeping.sweep_config import Sweep
from sparsetrain.sweeping.worker import LOCK


@dataclass(frozen=True)
class Failure:
    """A job that failed, by name, and why."""

    job: str
    error: str


@dataclass(frozen=True)
class Over:
    """A point that an engine is through with, and what failed of it."""

    point: Point
    failures: list[Failure]


def complete(config: Sweep, point: Point, run: Callable[[Job], str | None]) -> list[Failure]:
    """Do the jobs of a point that are not done; without its model there is nothing to prune or measure.

    Args:
        config: the sweep it is of.
        point: the point.
        run: does a job and says why it failed, as `Worker.run`.

    Returns:
        What failed.
    """
    failures = []
    for job in left_jobs(config, point):
        if error := run(job):
            failures.append(Failure(job.name, error))
            if job.stage == "train":
                break
    return failures


def left_jobs(config: Sweep, point: Point) -> Iterator[Job]:
    """The jobs of a point that are to be done, found one after the other."""
    for job in jobs(config, point):
        record = job.record()
        if not record:
            yield job
        elif "error" in record and job.stage == "train":
            return


def is_left(done: Recorded, retry: bool = False) -> bool:
    """Whether there is anything to do for a point."""
    if "error" in done[0][1] and not retry:  # its model could not be trained
        return False
    return any(not record or (retry and "error" in record) for _, record in done)


def forget_failures(config: Sweep, point: Point) -> None:
    """Drop the records of what failed, so that it counts as not done.

    Raises:
        WriteError: the records could not be written.
    """
    failed = {job.name for job, record in recorded(config, point) if "error" in record}
    if failed:
        file = point.folder / RECORDS
        write_json(file, {name: record for name, record in read_records(file).items() if name not in failed})


def give_up(config: Sweep, point: Point, error: str) -> Failure:
    """Record that the next job of a point, if one is left, failed without a process that could have recorded it.

    Raises:
        WriteError: the record could not be written.
    """
    job = next(left_jobs(config, point), None)
    if job is None:
        return Failure("its process, after all was done", error)
    job.write(error=error)
    return Failure(job.name, error)


def under_way(point: Point) -> bool:
    """Whether a process works on a point just now."""
    return is_locked(point.folder / LOCK)


def is_locked(file: Path) -> bool:
    """Whether some process holds a lock file; one that is not there is not held."""
    try:
        opened = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(opened)
    return False
