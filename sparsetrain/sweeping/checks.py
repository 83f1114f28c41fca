"""Looks, before any run begins, at all that can be wrong with a sweep besides its config."""

import json
import time
from typing import Any

from sparsetrain.config import ConfigError, RunConfig, config_to_dict, load_config
from sparsetrain.sweeping.identity import identity
from sparsetrain.sweeping.points import Point
from sparsetrain.sweeping.records import LOG, RECORDS, Job, digest, read_records
from sparsetrain.sweeping.sweep_config import ALL, Sweep
from sparsetrain.sweeping.worker import Worker


def check(config: Sweep, points: list[Point]) -> None:
    """Refuse points whose directory holds a run of another config, or that need a GPU where the engine has none.

    Raises:
        ConfigError: all of those at once.
    """
    problems = []
    engine = config.options.engine
    if engine.hides_gpus and any(point.config.run.device == "cuda" for point in points):
        problems.append("engine.gpus must be above 0 where run.device is cuda, got 0")
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
    corpora = {json.dumps(data): data for data in (config_to_dict(point.config.data) for point in points)}
    tasks = {task: digest(task) for task in options.tasks if task != ALL}
    order = {"tasks": tasks, "method": options.method, "measures": options.measures, "data": list(corpora.values())}
    asked = {"at": time.time()}  # each time anew: files and modules may have changed or gone since
    job = Job("check", "check", options.folder / "plan", asked, order)
    if error := worker.run(job):
        raise ConfigError(f"{error.removeprefix('ConfigError: ')} (see {job.folder / LOG})")


def _there(point: Point) -> dict[str, Any] | None:
    """The identity of the run in a point's directory; None where there is none yet."""
    if asked := read_records(point.folder / RECORDS).get("train", {}).get("asked"):
        return asked
    file = point.folder / "config.yaml"
    return identity(load_config(RunConfig, [str(file)])) if file.exists() else None
