"""Runs a sweep: what is done is left alone, what fails is recorded and does not stop the rest."""

import fcntl
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sparsetrain.config import ConfigError
from sparsetrain.files import make_folder, write_whole
from sparsetrain.sweeping.checks import check, check_before
from sparsetrain.sweeping.complete import Over, forget_failures, is_left, under_way
from sparsetrain.sweeping.engines import Engine, engine_of
from sparsetrain.sweeping.plan import estimates, plan_text
from sparsetrain.sweeping.points import Point, expand
from sparsetrain.sweeping.progress import Progress
from sparsetrain.sweeping.records import Recorded, look_anew, recorded, seconds
from sparsetrain.sweeping.rows import point_rows, write_rows
from sparsetrain.sweeping.search import Search
from sparsetrain.sweeping.sweep_config import SWEEP, Sweep, sweep_to_yaml
from sparsetrain.sweeping.table import TABLE, table
from sparsetrain.sweeping.worker import LOCK, Worker

log = logging.getLogger(__name__)

Rows = dict[str, list[dict[str, Any]]]  # by the point's id
TABLE_EVERY = 60.0  # seconds at least between two tables while a sweep runs; one of 24,000 rows takes a second


def plan(config: Sweep) -> str:
    """The points of a sweep, and what they may take; may time a few steps, and prepares the corpus for that.

    Raises:
        ConfigError: as `sweep`.
    """
    points = expand(config)
    check(config, points)
    make_folder(config.options.folder)
    with Worker(config.options.engine.hides_gpus) as worker, engine_of(config, worker) as engine:
        check_before(config, points, worker)
        found = {point.id: recorded(config, point) for point in points}
        left = [point for point in points if is_left(found[point.id])]
        expected = estimates(config, points, found, worker if engine.here else None)
        return plan_text(config, points, left, expected, engine)


def sweep(config: Sweep, retry: bool = False, worker: Worker | None = None) -> list[dict[str, Any]]:
    """Run what is left of a sweep by its engine, and write its rows and its table.

    Args:
        config: what to vary, run and measure, and by which engine.
        retry: run again what failed.
        worker: takes the jobs that are done by this process; None starts one, which ends with the sweep.

    Returns:
        The rows, see `rows.point_rows`; they are in `rows.jsonl` in the sweep's folder too, beside `table.md` and
        the config in `sweep.yaml`.

    Raises:
        ConfigError: the points cannot be made, a directory of one holds another run, the engine cannot be used, or
            another command runs the sweep; before anything is run or written over.
        WriteError: rows or table could not be written.
    """
    points = expand(config)
    check(config, points)
    make_folder(config.options.folder)
    with _alone(config.options.folder):
        found = {point.id: recorded(config, point) for point in points}
        _tell_of_others(config, found)
        rows = {point.id: point_rows(config, point, found[point.id]) for point in points}
        left = [point for point in points if is_left(found[point.id], retry)]
        search = Search(config) if config.options.adaptive else None
        if left or (search and search.n_left):
            own = nullcontext(worker) if worker else Worker(config.options.engine.hides_gpus)
            with own as jobs, engine_of(config, jobs) as engine:
                check_before(config, left or points, jobs)
                _write_config(config)
                try:
                    _run(config, points, left, found, rows, jobs, engine, search, retry)
                finally:
                    _write(config, rows)
        else:
            _write_config(config)
            _write(config, rows)
    return [row for of_point in rows.values() for row in of_point]


def not_done(config: Sweep) -> list[Point]:
    """The points of a sweep of which something is left, though nothing is recorded as failed."""
    return [point for point in expand(config) if is_left(recorded(config, point))]


def _tell_of_others(config: Sweep, found: Mapping[str, Recorded]) -> None:
    """Runs of earlier configs stay where they are, and are in no row."""
    folder = config.options.folder / "points"
    others = sorted(run.name for run in folder.glob("*/") if run.name not in found)
    if others:
        log.warning(
            "%d of the runs in %s are of no point of this config, and will be in no row (%s, ...); take them away, or "
            "give the sweep another name to keep both", len(others), folder, others[0],
        )  # fmt: skip


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a sweep's folder against a second command, whose rows would not be these."""
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder} must be run by one command at a time, got a second; wait for the first, or end it"
            ) from None
        yield


def _write_config(config: Sweep) -> None:
    write_whole(config.options.folder / SWEEP, sweep_to_yaml(config).encode())


def _write(config: Sweep, rows: Rows) -> None:
    write_rows(config.options.folder, rows)
    _write_table(config, rows)


def _write_table(config: Sweep, rows: Rows) -> None:
    text = table([row for of_point in rows.values() for row in of_point])
    write_whole(config.options.folder / TABLE, text.encode())


def _run(
    config: Sweep, points: list[Point], left: list[Point], found: dict[str, Recorded], rows: Rows, worker: Worker,
    engine: Engine, search: Search | None, retry: bool,
) -> None:  # fmt: skip
    expected = estimates(config, points, found, worker if engine.here else None)
    log.info("%s", plan_text(config, points, left, expected, engine))
    for point in left if retry else ():
        if not under_way(point):  # a job of Slurm's, say, that writes its own records
            forget_failures(config, point)
    before = {point.id: seconds(recorded(config, point)) for point in left}
    n_more = search.n_left * len(config.options.seeds) if search else 0
    planned = {point.id: expected[point.id].seconds for point in left}
    table_due = 0.0
    with Progress(config, len(points) + n_more, n_more, planned, engine.at_once) as progress:
        for over in _points_over(points, left, rows, engine, search, progress):
            if not engine.here:
                look_anew(over.point.folder)
            done = recorded(config, over.point)
            rows[over.point.id] = point_rows(config, over.point, done)
            progress.finished(over, rows[over.point.id], seconds(done) - before.get(over.point.id, 0))
            write_rows(config.options.folder, rows)
            if time.monotonic() > table_due:
                _write_table(config, rows)
                table_due = time.monotonic() + TABLE_EVERY


def _points_over(
    points: list[Point], left: list[Point], rows: Rows, engine: Engine, search: Search | None, progress: Progress
) -> Iterator[Over]:
    """Give points to an engine, of a search those it draws meanwhile, and yield each that is over."""
    waiting, given = list(left), dict[str, Point]()
    while True:
        room = len(waiting) if engine.queues and not search else (engine.at_once or 0) - len(given)
        while search and len(waiting) < room:
            pending = {*given, *(point.id for point in waiting)}
            new = search.next_points(points, {p.id: None if p.id in pending else rows[p.id] for p in points})
            if not new:
                break
            points, waiting = [*points, *new], [*waiting, *new]
            rows.update({point.id: [] for point in new})  # their order is that of the draws, not of who is over first
        batch, waiting = waiting[:room], waiting[room:]
        if batch:
            given.update({point.id: point for point in batch})
            engine.submit(batch)
        if not given:
            return
        for over in engine.over(lambda: progress.tick(given.values())):
            del given[over.point.id]
            yield over
