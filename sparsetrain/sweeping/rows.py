"""Rows of a sweep, one for each task of each point, made of what the run directories hold and of nothing else."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparsetrain.config import value_of
from sparsetrain.files import write_whole
from sparsetrain.sweeping.points import Point
from sparsetrain.sweeping.records import Recorded, is_done, is_impossible
from sparsetrain.sweeping.sweep_config import Sweep

ROWS = "rows.jsonl"
WINDOWS = ("model.n_ctx", "train.batch_size", "train.eval_batches", "train.stride")  # keys that val_loss depends on too


def point_rows(sweep: Sweep, point: Point, done: Recorded) -> list[dict[str, Any]]:
    """The rows of a point: what it has done so far, none if that is nothing.

    Args:
        sweep: the sweep it is of.
        point: the point.
        done: what is recorded of it.

    Returns:
        For each task that was pruned, that the model does not do, or whose pruning failed, a row; one without a task
        where there are none. Each has the keys of `first_columns`, val_loss in nats per token; n_layers; the most
        memory in train_peak_bytes; `task` and its `reached`; of a task that was pruned its `method`, the folder's name
        `circuit`, what `stages.COPIED` names, `nonsense`, discovery_seconds and discovery_peak_bytes; `why`, where the
        target was not reached; further measures by their names; `error`, null if there was none.
    """
    found = {job.name: (job, record) for job, record in done}
    trained = found["train"][1]
    if not trained:
        return []
    shared = {**first_columns(sweep, point), **trained.get("result", {})}
    errors = []
    for name, (job, record) in found.items():
        if job.stage == "measure":
            shared |= record.get("result", {})
        if job.stage != "prune" and "error" in record:
            errors.append(f"{name}: {record['error']}")
    shared["error"] = "; ".join(errors) or None
    rows = [
        {**shared, "task": task, **result, "error": "; ".join(filter(None, (shared["error"], error))) or None}
        for task, result, error in _tasks(sweep, found)
    ]
    return rows or [{**shared, "task": None}]


def first_columns(sweep: Sweep, point: Point) -> dict[str, Any]:
    """What says which run a row is of, and over which windows of the corpus its loss is taken."""
    return {
        "sweep": sweep.options.name, "point": point.id, "arm": point.arm, "values": point.values, "seed": point.seed,
        "n_params": None, "n_nonzero": None, "val_loss": None, "train_seconds": None, "tokens": None,
        "windows": {key: value_of(point.config, key) for key in WINDOWS},
    }  # fmt: skip


def _tasks(sweep: Sweep, found: dict) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    """Each task with its result and its error: those that were pruned, then those that the model does not do."""
    for job, record in found.values():
        if job.stage == "prune" and record:
            method = job.order["method"]
            circuit = {"method": method, "circuit": sweep.prune.name or method}
            result = circuit | record.get("result", {"reached": None})
            yield job.name.removeprefix("prune-"), result, record.get("error")
    scores = found["abilities"][1].get("result", {}) if "abilities" in found else {}
    for task, score in scores.items():
        if not is_done(score, sweep) and f"prune-{task}" not in found:
            loss = score["calibrated_loss"] if score["loss"] is not None else None
            why = score["reason"] or f"the full model's calibrated loss of {loss:.3f} is above the target"
            yield task, {"reached": False, "full_model_loss_calibrated": loss, "why": why}, None


def outcomes(rows: Iterable[dict[str, Any]]) -> list[bool]:
    """Whether the target was reached, of each task; one that no prompt suits or whose search failed has no outcome."""
    return [row["reached"] for row in rows if row["task"] and row["reached"] is not None and not is_impossible(row)]


def write_rows(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Write rows.jsonl whole, in the order of the points.

    Raises:
        WriteError: it could not be written; what was there is untouched.
    """
    lines = [json.dumps(row) + "\n" for of_point in rows.values() for row in of_point]
    write_whole(folder / ROWS, "".join(lines).encode())


def read_rows(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a sweep as they were last written."""
    return [json.loads(line) for line in (Path(folder) / ROWS).read_text().splitlines()]
