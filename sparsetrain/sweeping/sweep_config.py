"""The typed configuration of a sweep: what is varied, what each run shares, what is measured."""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from sparsetrain.config import (
    ConfigError,
    RunConfig,
    config_from_dict,
    config_to_dict,
    known_keys,
    load_config,
    read_item,
)
from sparsetrain.prune_config import PruneConfig
from sparsetrain.sweeping.sweep_options import OBJECTIVES, SweepOptions
from sparsetrain.task_language import LANGUAGE_GENERATORS
from sparsetrain.task_probing import probing_task
from sparsetrain.task_prompts import GENERATORS

BUILT_IN = tuple(draw.__name__ for draw in (*GENERATORS, *LANGUAGE_GENERATORS))
ALL = "all"
SWEEP = "sweep.yaml"  # in the sweep's folder, its config as it was last started
DRAWS = ("uniform", "log_uniform", "integer")  # of a range; choice is of values
VARIED = """
what is varied; every combination is a point:
  grid.KEY=[VALUE, ...]
      KEY of a run (see `sparsetrain train --help`), with its values; model.abs_topk is all of its sites
  arms.NAME=[FILE.yaml, KEY=VALUE, ...]
      named variants of the base; an arm that sets a KEY of the grid is not crossed with it
  samples.KEY=[uniform|log_uniform|integer, LOW, HIGH] or [choice, VALUE, ...]
      drawn n_samples times, all keys together; a draw that comes again makes no second point"""


@dataclass(frozen=True)
class Sweep:
    """A sweep's options, and what it varies.

    Attributes:
        options: see SweepOptions.
        grid: values of each key.
        arms: files and overrides of each variant, by name.
        samples: (kind, low, high) of each key, or ("choice", value, ...).
        dense_grid: values of some of the grid's keys in place of its own, for the dense baselines.
        prune: how tasks are pruned.
    """

    options: SweepOptions
    grid: dict[str, list[Any]]
    arms: dict[str, list[str]]
    samples: dict[str, tuple[Any, ...]]
    dense_grid: dict[str, list[Any]]
    prune: PruneConfig


def load_sweep(arguments: Sequence[str]) -> Sweep:
    """Read the config of a sweep from YAML files and `key=value` overrides, in the order given.

    Raises:
        ConfigError: a file cannot be read, or something in it cannot be used; all problems are listed at once. Keys of
            runs are looked at by `points.expand`.
    """
    leaves = read_leaves(arguments)
    problems = _misplaced(leaves)
    grid, arms, samples = (_take(leaves, part) for part in ("grid", "arms", "samples"))
    problems += [*_grid_problems(grid), *_arm_problems(arms), *_sample_problems(samples)]
    options = _tried(problems, config_from_dict, SweepOptions, leaves)
    of_prune: list[str] = []
    prune = options and _tried(of_prune, load_config, PruneConfig, options.prune)
    problems += [f"prune: {told}" for told in of_prune]
    dense = _tried(problems, read_leaves, options.dense or []) if options else None
    dense_grid = _take(dense or {}, "grid")
    problems += [f"dense: {told}" for told in _grid_problems(dense_grid)]
    problems += [f"dense: grid.{key} must be in the sweep's grid too" for key in dense_grid if key not in grid]
    if options:
        problems += [*_option_problems(options, samples), *options.engine.problems()]
        if options.adaptive:
            problems += _search_problems(options, [*grid, *list(arms)[1:]])
        if options.adaptive and not problems:
            by_arms = _tried(problems, read_leaves, [item for items in arms.values() for item in items]) or {}
            problems += [f"samples.{key} must not be set by an arm too" for key in by_arms if key in samples]
        if not (grid or arms or samples or problems or len(options.seeds) > 1 or options.dense is not None):
            problems.append("a sweep must vary something, got neither grid, arms, samples nor a second seed")
    if problems:
        raise ConfigError("\n".join(problems))
    return Sweep(options, grid, arms, {key: tuple(drawn) for key, drawn in samples.items()}, dense_grid, prune)


def read_leaves(arguments: Sequence[str]) -> dict[str, Any]:
    """The values of YAML files and `key=value` overrides by dotted key, not checked; later ones win.

    Raises:
        ConfigError: a file or a value cannot be read.
    """
    leaves: dict[str, Any] = {}
    for item in arguments:
        leaves.update(read_item(item))
    return leaves


def sweep_to_yaml(sweep: Sweep) -> str:
    """A sweep's config as YAML that stands alone: the files that it names are written out as their keys."""
    o = sweep.options
    options = replace(
        o, base=_written_out(o.base), prune=_written_out(o.prune), dense=o.dense and _written_out(o.dense)
    )  # fmt: skip
    samples = {key: list(drawn) for key, drawn in sweep.samples.items()}
    varied = {"grid": sweep.grid, "arms": {n: _written_out(of) for n, of in sweep.arms.items()}, "samples": samples}
    given = {part: values for part, values in varied.items() if values}
    return yaml.safe_dump(config_to_dict(options) | given, sort_keys=False, width=120)


def _written_out(items: Sequence[str]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in read_leaves(items).items()]


def _misplaced(leaves: dict[str, Any]) -> list[str]:
    """Take out keys of runs and of searches that are given as if they were the sweep's own."""
    own, told = {key for key, _ in known_keys(SweepOptions)}, []
    for kind, where in ((RunConfig, "base"), (PruneConfig, "prune")):
        for key in [key for key, _ in known_keys(kind) if key in leaves and key not in own]:
            told.append(f"{key} must be in the sweep's {where}: {where}=[..., {key}={leaves.pop(key)}]")
    return told


