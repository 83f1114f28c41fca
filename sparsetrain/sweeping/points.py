"""From the config of a sweep to its points: one resolved RunConfig each, in a run directory of its own."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, make_dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

from sparsetrain.config import EVERY_SITE, ConfigError, RunConfig, config_from_dict, every_site, known_keys, value_of
from sparsetrain.sweeping.draws import Draw, known_draws
from sparsetrain.sweeping.identity import identity
from sparsetrain.sweeping.sweep_config import Sweep, read_leaves

RESERVED = {"run.seed": "use seeds", "run.name": "it follows from the point", "run.out": "it is the sweep's folder"}
DENSE = {
    "sparsity.density": 1, "sparsity.embedding_density": 1, "sparsity.gradient": "dense", "locality.pressure": "none",
    **every_site(1),
}  # fmt: skip
SPARSE_SECTIONS = ("sparsity.", EVERY_SITE, "locality.")
LONGEST_ID = 100
Axes = list[list[dict[str, Any]]]  # of each axis the settings to choose from: values by key
Cell = tuple[str, dict[str, Any], RunConfig]  # arm, values and config of a point, but for its seed


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        arm: the name of its variant; empty where a sweep names none.
        values: what the grid and the samples set, by key.
        config: the run's resolved config; its run directory is the point's.
        identity: the keys that make the point what it is: all that are not at their defaults and not in FREE.
    """

    arm: str
    values: dict[str, Any]
    config: RunConfig
    identity: dict[str, Any]

    @property
    def id(self) -> str:
        return self.config.run.name

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    @property
    def group(self) -> tuple[str, str]:
        """What the points of all seeds have in common."""
        return self.arm, json.dumps(self.values)


def expand(sweep: Sweep, draws: list[Draw] | None = None) -> list[Point]:
    """All points of a sweep, seed by seed, so that a sweep that is not done yet shows every arm.

    Args:
        sweep: what is varied.
        draws: of its samples; None: all that are known. Where a search adapts, a draw that is known already or
            contradicts the config makes no point, and the points are in the order of the draws.

    Raises:
        ConfigError: a key is unknown or set elsewhere, a value is out of range, or keys of a point contradict each
            other; or two points would share a directory. All problems are listed at once.
    """
    problems: list[str] = []
    draws = known_draws(sweep) if draws is None else draws
    axes = _typed_axes(sweep, draws, problems)
    dense_axes = axes
    if sweep.dense_grid:
        dense_axes = _typed_axes(replace(sweep, grid=sweep.grid | sweep.dense_grid), draws, problems)
    arms = list(_arms(sweep, problems))
    _raise(problems)
    cells = list(_all_cells(sweep, arms, axes, dense_axes, problems))
    if sweep.options.adaptive and cells:
        return _different([_point(sweep, *cell, seed) for cell in cells for seed in sweep.options.seeds])
    _raise(problems)
    return _different([_point(sweep, *cell, seed) for seed in sweep.options.seeds for cell in cells])


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def _arms(sweep: Sweep, problems: list[str]) -> Iterator[tuple[str, RunConfig, set[str], bool]]:
    """Name, config and own keys of each arm, and of its dense baseline, and whether it is one.

    What varies may be what makes a config whole; so each point is checked by itself.
    """
    whole = sweep.options.adaptive or not (sweep.grid or sweep.samples)
    for name, items in (sweep.arms or {"": []}).items():
        try:
            base, own = read_leaves(sweep.options.base), read_leaves(items)
            yield name, config_from_dict(RunConfig, base | own, whole), _with_every_site(own), False
            if sweep.options.dense is not None:
                others = read_leaves(sweep.options.dense).items()
                own |= DENSE | {key: value for key, value in others if not key.startswith("grid.")}
                sparse = {key for key in (*sweep.grid, *sweep.samples) if key.startswith(SPARSE_SECTIONS)}
                dense = config_from_dict(RunConfig, base | own, whole)
                yield "-".join(filter(None, (name, "dense"))), dense, _with_every_site(own) | sparse, True
        except ConfigError as error:
            where = f"arms.{name}: " if name else "base: "
            problems += [where + line for line in str(error).splitlines()]


def _with_every_site(keys: Mapping[str, Any]) -> set[str]:
    """An arm's own keys: with the key for all sites of AbsTopK where it sets one of them."""
    return {*keys} | ({EVERY_SITE} if any(key.startswith(f"{EVERY_SITE}.") for key in keys) else set())


def _typed_axes(sweep: Sweep, draws: list[Draw], problems: list[str]) -> Axes:
    """For the grid's keys and for the draws: the settings to choose from, each checked alone."""
    axes = [(f"grid.{key}", [{key: value} for value in values]) for key, values in sweep.grid.items()]
    if sweep.samples:
        axes.append(("samples", [*{json.dumps(draw): draw for draw in draws}.values()]))  # a draw may come again
    for key in {*sweep.grid} & {*sweep.samples}:
        problems.append(f"samples.{key} must not be in the grid too")
    keys = {*sweep.grid, *sweep.samples}
    if EVERY_SITE in keys:
        problems += [f"{key} must not be varied beside {EVERY_SITE}" for key in sorted(keys & every_site(0).keys())]
    typed = []
    for name, settings in axes:
        try:
            typed.append([{key: _typed(key, value) for key, value in setting.items()} for setting in settings])
            twice = [s for i, s in enumerate(typed[-1]) if s in typed[-1][:i]] if name != "samples" else []
            problems += [f"grid: {key} must have different values, got {s[key]!r} twice" for s in twice for key in s]
        except ConfigError as error:
            problems += [f"{name.partition('.')[0]}: {line}" for line in str(error).splitlines()]
    return typed


