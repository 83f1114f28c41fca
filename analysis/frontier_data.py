"""What a frontier is drawn of: the models of one or more sweeps, by setting, with the outcome of every task."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from sparsetrain.config import ConfigError
from sparsetrain.sweeping.points import expand
from sparsetrain.sweeping.records import is_impossible
from sparsetrain.sweeping.rows import ROWS, read_rows
from sparsetrain.sweeping.sweep_config import SWEEP, load_sweep

Row = dict[str, Any]
NEEDED = {"sweep", "point", "arm", "values", "seed", "n_params", "n_nonzero", "val_loss", "task", "error"}
OF_A_CIRCUIT = {"n_edges", "task_loss"}
DENSE = 0.99  # share of nonzero weights from which on a model counts as dense


class FrontierError(ValueError):
    """Sweeps from which no frontier can be drawn."""


def named(key: str, value: Any) -> str:
    """A value of a sweep with the last part of its key."""
    return f"{key.rpartition('.')[2]}={f'{value:.10g}' if isinstance(value, float) else value}"


@dataclass(frozen=True)
class Model:
    """One trained run.

    Attributes:
        row: what all its rows have in common.
        run: its run directory, which need not be there any more.
        outcomes: its row for each task that has an outcome, reached or not.
    """

    row: Row
    run: Path
    outcomes: dict[str, Row]

    @cached_property
    def reached(self) -> set[str]:
        return {task for task, row in self.outcomes.items() if row["reached"]}

    def circuit(self, task: str) -> str | None:
        """The folder of a circuit; None where it is not there."""
        row = self.outcomes[task]
        folder = f"{self.run}/circuits/{task}/{row.get('circuit') or row['method']}"  # no path: there may be many
        return folder if os.path.exists(f"{folder}/circuit.json") else None


@dataclass(frozen=True)
class Setting:
    """Models that differ by their seed alone: one point of the frontier."""

    models: list[Model]

    @property
    def row(self) -> Row:
        return self.models[0].row

    @cached_property
    def name(self) -> str:
        values = [named(key, value) for key, value in self.row["values"].items()]
        return " ".join(filter(None, (self.row["arm"], *values))) or self.row["point"]

    @cached_property
    def family(self) -> tuple[str, str, str]:
        """Folder, sweep and arm: lines join settings of one family."""
        return str(self.models[0].run.parent), self.row["sweep"], self.row["arm"]

    @property
    def seeds(self) -> list[int]:
        return [model.row["seed"] for model in self.models]

    @property
    def val_losses(self) -> np.ndarray:
        """(R,): held-out losses of the seeds, nats per token."""
        return np.array([model.row["val_loss"] for model in self.models])

    @cached_property
    def val_loss(self) -> float:
        return float(self.val_losses.mean())

    @cached_property
    def n_params(self) -> float:
        return fmean(model.row["n_params"] for model in self.models)

    @cached_property
    def n_nonzero(self) -> float:
        return fmean(model.row["n_nonzero"] for model in self.models)

    @property
    def dense(self) -> bool:
        """Whether the weights are: a baseline, whatever its arm is called."""
        return self.n_nonzero >= DENSE * self.n_params

    def log_edges(self, tasks: Sequence[str]) -> np.ndarray:
        """(R, T): logarithm of the edges of each circuit, none counted as 1; NaN where the target was not reached."""
        return self._table(tasks, lambda row: np.log(max(1, row["n_edges"])))

    def log_nonsense(self, tasks: Sequence[str]) -> np.ndarray:
        """(R, T): the same of the nonsense control; NaN where it was not searched for, or the target not reached."""
        controls = self._controls(tasks)
        return np.array([[np.log(max(1, c["n_edges"])) if c.get("reached") else np.nan for c in of] for of in controls])

    def has_nonsense(self, tasks: Sequence[str]) -> np.ndarray:
        """(R, T): whether the nonsense control was searched for."""
        return np.array([[bool(control) for control in of] for of in self._controls(tasks)])

    def has_outcome(self, tasks: Sequence[str]) -> np.ndarray:
        """(R, T): whether a task was reached or not, in place of not being tried yet, or its search having failed."""
        return np.array([[task in model.outcomes for task in tasks] for model in self.models])

    def _controls(self, tasks: Sequence[str]) -> list[list[Row]]:
        return [[(m.outcomes.get(task) or {}).get("nonsense") or {} for task in tasks] for m in self.models]

    def _table(self, tasks: Sequence[str], number) -> np.ndarray:
        rows = [[model.outcomes.get(task) for task in tasks] for model in self.models]
        return np.array([[number(row) if row and row["reached"] else np.nan for row in of] for of in rows])


@dataclass(frozen=True)
class Study:
    """All that is compared.

    Attributes:
        settings: in the order of their rows.
        tasks: those that some model can be asked; one that cannot, since its context is short, does not reach them.
        left_out: the other ones, with the reason.
        common: the same tasks for all, by which settings are compared: see `_common`.
        trivial: tasks that some model reaches and whose circuits say nothing by their size: no model's needs an edge,
            or none does to give nonsense answers to the same prompts, which a bigram table can then tell apart.
        missing: what is not there yet, or failed, in words.
        target_loss: what circuits were cut at, nats; None where nothing says it.
        graph: `channel` or `component`: what an edge is.
    """

    settings: list[Setting]
    tasks: list[str]
    left_out: dict[str, str]
    common: list[str]
    trivial: list[str]
    missing: list[str]
    target_loss: float | None
    graph: str

    @property
    def models(self) -> list[Model]:
        return [model for setting in self.settings for model in setting.models]

    @cached_property
    def log_edges(self) -> dict[int, np.ndarray]:
        """By id of a setting: `Setting.log_edges` of all tasks."""
        return {id(setting): setting.log_edges(self.tasks) for setting in self.settings}

    @cached_property
    def log_nonsense(self) -> dict[int, np.ndarray]:
        """By id of a setting: `Setting.log_nonsense` of all tasks."""
        return {id(setting): setting.log_nonsense(self.tasks) for setting in self.settings}

    @cached_property
    def has_several_sweeps(self) -> bool:
        return len({setting.family[:2] for setting in self.settings}) > 1


def read_study(folders: Sequence[str | Path]) -> Study:
    """Read the rows of sweeps.

    Args:
        folders: of the sweeps, finished or not; each holds a rows.jsonl.

    Raises:
        FrontierError: one holds no rows, no model is trained, no task has an outcome, or the sweeps cannot be compared
            since their target losses, corpora, tokenizers or graphs differ.
    """
    folders = each_once(folders)
    rows = [(folder, row) for folder in folders for row in _rows(folder)]
    models = _models(rows)
    where = ", ".join(map(str, folders))
    if not models:
        raise FrontierError(f"a sweep must hold a trained model, got none in {where}; run `sparsetrain sweep` first")
    outcomes = [(task, row) for model in models for task, row in model.outcomes.items()]
    possible = {task for task, row in outcomes if not is_impossible(row)}  # in a longer context, say
    left_out = {task: row["why"] for task, row in outcomes if task not in possible}
    tasks = list(dict.fromkeys(row["task"] for _, row in rows if row["task"] and row["task"] not in left_out))
    if not any(task in model.outcomes for model in models for task in tasks):
        raise FrontierError(f"a frontier must have tasks, got none with an outcome in {where}; name them in `tasks`")
    _refuse_what_differs(models)
    if size := _one(models, "size"):
        raise FrontierError(
            f"circuits must be cut at a target loss to be compared in size, got circuits of {size} each; leave "
            "prune.size out of the sweep"
        )
    settings = _settings(models)
    trivial = [task for task in tasks if _is_trivial([m.outcomes[task] for m in models if task in m.reached])]
    common = _common(settings, tasks, trivial)
    return Study(
        settings=settings, tasks=tasks, left_out=left_out, common=common, trivial=trivial,
        missing=[*_missing(rows, models, tasks), *_not_begun(rows, folders)], target_loss=_one(models, "target_loss"),
        graph=_one(models, "graph") or "channel",
    )  # fmt: skip


def each_once(folders: Sequence[str | Path]) -> list[Path]:
    """Folders, of which one may be spelt in several ways."""
    return list({Path(folder).resolve(): Path(folder) for folder in folders}.values())


def _rows(folder: Path) -> list[Row]:
    try:
        rows = read_rows(folder)
    except (OSError, ValueError) as error:
        raise FrontierError(
            f"{folder} must hold the {ROWS} of a sweep, which `sparsetrain sweep` writes, got: {error}"
        ) from None
    if other := next((i for i, row in enumerate(rows, 1) if not _is_row(row)), None):
        raise FrontierError(
            f"{folder / ROWS} must have lines with {', '.join(sorted(NEEDED))}, and {', '.join(sorted(OF_A_CIRCUIT))} "
            f"as numbers where a task is reached, got another in line {other}"
        )
    return rows


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not row.keys() >= NEEDED:
        return False
    numbers = [] if row["val_loss"] is None else [row["val_loss"], row["n_params"], row["n_nonzero"] or None]
    numbers += [row.get(key) for key in OF_A_CIRCUIT] if row["task"] and row.get("reached") else []
    return ("reached" in row or not row["task"]) and all(isinstance(number, (int, float)) for number in numbers)


def _models(rows: list[tuple[Path, Row]]) -> list[Model]:
    """The trained models; a row without an outcome (not pruned yet, or the search failed) gives none."""
    found: dict[tuple, Model] = {}
    for folder, row in rows:
        if not _is_trained(row):
            continue
        key = folder, row["sweep"], row["point"]
        if key not in found:
            found[key] = Model(row, folder / "points" / row["point"], {})
        if row["task"] and row["reached"] is not None:
            found[key].outcomes[row["task"]] = row
    return list(found.values())


def _is_trained(row: Row) -> bool:
    return row["val_loss"] is not None and math.isfinite(row["val_loss"])


def _settings(models: list[Model]) -> list[Setting]:
    groups: dict[tuple, list[Model]] = {}
    for model in models:
        row = model.row
        key = model.run.parent, row["sweep"], row["arm"], json.dumps(row["values"])
        groups.setdefault(key, []).append(model)
    return [Setting(of) for of in groups.values()]


def _is_trivial(circuits: list[Row]) -> bool:
    """Whether no circuit of a task has an edge, or none of those that were found for nonsense answers."""
    controls = [row["nonsense"] for row in circuits if row.get("nonsense") and row["nonsense"]["reached"]]
    return any(of and not any(row["n_edges"] for row in of) for of in (circuits, controls))


def _common(settings: list[Setting], tasks: list[str], trivial: list[str]) -> list[str]:
    """The tasks by which the most circuits are compared: reached by every seed of more than half of the settings.

    Tasks are taken in the order of how many settings reach them, as many as make tasks x settings that reach all of
    them greatest, so that one weak model does not leave a single task to all. Trivial ones say nothing of any model.
    Models that are not finished do not count, unless none is; nor do settings that reach nothing.
    """
    finished = [[m.reached for m in s.models if m.outcomes.keys() >= {*tasks}] for s in settings]
    if not any(finished):
        finished = [[m.reached for m in s.models] for s in settings]
    wanted = {*tasks} - {*trivial}
    able = [found for of in finished if of and (found := set.intersection(*of) & wanted)]
    by_reach = sorted(wanted, key=lambda task: (-sum(task in found for found in able), tasks.index(task)))
    best, most = 0, 0
    for n in range(1, len(by_reach) + 1):
        n_settings = sum(found >= {*by_reach[:n]} for found in able)
        if 2 * n_settings > len(able) and n * n_settings > most:
            best, most = n, n * n_settings
    return [task for task in tasks if task in by_reach[:best]]


def _not_begun(rows: list[tuple[Path, Row]], folders: Sequence[Path]) -> list[str]:
    """Points of the sweeps' own configs that have no row, as far as these can be read from here."""
    begun = {(folder, row["point"]) for folder, row in rows}
    told = []
    for folder in folders:
        if not (file := folder / SWEEP).exists():
            continue
        place = {"out": str(folder.resolve().parent), "name": folder.resolve().name}
        try:
            sweep = load_sweep([str(file), *(f"{key}={json.dumps(value)}" for key, value in place.items())])
            points = expand(sweep)
        except ConfigError as error:
            told.append(f"{file}: which points it has cannot be told from here: {error}")
            continue
        told += [f"{point.id}: not trained yet" for point in points if (folder, point.id) not in begun]
    return told


