"""Interpretability of a setting: three means over tasks, since tasks that are not reached have no edges to average.

See docs/method.md for what each is good for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsetrain.analysis.frontier_data import Setting, Study

MEANS = {
    "common": "the same tasks for all",
    "own": "the tasks each model reaches",
    "bound": "all tasks, unreached ones as the whole model",
}
N_RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Value:
    """A mean over seeds and tasks with its bootstrap interval.

    Attributes:
        mean: geometric, of edges; None where it is not defined.
        interval: 95 %; None with a single circuit.
        at_least: whether the truth can only be greater, since some task was not reached.
        pareto: whether no other setting has both a lower loss and fewer edges, and none the same loss and fewer; never
            without a mean, where it is a bound, or, with means over other tasks than the common ones, where some task
            has no outcome yet.
    """

    mean: float | None = None
    interval: tuple[float, float] | None = None
    at_least: bool = False
    pareto: bool = False


@dataclass(frozen=True)
class Floor:
    """What the same search finds for nonsense answers, beside the circuits of the same tasks and seeds.

    Attributes:
        times: how many times as many edges those have that reach the target, a geometric mean; None if none does.
        n_reached, n_asked: how many do, of how many that were searched for.
    """

    times: float | None
    n_reached: int
    n_asked: int


def summarise(study: Study) -> list[dict[str, Any]]:
    """For each setting what is drawn of it.

    Returns:
        By setting: val_loss and `loss_interval`, one standard error over seeds to both sides; `means`, a Value by each
        of MEANS; n_reached of n_asked outcomes over all its seeds, n_open without one; whether it `missed` one of the
        common tasks (or of all, where there are none), in place of not being through with them; `floors`, a Floor over
        the tasks of `common`, and over those of `own` that are not trivial.
    """
    rng = np.random.default_rng(0)
    drawn = {n: draw(rng, n) for n in {len(study.tasks), len(study.common)} if n}
    found = [_summary(setting, study, drawn, rng) for setting in study.settings]
    for name in MEANS:
        values = [(s, s["means"][name]) for s in found]
        unsure = [v.mean is None or v.at_least or (name != "common" and s["n_open"]) for s, v in values]
        on = pareto([(s["val_loss"], np.inf if no else v.mean) for (s, v), no in zip(values, unsure, strict=True)])
        for summary, is_on in zip(found, on, strict=True):
            value = summary["means"][name]
            summary["means"][name] = Value(value.mean, value.interval, value.at_least, is_on)
    return found


def draw(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, N_RESAMPLES): the share of each of n in resamples of n - 1: those of n would vary too little.

    Source: Rao and Wu 1988 (the variance of a mean of n comes out right, where it would be half with n = 2).
    """
    n_drawn = max(1, n - 1)
    return np.ascontiguousarray(rng.multinomial(n_drawn, np.full(n, 1 / n), N_RESAMPLES).T) / n_drawn


def default_mean(study: Study) -> str:
    """The mean that is shown first: over the same tasks for all, or the bound where there are none."""
    return "common" if study.common else "bound" if study.graph == "channel" else "own"


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other one beats: lower or equal in both, and lower in one. Infinite ones never count."""
    best, last, on = np.inf, None, [False] * len(points)
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        on[i] = points[i][1] < best or (points[i] == last and points[i][1] < np.inf)
        if on[i]:
            best, last = points[i][1], points[i]
    return on


def _summary(setting: Setting, study: Study, drawn: dict[int, np.ndarray], rng: np.random.Generator) -> dict[str, Any]:
    edges, there = study.log_edges[id(setting)], setting.has_outcome(study.tasks)
    reached = ~np.isnan(edges)
    seeds = draw(rng, len(setting.models))
    chosen = [study.tasks.index(task) for task in study.common]
    means = {"own": _value(edges, drawn, seeds), "common": Value(), "bound": Value()}
    if chosen and reached[:, chosen].all():
        means["common"] = _value(edges[:, chosen], drawn, seeds)
    if study.graph == "channel" and there.any():
        whole = np.log([[model.row["n_nonzero"]] for model in setting.models])
        counted = np.where(there & ~reached, whole, edges)
        means["bound"] = _value(counted, drawn, seeds, bool((there & ~reached).any()))
    nonsense, asked = study.log_nonsense[id(setting)], setting.has_nonsense(study.tasks)
    telling = ~np.isin(study.tasks, study.trivial)
    floors = {"own": _floor(*(of[:, telling] for of in (edges, nonsense, asked)))}
    floors["common"] = _floor(*(of[:, chosen] for of in (edges, nonsense, asked)))
    return {
        "val_loss": setting.val_loss,
        "loss_interval": _within_an_error(setting.val_losses) if len(setting.models) > 1 else None,
        "means": {name: means[name] for name in MEANS},
        "n_reached": int(reached.sum()), "n_asked": int(there.sum()),
        "n_open": int((~there).sum()), "missed": bool((there & ~reached)[:, chosen or slice(None)].any()),
        "floors": floors,
    }  # fmt: skip


def _within_an_error(values: np.ndarray) -> tuple[float, float]:
    error = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - error), float(values.mean() + error)


def _floor(edges: np.ndarray, nonsense: np.ndarray, asked: np.ndarray) -> Floor:
    found = ~np.isnan(nonsense)
    times = float(np.exp((nonsense - edges)[found].mean())) if found.any() else None
    return Floor(times, int(found.sum()), int(asked.sum()))


def _value(logs: np.ndarray, drawn: dict[int, np.ndarray], seeds: np.ndarray, at_least: bool = False) -> Value:
    """The mean over seeds of means over tasks of logs (R, T), of those that are there; tasks and seeds resampled.

    Source: Owen 2007, The pigeonhole bootstrap (rows and columns are drawn apart).
    """
    n_seeds, n_tasks = logs.shape
    n_circuits = np.count_nonzero(~np.isnan(logs))
    if not n_circuits:
        return Value()
    mean = _over(logs, np.ones((n_tasks, 1)), np.ones((n_seeds, 1)))[0]
    if n_circuits == 1:
        return Value(float(np.exp(mean)), None, at_least)
    return Value(float(np.exp(mean)), interval(np.exp(_over(logs, drawn[n_tasks], seeds))), at_least)


def _over(logs: np.ndarray, tasks: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """(B,): weighted means of logs (R, T) by weights of tasks (T, B) and seeds (R, B); NaN where nothing has weight."""
    there = ~np.isnan(logs)
    total, weight = np.where(there, logs, 0) @ tasks, there.astype(float) @ tasks  # (R, B)
    weights = seeds * (weight > 0)
    with np.errstate(invalid="ignore"):
        return (weights * (total / np.where(weight > 0, weight, 1))).sum(0) / weights.sum(0)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The percentiles of INTERVAL of resampled values, of those that are there."""
    low, high = np.percentile(values[~np.isnan(values)], INTERVAL)
    return float(low), float(high)
