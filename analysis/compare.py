"""Two runs side by side: losses on the same held-out text, circuits task by task, weights, cost and settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsetrain.analysis.compare_losses import Side, compare_losses
from sparsetrain.analysis.compare_page import write_compare_page
from sparsetrain.analysis.compare_text import report
from sparsetrain.checkpoint import load_run, run_corpus
from sparsetrain.config import RunConfig, value_of
from sparsetrain.files import make_folder, write_json
from sparsetrain.model import Transformer
from sparsetrain.sweeping.identity import identity

FORMAT = "sparsetrain-compare-1"
CIRCUIT = ("n_nodes", "n_edges", "task_loss", "target_loss", "faithfulness", "completeness_loss", "kl", "graph", "size")
COST = ("val_loss", "seconds", "tokens", "peak_bytes")


def compare(a: str | Path, b: str | Path, out: str | Path | None = None) -> tuple[Path, str]:
    """Compare two runs; writes compare.json and compare.html.

    Args:
        a, b: run directories; differences are B less A, factors B over A.
        out: the folder to write, by default comparisons/<a>-<b>.

    Returns:
        That folder, and the comparison as text.

    Raises:
        CheckpointError: a run holds no readable model.
        DataError: a corpus cannot be read, or there is none.
        CompareError: the held-out texts differ.
        WriteError: a file could not be written.
    """
    sides = [_side(Path(run)) for run in (a, b)]
    found = {
        "format": FORMAT, "runs": [str(a), str(b)], "names": _names(Path(a), Path(b)),
        "losses": compare_losses(*sides), "circuits": _circuits(Path(a), Path(b)),
        "weights": _side_by_side(*(_weights(side.model) for side in sides)),
        "cost": _side_by_side(*(_cost(Path(run)) for run in (a, b))),
        "settings": _differing(sides[0].config, sides[1].config),
    }  # fmt: skip
    folder = Path(out or Path("comparisons") / "-".join(found["names"]))
    make_folder(folder)
    write_json(folder / "compare.json", found)
    write_compare_page(folder / "compare.html", found)
    return folder, report(found)


def _side(run: Path) -> Side:
    model, tokenizer, config = load_run(run)
    return Side(str(run), model, tokenizer, config, run_corpus(run, config))


def _names(a: Path, b: Path) -> list[str]:
    """The folders' names, each after the first folder above in which the paths differ where the names are the same."""
    a, b = (run.resolve().parts[::-1] for run in (a, b))
    apart = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
    return ["_".join(dict.fromkeys((parts[apart], parts[0]))) for parts in (a, b)]


def _side_by_side(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {key: [a.get(key), b.get(key)] for key in dict.fromkeys((*a, *b))}


def _differing(a: RunConfig, b: RunConfig) -> dict[str, list[Any]]:
    """The settings in which two runs differ, names and places of computing left out."""
    keys = sorted({*identity(a), *identity(b)})
    return {key: [value_of(a, key), value_of(b, key)] for key in keys if value_of(a, key) != value_of(b, key)}


def _weights(model: Transformer) -> dict[str, list[int]]:
    """Nonzero and all weights, of all matrices and of each, without the bigram table."""
    each = {
        name.removesuffix(".weight"): [int((p != 0).sum()), p.numel()]
        for name, p in model.named_parameters()
        if p.dim() == 2 and "bigram" not in name
    }
    return {"all": [sum(n for n, _ in each.values()), sum(n for _, n in each.values())], **each}


def _cost(run: Path) -> dict[str, Any]:
    file = run / "summary.json"
    summary = json.loads(file.read_text()) if file.exists() else {}
    return {key: summary.get(key) for key in COST}


def _circuits(a: Path, b: Path) -> list[dict[str, Any]]:
    """A row for each circuit, or search that found none, by its task and name; `factor` is of edges."""
    both = _side_by_side(_searches(a), _searches(b))
    rows = []
    for key in sorted(both):
        ours, theirs = both[key]
        row = {"task": key.split("/")[0], "name": key.split("/")[1], "a": ours, "b": theirs, "factor": None}
        if ours and theirs and all(side["reached"] for side in (ours, theirs)):
            same = all(ours[what] == theirs[what] for what in ("graph", "target_loss", "size"))
            row["factor"] = theirs["n_edges"] / ours["n_edges"] if same and ours["n_edges"] else None
            row["differs"] = [what for what in ("graph", "target_loss", "size") if ours[what] != theirs[what]]
        rows.append(row)
    return rows


def _searches(run: Path) -> dict[str, dict[str, Any]]:
    """What a run's circuits measure, by task and name; a search that missed its target has what it came to."""
    found = {}
    for file in sorted(run.glob("circuits/[!.]*/[!.]*/metrics.json")):
        measures = json.loads(file.read_text())
        found[_key(file)] = {"reached": True, **{key: measures.get(key) for key in CIRCUIT}}
    for file in sorted(run.glob("circuits/[!.]*/[!.]*/unreached.json")):  # newer than a circuit beside it
        read = json.loads(file.read_text())
        found[_key(file)] = {"reached": False, "task_loss": read["best_loss"], "target_loss": read["target_loss"]}
    return found


def _key(file: Path) -> str:
    return f"{file.parent.parent.name}/{file.parent.name}"
