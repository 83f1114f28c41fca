"""The summary of a sweep as Markdown: over arms and grid, means over seeds and standard deviations."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from sparsetrain.sweeping.records import is_impossible
from sparsetrain.sweeping.rows import outcomes

TABLE, FULL = "table.md", "full_model_loss_calibrated"
Row = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Two Markdown tables of a sweep's rows: one over models, and one over models and tasks, if there are any.

    Edges are a geometric mean over the tasks whose target was reached; how many those are stands beside it. Tasks of
    which no prompt suits a model are named, and counted as neither.
    """
    if not rows:
        return "Nothing is done yet.\n"
    keys, further = list(rows[0]["values"]), _further(rows)
    models = [_model_line(of, keys, further) for of in _grouped(rows, _cell)]
    head = [
        "arm",
        *keys,
        "seeds",
        "n_nonzero",
        "held-out loss",
        "train s",
        "tasks reached",
        "edges",
        *further,
        "failed",
    ]
    text = "Means over seeds +- standard deviation.\n\n" + _markdown(head, models)
    pruned = [r for r in rows if r["task"] and r.get("method")]
    tasks = [_task_line(of, keys) for of in _grouped([r for r in pruned if not is_impossible(r)], _task_cell)]
    text += "\nEdges: a geometric mean over tasks reached, in which none counts as one.\n" * bool(tasks)
    if tasks:
        head = ["task", "arm", *keys, "reached", "edges", "nodes", "task loss", "full model's", "without the circuit",
                "without random ones", "KL", "search s"]  # fmt: skip
        text += "\nReached is the target on the prompts that were learnt on; losses below are of held-out ones.\n\n"
        text += _markdown(head, tasks)
    if without := {r["task"]: r.get("why") for r in pruned if is_impossible(r)}:
        text += "\n" + "".join(f"- {task} was left out where {why}\n" for task, why in without.items())
    return text


def mean_and_deviation(values: Iterable[Any], digits: int = 3) -> str:
    """As 1.23 +- 0.04, of the values that are numbers."""
    there = [value for value in values if isinstance(value, (int, float))]  # a measure may give text now and then
    if not there:
        return ""
    mean = fmean(there)
    around = f" +- {_deviation(there):.{digits}g}" if len(there) > 1 else ""
    return f"{mean:.{max(digits, len(str(int(abs(mean)))))}g}{around}"


def _deviation(values: Sequence[float]) -> float:
    """As `statistics.stdev`, which takes 30 times as long; from the first one on, so that equal values give 0."""
    moved = [value - values[0] for value in values]
    return math.dist(moved, [fmean(moved)] * len(moved)) / math.sqrt(len(moved) - 1)


def _cell(row: Row) -> str:
    return json.dumps([row["arm"], row["values"]])


def _task_cell(row: Row) -> str:
    return json.dumps([row["task"], row["arm"], row["values"]])


def _grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> list[list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _by_seed(rows: list[Row]) -> list[list[Row]]:
    return _grouped(rows, lambda row: str(row["seed"]))


def _model_line(rows: list[Row], keys: list[str], further: list[str]) -> list[Any]:
    models = _by_seed(rows)
    firsts = [of[0] for of in models]
    tasks = outcomes(rows)
    failed = sum(any(row["error"] for row in of) for of in models)
    return [
        *_name(rows, keys), len(models), *(_mean(firsts, key) for key in ("n_nonzero", "val_loss", "train_seconds")),
        f"{sum(tasks)} of {len(tasks)}" if tasks else "", mean_and_deviation(map(_geometric_mean_edges, models)),
        *(_mean(firsts, key) for key in further), failed or "",
    ]  # fmt: skip


def _task_line(rows: list[Row], keys: list[str]) -> list[Any]:
    reached = [row for row in rows if row["reached"]]
    shown = dict.fromkeys(("n_edges", "n_nodes", "task_loss"), reached) | {FULL: rows}
    shown |= dict.fromkeys(("completeness_loss", "random_ablation_loss", "kl", "discovery_seconds"), reached)
    return [
        rows[0]["task"], *_name(rows, keys), f"{len(reached)} of {len(rows)}",
        *(_mean(of, key) for key, of in shown.items()),
    ]  # fmt: skip


def _name(rows: list[Row], keys: list[str]) -> list[Any]:
    return [rows[0]["arm"], *(rows[0]["values"][key] for key in keys)]


def _mean(rows: Iterable[Row], key: str) -> str:
    return mean_and_deviation(row.get(key) for row in rows)


def _geometric_mean_edges(rows: list[Row]) -> float | None:
    edges = [max(1, row["n_edges"]) for row in rows if row.get("reached")]
    return math.exp(fmean(map(math.log, edges))) if edges else None


def _further(rows: Sequence[Row]) -> list[str]:
    """The names of further measures: numbers that are no columns of their own."""
    known = {
        "sweep", "point", "arm", "values", "seed", "n_layers", "n_params", "n_nonzero", "val_loss", "train_seconds",
        "tokens", "train_peak_bytes",
    }  # fmt: skip
    found = [
        name for row in rows for name in list(row)[: list(row).index("error")] if isinstance(row[name], (int, float))
    ]
    return [name for name in dict.fromkeys(found) if name not in known]


def _markdown(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    rows = [f"| {' | '.join(map(str, cells))} |" for cells in ([*head], ["---"] * len(head), *lines)]
    return "\n".join(rows) + "\n"