def _take(leaves: dict[str, Any], part: str) -> dict[str, Any]:
    """Move what is under `part.` out of `leaves`; null drops a key, as `arms.dense=null` on the command line."""
    keys = [key for key in leaves if key == part or key.startswith(f"{part}.")]
    found = {key.removeprefix(part).removeprefix("."): leaves.pop(key) for key in keys}
    return {key: value for key, value in found.items() if value is not None}


def _tried(problems: list[str], build, *arguments):
    """What `build` makes, or None with its problems noted."""
    try:
        return build(*arguments)
    except ConfigError as error:
        problems += str(error).splitlines()
        return None


def _grid_problems(grid: Mapping[str, Any]) -> list[str]:
    return [
        f"grid{'.' * bool(key)}{key} must be a list of at least one value, got {values!r}"
        + ("" if key else "; name a key of a run, or leave the grid out")
        for key, values in grid.items()
        if not key or not isinstance(values, list) or not values
    ]


def _arm_problems(arms: Mapping[str, Any]) -> list[str]:
    return [
        f"arms{'.' * bool(name)}{name} must be a list of FILE.yaml and KEY=VALUE, got {items!r}"
        + ("; write an arm as NAME: [KEY=VALUE]" if "." in name or not name else "")
        for name, items in arms.items()
        if not name or not isinstance(items, list) or not all(isinstance(item, str) for item in items)
    ]


def _sample_problems(samples: Mapping[str, Any]) -> list[str]:
    return [
        f"samples{'.' * bool(key)}{key} must be [{'|'.join(DRAWS)}, LOW, HIGH] with LOW < HIGH (above 0 for "
        f"log_uniform), or [choice, VALUE, ...] of different values, got {drawn!r}"
        for key, drawn in samples.items()
        if not _is_draw(drawn)
    ]


def _is_draw(drawn: Any) -> bool:
    if isinstance(drawn, list) and drawn[:1] == ["choice"]:
        plain = all(isinstance(value, (str, int, float)) for value in drawn)  # what Optuna can choose
        return len(drawn) > 1 and plain and len({*drawn}) == len(drawn)
    if not isinstance(drawn, list) or len(drawn) != 3 or drawn[0] not in DRAWS:
        return False
    kind, low, high = drawn
    numbers = all(isinstance(x, int if kind == "integer" else (int, float)) for x in (low, high))
    return numbers and -math.inf < low < high < math.inf and (low > 0 or kind != "log_uniform")


def _option_problems(options: SweepOptions, samples: Mapping[str, Any]) -> list[str]:
    found = []
    if options.name in ("", "..") or Path(options.name).name != options.name:
        found.append(f"name must be a folder's name without a path, got {options.name!r}")
    if "=" in str(options.folder):
        found.append(f"out and name must be without =, got {str(options.folder)!r}; it would be read as an override")
    if not options.seeds or len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        found.append(f"seeds must be different numbers of at least 0, at least one, got {options.seeds}")
    if bool(samples) != bool(options.n_samples):
        found.append(f"n_samples must be at least 1 with samples and 0 without, got {options.n_samples}")
    known = (*BUILT_IN, ALL)
    found += [
        f"tasks must be built-in names, .jsonl files that are there, or all, got {task!r}; the nearest names are "
        f"{', '.join(difflib.get_close_matches(task, known, cutoff=0.3) or known)}"
        for task in options.tasks
        if task not in known and not probing_task(task) and not (task.endswith(".jsonl") and Path(task).is_file())
    ]
    names = [task_name(task) for task in options.tasks]
    if ALL in options.tasks:  # a built-in one may be named besides, a file may not have its name
        names += {*BUILT_IN} - {*options.tasks}
    found += [f"tasks must have different names, got {name} twice" for name in {n for n in names if names.count(n) > 1}]
    found += [
        f"measures must be written MODULE:FUNCTION, got {m!r}"
        for m in options.measures
        if m.count(":") != 1 or not all(m.split(":"))
    ]
    return found


def _search_problems(options: SweepOptions, crossed: list[str]) -> list[str]:
    """What a search that adapts cannot do."""
    found, search = [], options.search
    if not options.n_samples:
        found.append("search.sampler=tpe must have samples to draw, got none")
    if crossed or options.dense is not None:
        found.append(
            "search.sampler=tpe must be without grid, several arms and dense, which would need a search each, got "
            f"{', '.join(crossed) or 'dense'}; give each a sweep of its own"
        )
    if not search.objective or {*search.objective} - {*OBJECTIVES} or len({*search.objective}) < len(search.objective):
        found.append(f"search.objective must be of {', '.join(OBJECTIVES)}, each once, got {search.objective}")
    if "edges" in search.objective and not options.tasks:
        found.append("search.objective=[edges] must have tasks to prune, got none; name tasks, or take [val_loss]")
    if options.engine.kind == "slurm" and not options.engine.at_once:
        found.append("engine.at_once must be set with slurm and tpe: draws that run at once learn little of each other")
    return found


def task_name(task: str) -> str:
    """The name under which a run keeps the circuits of a task: of a file, its stem."""
    return Path(task).stem if task.endswith(".jsonl") else task