def _missing(rows: list[tuple[Path, Row]], models: list[Model], tasks: list[str]) -> list[str]:
    """What rows show to be missing or failed."""
    told = [f"{row['point']}: {row['error']}" for _, row in rows if row["error"]]
    told += [f"{row['point']}: its held-out loss is {row['val_loss']}" for _, row in rows
             if not row["error"] and not _is_trained(row)]  # fmt: skip
    for model in models:
        open_tasks = [task for task in tasks if task not in model.outcomes]
        told += [f"{model.row['point']}: no outcome of {', '.join(open_tasks)}"] * bool(open_tasks)
    return list(dict.fromkeys(told))


def _one(models: list[Model], key: str) -> Any:
    """A value that all circuits share: of their rows, or else of a circuit's own file; None where neither has it."""
    found = {row[key] for m in models for row in m.outcomes.values() if row.get(key) is not None}
    found |= {_in_a_circuit(m, key) for m in models if not any(key in row for row in m.outcomes.values())} - {None}
    if len(found) > 1:
        raise FrontierError(
            f"{key} must be the same for all circuits, got {', '.join(map(str, sorted(found)))}; prune all alike, with "
            f"{key}=... in the sweep's `prune`"
        )
    return found.pop() if found else None


def _in_a_circuit(model: Model, key: str) -> Any:
    files = (file for task in model.reached for file in model.run.glob(f"circuits/{task}/*/metrics.json"))
    return next((json.loads(file.read_text()).get(key) for file in files), None)


def _refuse_what_differs(models: list[Model]) -> None:
    """Losses are compared, so they must be over the same held-out tokens; `frontier_text` warns of other windows.

    The same tokenizer with as many held-out tokens is taken for the same: a corpus may be named in several ways.
    """
    corpora: dict[tuple, str] = {}
    for model in models:
        file = model.run / "environment.json"
        if file.exists():
            corpus = json.loads(file.read_text())["corpus"]
            corpora.setdefault((corpus["tokenizer_sha256"], corpus["tokens"]["val"]), model.row["point"])
    if len(corpora) > 1:
        raise FrontierError(
            "models must share corpus and tokenizer, so that their losses can be compared, got different ones in "
            + ", ".join(corpora.values())
        )
