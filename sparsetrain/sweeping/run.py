"""Runs a sweep: what is done is left alone, what fails is recorded and does not stop the rest."""

import json
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsetrain.config import ConfigError, RunConfig, load_config
from sparsetrain.files import WriteError, write_whole
from sparsetrain.sweeping.plan import estimates, plan_text
from sparsetrain.sweeping.points import Point, expand, identity
from sparsetrain.sweeping.progress import Progress
from sparsetrain.sweeping.records import LOG, RECORDS, Job, Recorded, digest, jobs, read_records, recorded
from sparsetrain.sweeping.rows import point_rows, write_rows
from sparsetrain.sweeping.sweep_config import ALL, Sweep
from sparsetrain.sweeping.table import table
from sparsetrain.sweeping.worker import Worker

log = logging.getLogger(__name__)

Rows = dict[str, list[dict[str, Any]]]  # by the point's id


def plan(config: Sweep) -> str:
    """The points of a sweep, and what they may take; may time a few steps, and prepares the corpus for that.

    Raises:
        ConfigError: as `sweep`.
    """
    points = expand(config)
    check(points)
    with Worker() as worker:
        left = [point for point in points if is_left(recorded(config, point), retry=False)]
        return plan_text(config, points, left, estimates(config, points, worker))


def sweep(config: Sweep, retry: bool = False, worker: Worker | None = None) -> list[dict[str, Any]]:
    """Run what is left of a sweep, point after point, and write its rows and its table.

    Args:
        config: what to vary, run and measure.
        retry: run again what failed.
        worker: takes the jobs; None starts one, which ends with the sweep.

    Returns:
        The rows, see `rows.point_rows`; they are in `rows.jsonl` in the sweep's folder too, beside `table.md`.

    Raises:
        ConfigError: the points cannot be made, or a directory of one holds another run; before anything is run.
        WriteError: rows or table could not be written.
    """
    points = expand(config)
    check(points)
    folder = config.options.folder
    _make(folder)
    rows, left = {}, []
    for point in points:
        done = recorded(config, point)
        rows[point.id] = point_rows(config, point, done)
        if is_left(done, retry):
            left.append(point)
    try:
        with nullcontext(worker) if worker else Worker() as takes_jobs:
            if left:
                _run(config, points, left, rows, takes_jobs, retry)
    finally:
        write_rows(folder, rows)
    flat = [row for of_point in rows.values() for row in of_point]
    write_whole(folder / "table.md", table(flat).encode())
    return flat


def check(points: list[Point]) -> None:
    """Refuse points whose directory holds a run of another config.

    Raises:
        ConfigError: all of those at once.
    """
    problems = []
    for point in points:
        there = _there(point)
        if there is not None and there != point.identity:
            differing = sorted(k for k in {*there, *point.identity} if there.get(k) != point.identity.get(k))
            problems.append(f"{point.folder} holds a run that differs in {', '.join(differing)}; move it away")
    if problems:
        raise ConfigError("\n".join(problems))


def check_before(config: Sweep, points: list[Point], worker: Worker) -> None:
    """Look at tasks, method, measures and corpora; prepares the corpora.

    Raises:
        ConfigError: something cannot be used.
    """
    options = config.options
    corpora = {json.dumps(asdict(point.config.data)): asdict(point.config.data) for point in points}
    tasks = {task: digest(task) for task in options.tasks if task != ALL}
    asked = {"tasks": tasks, "method": options.method, "measures": options.measures, "data": list(corpora.values())}
    job = Job("check", "check", options.folder / "plan", asked, asked)
    if error := None if "result" in job.record() else worker.run(job):
        raise ConfigError(f"{error.removeprefix('ConfigError: ')} (see {job.folder / LOG})")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"could not make {folder}: {error}") from None


def _there(point: Point) -> dict[str, Any] | None:
    """The identity of the run in a point's directory; None where there is none yet."""
    if asked := read_records(point.folder / RECORDS).get("train", {}).get("asked"):
        return asked
    file = point.folder / "config.yaml"
    return identity(load_config(RunConfig, [str(file)])) if file.exists() else None


def is_left(done: Recorded, retry: bool) -> bool:
    """Whether there is anything to do for a point."""
    if "error" in done[0][1] and not retry:  # its model could not be trained
        return False
    return any(not record or (retry and "error" in record) for _, record in done)


def _run(config: Sweep, points: list[Point], left: list[Point], rows: Rows, worker: Worker, retry: bool) -> None:
    check_before(config, left, worker)
    expected = estimates(config, points, worker)
    log.info("%s", plan_text(config, points, left, expected))
    seconds = {point.id: expected[point.id].seconds for point in left}
    with Progress(len(points), seconds) as progress:
        for point in left:
            complete(config, point, worker, retry, progress)
            rows[point.id] = point_rows(config, point, recorded(config, point))
            progress.finished(point, rows[point.id])
            write_rows(config.options.folder, rows)


def complete(config: Sweep, point: Point, worker: Worker, retry: bool, progress: Progress) -> None:
    """Do the jobs of a point that are not done; without its model there is nothing to prune or measure."""
    for job in _left(config, point, retry):
        progress.begins(point, job)
        if error := worker.run(job, progress.tick):
            progress.failed(job, error)
            if job.stage == "train":
                return


def _left(config: Sweep, point: Point, retry: bool) -> Iterator[Job]:
    """The jobs of a point that are to be done, found one after the other."""
    for job in jobs(config, point):
        record = job.record()
        if not record or (retry and "error" in record):
            yield job
        elif "error" in record and job.stage == "train":
            return
