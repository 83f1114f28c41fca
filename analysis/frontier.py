"""The frontier of sweeps: what is written of it, and where."""

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bokeh.palettes import Viridis256
from tqdm import tqdm

from sparsetrain.analysis import frontier_text as texts
from sparsetrain.analysis.frontier_data import FrontierError, Model, Study, each_once, read_study
from sparsetrain.analysis.frontier_lines import Line, all_lines, equal_capability
from sparsetrain.analysis.frontier_means import default_mean, summarise
from sparsetrain.analysis.frontier_page import write_frontier_page
from sparsetrain.analysis.frontier_panels import panels
from sparsetrain.analysis.frontier_picture import pictures
from sparsetrain.files import make_folder, write_json, write_whole
from sparsetrain.sweeping.identity import FREE
from sparsetrain.sweeping.rows import ROWS
from sparsetrain.sweeping.sweep_config import SWEEP, read_leaves

FORMAT, CONFIGS = "sparsetrain-frontier-1", "configs.json"
MADE_ON = ("device", "commit", "date", "python", "versions", "corpus")  # of a run's environment, what is published
DENSE_COLOUR, BRIGHTEST = "#111827", 215  # the yellow end of the palette cannot be read on white


def write_frontier(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    publish: str | Path | None = None,
    pages: bool = False,
) -> tuple[Path, str]:
    """Draw the frontier of sweeps: frontier.html, .png, .svg, .json and .md.

    Args:
        folders: of the sweeps, see `read_study`.
        out: where it is written; the first sweep's folder by default.
        publish: a folder, in a repository say, for what can be kept of it: all but the page, which links to runs; and
            rows.jsonl, of which this function makes the page again, and configs.json.
        pages: also write the page of each circuit that has none, some seconds each, so that the frontier's links to it.

    Returns:
        The folder of the page, and the tables as Markdown.

    Raises:
        FrontierError: no frontier can be drawn of these, or two sweeps of one name are to be published together.
        WriteError: a file could not be written.
    """
    folders = each_once(folders)
    study = read_study(folders)
    if publish:
        _refuse_to_publish(study, folders, Path(publish))
    if pages:
        _write_circuit_pages(study)
    out = Path(out or folders[0])
    found, ways = summarise(study), all_lines(study)
    for lines in ways.values():
        _colour(lines)
    title = ", ".join(dict.fromkeys(setting.row["sweep"] for setting in study.settings))
    kept = [Path(folder) for folder in (out, publish) if folder]
    for folder in kept:
        make_folder(folder)
    with pictures(kept, panels(study, found, ways)):
        factors = equal_capability(study, ways["size"])
        text = texts.markdown(study, found, factors)
        for folder in kept:
            write_json(folder / "frontier.json", _json(study, found, ways, factors))
            write_whole(folder / "frontier.md", text.encode())
        write_frontier_page(out / "frontier.html", title, study, found, ways, factors)
    if publish:
        configs = _configs(study.models, folders)
        write_whole(Path(publish) / ROWS, b"".join((folder / ROWS).read_bytes() for folder in folders))
        write_json(Path(publish) / CONFIGS, configs)
    return out, text


def _refuse_to_publish(study: Study, folders: Sequence[Path], publish: Path) -> None:
    if len({setting.row["sweep"] for setting in study.settings}) < len(folders):
        raise FrontierError(
            "sweeps that are published together must have different names, by which their rows are told apart, got "
            f"{', '.join(map(str, folders))}; publish each by itself"
        )
    others = [folder for folder in folders if folder.resolve() != publish.resolve()]
    if (publish / SWEEP).exists() or (others and len(others) < len(folders)):
        raise FrontierError(
            f"publish must be a folder of its own, got {publish}, whose {ROWS} are a sweep's and would be lost"
        )


