"""What the pictures of a frontier show, in plain values."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparsetrain.analysis.frontier_data import Study, named
from sparsetrain.analysis.frontier_lines import WAYS, Line
from sparsetrain.analysis.frontier_means import MEANS, default_mean
from sparsetrain.analysis.frontier_text import target


def panels(study: Study, found: Sequence[Mapping[str, Any]], ways: Mapping[str, Sequence[Line]]) -> dict[str, Any]:
    """The picture's values, by the mean that is shown first.

    Args:
        study: what is compared.
        found: of each setting, see `frontier_means.summarise`.
        ways: lines, see `frontier_lines.all_lines`, with a `colour` each.

    Returns:
        `y_label`; `points`, one for each setting, with its held-out `loss` and `loss_interval`, nats per token, its
        mean `edges` and their `interval` (None without), whether it `missed` a task of the mean, whether it is on the
        `front`, and the edges of circuits for `nonsense` answers to the same tasks (None without); `panels`, each with
        a `title`, its `lines`, those of equal size, and those of equal L0 where some join two points, and by point
        `labels` of what it is.
    """
    mean = default_mean(study)
    shown = [way for way in WAYS if way == "size" or _joins(ways[way], found, mean)]
    return {
        "y_label": f"edges at {target(study)}\n({_tasks(study, mean)})",
        "points": [_point(summary, mean) for summary in found],
        "panels": [
            {
                "title": WAYS[way], "lines": ways[way],
                "labels": [_label(*of, mean) for of in zip(found, varied(study, ways[way]), strict=True)],
            }
            for way in shown
        ],
    }  # fmt: skip


def _joins(lines: Sequence[Line], found: Sequence[Mapping[str, Any]], mean: str) -> bool:
    """Whether some line of sparse settings has two that are drawn."""
    return any(
        sum(found[i]["means"][mean].mean is not None for i in line["settings"]) > 1
        for line in lines if not line["dense"]
    )  # fmt: skip


def _tasks(study: Study, mean: str) -> str:
    if mean == "common":
        return f"geometric mean over the same {len(study.common)} of {len(study.tasks)} tasks"
    return f"geometric mean over {MEANS[mean]}"


def varied(study: Study, lines: Sequence[Line]) -> list[str]:
    """Of each setting what tells it from the others of its line."""
    told = [""] * len(study.settings)
    for line in lines:
        values = {i: study.settings[i].row["values"] for i in line["settings"]}
        keys = [key for key in values[line["settings"][0]] if len({str(of.get(key)) for of in values.values()}) > 1]
        for i, of in values.items():
            told[i] = " ".join(named(key, of.get(key)) for key in keys)
    return told


def _label(found: Mapping[str, Any], varied: str, mean: str) -> str:
    """A setting with how many outcomes reached the target, of all its seeds."""
    reached = f"{'↑ ' * found['means'][mean].at_least}{found['n_reached']}/{found['n_asked']}"
    return ", ".join(filter(None, (varied, reached, f"{found['n_open']} open" * bool(found["n_open"]))))


def _point(found: Mapping[str, Any], mean: str) -> dict[str, Any]:
    value, floor = found["means"][mean], found["floors"].get(mean)
    there = value.mean is not None and floor is not None and floor.times is not None
    return {
        "loss": found["val_loss"], "loss_interval": found["loss_interval"], "edges": value.mean,
        "interval": value.interval, "missed": found["missed"], "front": value.pareto,
        "nonsense": value.mean * floor.times if there else None,
    }  # fmt: skip