def _typed(key: str, value: Any) -> Any:
    """A value of a run's key as the config would hold it, checked against the key's type and range alone."""
    known = dict(known_keys(RunConfig))
    if key in RESERVED:
        raise ConfigError(f"{key} must not be varied; {RESERVED[key]}")
    if key == EVERY_SITE:
        return _typed(next(iter(every_site(value))), value)
    if key not in known:
        config_from_dict(RunConfig, {key: value})  # says which key is nearest
        raise ConfigError(f"{key} must be a single key of a run, got a section; write {key}.KEY")
    kind, inner = known[key].type, {"default": known[key].default, "metadata": known[key].metadata}
    if callable(known[key].default_factory):
        inner = {"default_factory": known[key].default_factory, "metadata": known[key].metadata}
    for name in reversed(key.split(".")):
        kind = make_dataclass(name, [(name, kind, field(**inner))], frozen=True)
        inner = {"default_factory": kind}
    return value_of(config_from_dict(kind, {key: value}), key)


def _all_cells(
    sweep: Sweep, arms: list[tuple[str, RunConfig, set[str], bool]], axes: Axes, dense_axes: Axes, problems: list[str]
) -> Iterator[Cell]:
    """The combinations of all arms; those that differ only in what makes them sparse share their dense baselines."""
    baselines = set()
    for name, base, own, dense in arms:
        if not dense:
            yield from _cells(sweep, name, base, own, axes, problems)
            continue
        for cell in _cells(sweep, name, base, own, dense_axes, problems):
            same = json.dumps(identity(cell[2]), sort_keys=True)
            if same not in baselines:
                yield cell
            baselines.add(same)


def _cells(sweep: Sweep, name: str, base: RunConfig, own: set[str], axes: Axes, problems: list[str]) -> Iterator[Cell]:
    """Arm, values and config of every combination; an arm's own keys are not crossed."""
    free = [_without(own, settings) for settings in axes]
    try:
        fixed = {key: _fixed(base, key) for key in (*sweep.grid, *sweep.samples) if key in own}
    except ConfigError as error:
        problems.append(f"arms.{name}: {error}")
        return
    for chosen in itertools.product(*(settings for settings in free if settings)):
        values: dict[str, Any] = reduce(dict.__or__, chosen, {})
        config = with_values(base, values)
        if found := config.problems():
            problems += [f"{_label(name, values)}: {problem}" for problem in found]
            continue
        ordered = {key: ({**fixed, **values})[key] for key in (*sweep.grid, *sweep.samples)}
        yield name, ordered, config


def _fixed(base: RunConfig, key: str) -> Any:
    """An arm's own value of a key that is varied elsewhere."""
    if key != EVERY_SITE:
        return value_of(base, key)
    shares = {value_of(base, site) for site in every_site(0)}
    if len(shares) > 1:
        raise ConfigError(f"{key} must be set as a whole where it is varied, got its sites at {sorted(shares)}")
    return shares.pop()


def _without(own: set[str], settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings of an axis without an arm's own keys, each once."""
    left: list[dict[str, Any]] = []
    for setting in settings:
        rest = {key: value for key, value in setting.items() if key not in own}
        if rest and rest not in left:
            left.append(rest)
    return left


def with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """A config with some dotted keys changed."""
    for key, value in values.items():
        for each, one in (every_site(value) if key == EVERY_SITE else {key: value}).items():
            config = _with(config, each.split("."), one)
    return config


def _with(config: Any, path: list[str], value: Any) -> Any:
    inner = _with(getattr(config, path[0]), path[1:], value) if len(path) > 1 else value
    return replace(config, **{path[0]: inner})


def _point(sweep: Sweep, arm: str, values: dict[str, Any], config: RunConfig, seed: int) -> Point:
    engine = sweep.options.engine
    config = with_values(config, {"run.seed": seed, "run.out": str(sweep.options.folder / "points")})
    if engine.kind != "serial" and config.run.threads is None:
        config = with_values(config, {"run.threads": engine.cpus})
    what = identity(config)  # which names and folders do not change
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
    named = with_values(config, {"run.name": f"{_label(arm, values)}_seed-{seed}_{digest}"})
    return Point(arm, values, named, what)


def _label(arm: str, values: Mapping[str, Any]) -> str:
    """A readable name that is a folder's: each key by its last part. No `=`, which makes a path look an override."""
    parts = [f"{key.rpartition('.')[2]}-{value}" for key, value in values.items()]
    return re.sub(r"[^\w.+-]+", "_", "_".join(filter(None, (arm, *parts))))[:LONGEST_ID] or "base"


def _different(points: list[Point]) -> list[Point]:
    """Each directory once: equal points of two arms are refused, since rows would count them twice."""
    by_folder: dict[str, Point] = {}
    problems = []
    for point in points:
        other = by_folder.setdefault(point.id, point)
        if other is not point:
            problems.append(f"two points must not share the directory {point.folder}")
    same: dict[str, Point] = {}
    for point in points:
        other = same.setdefault(json.dumps(point.identity, sort_keys=True), point)
        if other is not point and other.id != point.id:
            problems.append(f"{point.id} must differ from {other.id}, got the same config; drop one of the two")
    _raise(problems)
    return points