def _write_circuit_pages(study: Study) -> None:
    """circuit.html beside each circuit that has none; one that cannot be written is told and left out."""
    from sparsetrain.analysis.circuit_page import write_page  # which imports torch; a frontier needs none
    from sparsetrain.checkpoint import CheckpointError
    from sparsetrain.data import DataError
    from sparsetrain.pruning.circuit import CircuitError
    from sparsetrain.tasks import TaskError

    found = [(model.run, model.circuit(task)) for model in study.models for task in sorted(model.reached)]
    without = [(run, folder) for run, folder in found if folder and not Path(folder, "circuit.html").exists()]
    for run, folder in tqdm(without, desc="pages of circuits", disable=None):
        try:
            write_page(run, folder)
        except (CheckpointError, CircuitError, DataError, TaskError) as error:
            tqdm.write(f"{folder}: no page: {error}", file=sys.stderr)


def _colour(lines: Sequence[Line]) -> None:
    sparse = [line for line in lines if not line["dense"]]
    for line in lines:
        at = 0 if line["dense"] else sparse.index(line) / max(1, len(sparse) - 1)
        line["colour"] = DENSE_COLOUR if line["dense"] else Viridis256[int(20 + at * (BRIGHTEST - 20))]


def _json(
    study: Study, found: Sequence[Mapping[str, Any]], ways: Mapping[str, Sequence[Line]],
    factors: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    settings = [
        {
            **{key: setting.row[key] for key in ("sweep", "arm", "values")}, "seeds": setting.seeds,
            "dense": setting.dense, "n_params": setting.n_params, "n_nonzero": setting.n_nonzero,
            **summary, **{part: {k: vars(v) for k, v in summary[part].items()} for part in ("means", "floors")},
        }
        for setting, summary in zip(study.settings, found, strict=True)
    ]  # fmt: skip
    return {
        "format": FORMAT, "target_loss": study.target_loss, "graph": study.graph, "tasks": study.tasks,
        "common": study.common, "trivial": study.trivial, "mean": default_mean(study), "settings": settings,
        "lines": ways, "equal_capability": factors, "left_out": study.left_out, "missing": study.missing,
    }  # fmt: skip


def _configs(models: Sequence[Model], folders: Sequence[Path]) -> dict[str, Any]:
    """How circuits were searched for, and the config and environment of every run: what all share, and what each has
    besides; names and places of computing left out."""
    kept = [_published(folder) for folder in folders]
    read = {name: of["shared"] | own for of in kept for name, own in of["points"].items()}
    read |= {f"{m.row['sweep']}/{m.row['point']}": _config(m.run) for m in models if (m.run / "config.yaml").exists()}
    first = next(iter(read.values()), {})
    shared = {key: value for key, value in first.items() if all(of.get(key) == value for of in read.values())}
    points = {p: {k: v for k, v in of.items() if k not in shared} for p, of in read.items()}
    searches = [_searches(folder) or of["searches"] for folder, of in zip(folders, kept, strict=True)]
    return {"searches": [*itertools.chain(*searches)], "shared": shared, "points": points}


def _published(folder: Path) -> dict[str, Any]:
    """What was published of runs that need not be there any more."""
    if not (file := folder / CONFIGS).exists():
        return {"searches": [], "shared": {}, "points": {}}
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise FrontierError(f"{file} must be as it was published, got: {error}; move it away to do without") from None


def _searches(folder: Path) -> list[dict[str, Any]]:
    if not (file := folder / SWEEP).exists():
        return []
    sweep = read_leaves([str(file)])
    return [{key: sweep[key] for key in ("name", "tasks", "method", "prune") if key in sweep}]


def _config(run: Path) -> dict[str, Any]:
    keys = {key: value for key, value in read_leaves([str(run / "config.yaml")]).items() if key not in FREE}
    if not (file := run / "environment.json").exists():
        return keys
    made = json.loads(file.read_text())
    return keys | {f"environment.{key}": made[key] for key in MADE_ON}
