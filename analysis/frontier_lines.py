"""Lines through settings, and how much smaller circuits are than those of the dense baselines at equal loss."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from sparsetrain.analysis.frontier_data import Row, Setting, Study, named
from sparsetrain.analysis.frontier_means import draw, interval
from sparsetrain.config import EVERY_SITE
from sparsetrain.sweeping.points import SPARSE_SECTIONS

SAME_SIZE, SAME_L0 = 1.1, 1.6  # settings whose counts are within this factor share a line; in L0 embeddings differ
SIZES = ("model.", "sparsity.density", "sparsity.embedding_density", "data.vocab_size")  # keys that change a count
NOT_SIZES = (EVERY_SITE,)
DEPTH = "model.n_layers"
WAYS = {"size": "lines of equal size", "l0": "lines of equal L0"}  # the two that every frontier has, with their titles
Line = dict[str, Any]


def all_lines(study: Study) -> dict[str, list[Line]]:
    """The lines of each way to draw them.

    Returns:
        By way: lines with a `name`, whether they are `dense`, and their `settings` by number, in order. `size` has
        lines of equal n_params on which L0 varies, as in the paper's figure, `l0` the reverse, with one setting of each
        size at most; any other way is a key that the sweep varies, with lines on which it alone does. Dense baselines
        have lines of their own.

    Source: Gao et al. 2025, figure 3.
    """
    settings = study.settings
    sizes = _grouped([s.n_params for s in settings], SAME_SIZE)
    held = [{key: value for key, value in s.row["values"].items() if not _is_size(key)} for s in settings]
    kinds = [(s.dense, s.family, str(values)) for s, values in zip(settings, held, strict=True)]
    counts = _of_equal_l0([s.n_nonzero for s in settings], sizes, kinds)
    of_a_line = _by(zip(kinds, counts, strict=True))
    spans = [_span([settings[j].n_nonzero for j in of_a_line[pair]]) for pair in zip(kinds, counts, strict=True)]
    ways = {
        "size": _lines(settings, lambda i: {"": f"{_short(sizes[i])} weights", **held[i]},
                       lambda i: sizes[i], lambda i: settings[i].n_nonzero),
        "l0": _lines(settings, lambda i: {"": f"{spans[i]} nonzeros", **held[i]},
                     lambda i: counts[i], lambda i: settings[i].n_params),
    }  # fmt: skip
    for key in dict.fromkeys(key for s in settings for key in s.row["values"]):
        ways[key] = _along(settings, key)
    return ways


def _along(settings: list[Setting], key: str) -> list[Line]:
    def others(i: int) -> dict[str, Any]:
        return {k: value for k, value in settings[i].row["values"].items() if k != key}

    return _lines(settings, others, lambda i: 0, lambda i: _sortable(settings[i].row["values"].get(key)))


def _is_size(key: str) -> bool:
    return key.startswith(SIZES) and not key.startswith(NOT_SIZES)


def _sortable(value: Any) -> tuple:
    return (0, value, "") if isinstance(value, (int, float)) else (1, 0, str(value))


def _lines(
    settings: list[Setting], shared: Callable[[int], dict[str, Any]], rank: Callable[[int], float],
    order: Callable[[int], Any],
) -> list[Line]:  # fmt: skip
    """Settings of one family that share some values, by `order`; lines by `rank` and their values, dense ones first."""
    groups: dict[tuple, list[int]] = {}
    for i, s in enumerate(settings):
        own = _matched(s).values() if s.dense else (rank(i), *shared(i).values())
        own = tuple(map(_sortable, own))
        groups.setdefault((not s.dense, s.family, *own), []).append(i)
    several = len({s.family for s in settings if not s.dense}) > 1
    lines = []
    for group in sorted(groups, key=lambda g: (g[0], g[2:], g[1])):
        members = groups[group]
        first = settings[members[0]]
        by = (lambda i: settings[i].n_params) if first.dense else order
        told = _told({"": "dense", **_matched(first)}) if first.dense else _told(shared(members[0]))
        if several:
            told += f" ({', '.join(dict.fromkeys(filter(None, first.family[1:])))})"
        lines.append({"name": told, "dense": first.dense, "settings": sorted(members, key=by)})
    return lines


def _matched(setting: Setting) -> dict[str, Any]:
    """What a dense baseline has in common with the sparse models that it is one for, besides their arm: all but size.

    Depth counts, since circuits of deeper models have other edges; what makes a model sparse does not.
    """
    values = setting.row["values"].items()
    return {k: v for k, v in values if k == DEPTH or not (_is_size(k) or k.startswith(SPARSE_SECTIONS))}


def _told(shared: dict[str, Any]) -> str:
    words = [named(key, value) if key else value for key, value in shared.items()]
    return " ".join(words) or "all"


def _grouped(counts: Sequence[float], within: float) -> list[float]:
    """For each count the least one of its group: groups begin with the least count and span a factor at most."""
    starts: dict[float, float] = {}
    start = 0.0
    for count in sorted(counts):
        start = count if not start or count > within * start else start
        starts[count] = start
    return [starts[count] for count in counts]


def _of_equal_l0(counts: Sequence[float], sizes: Sequence[float], kinds: Sequence[Any]) -> list[float]:
    """For each count the one its line begins with: from the least on, the nearest that is left of each other size."""
    starts: dict[int, float] = {}
    for first in sorted(range(len(counts)), key=counts.__getitem__):
        if first in starts:
            continue
        starts[first] = counts[first]
        near = [i for i in range(len(counts)) if i not in starts and kinds[i] == kinds[first]
                and sizes[i] != sizes[first] and counts[i] <= SAME_L0 * counts[first]]  # fmt: skip
        for size in {sizes[i] for i in near}:
            starts[min((i for i in near if sizes[i] == size), key=counts.__getitem__)] = counts[first]
    return [starts[i] for i in range(len(counts))]


def _by(keys: Iterable[Any]) -> dict[Any, list[int]]:
    """Numbers of items by their key."""
    groups: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return groups


def _span(counts: Sequence[float]) -> str:
    least, most = _short(min(counts)), _short(max(counts))
    return least if least == most else f"{least} to {most}"


def _short(count: float) -> str:
    """As 7.42M, 96.1k or 310."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def equal_capability(study: Study, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """How much smaller circuits are than those of dense baselines of the same held-out loss.

    Log edges are interpolated between neighbours on each line, task by task, at every loss that a setting of one of the
    two lines has and that both lines cover; only tasks that all models of the neighbours reach are compared, and of
    these not those that are trivial, nor those that none of them needs an edge for.

    Args:
        study: what is compared.
        lines: of equal size, see `all_lines`.

    Returns:
        For each line against the dense lines of its arm (or all dense ones, where its arm has none) that are like it
        in all but size and sparsity, and in depth: rows with `line`, `dense`, `loss`, the setting `at` whose it is,
        `edges`, `dense_edges`, the `factor` of the two, its 95 % `interval`, n_tasks of n_asked, n_circuits that are
        compared and n_without_edges of them, and `nonsense`: the same factor of the circuits for nonsense answers, with
        the `real` one of the same n_tasks, those for which all models have both. Where no loss is covered by both,
        `nearest` in place of these: the two settings whose losses are nearest, and their losses; None where a side has
        no circuit.
    """
    rng = np.random.default_rng(1)
    drawn = {n: draw(rng, n) for n in range(1, len(study.tasks) + 1)}
    found = []
    for line in lines:
        if line["dense"]:
            continue
        for dense in _baselines(study, line, lines):
            found += _against(study, line, dense, drawn, rng)
    return found


def _baselines(study: Study, line: Line, lines: Sequence[Line]) -> list[Line]:
    *sweep, arm = study.settings[line["settings"][0]].family
    dense = [other for other in lines if other["dense"]]
    names = {"-".join(filter(None, (arm, "dense"))), arm}

    def of_its_arm(other: Line) -> bool:
        *there, name = study.settings[other["settings"][0]].family
        return there == sweep and name in names

    def held(i: int) -> tuple[dict[str, Any], int | None]:
        """With the depth that an arm may have set, which no value says."""
        return _matched(study.settings[i]), study.settings[i].row.get("n_layers")

    ours = [held(i) for i in line["settings"]]
    alike = [other for other in dense if held(other["settings"][0]) in ours]
    return [other for other in alike if of_its_arm(other)] or alike


def _against(
    study: Study, line: Line, dense: Line, drawn: dict[int, np.ndarray], rng: np.random.Generator
) -> list[dict[str, Any]]:
    ours, theirs = (_by_loss(study, of) for of in (line, dense))
    named = {"line": line["name"], "dense": dense["name"]}
    if not ours or not theirs:
        return [{**named, "nearest": None}]
    low = max(ours[0].val_loss, theirs[0].val_loss)
    high = min(ours[-1].val_loss, theirs[-1].val_loss)
    losses = sorted({s.val_loss for s in (*ours, *theirs) if low <= s.val_loss <= high})
    if not losses:
        a, b = min(((a, b) for a in ours for b in theirs), key=lambda pair: abs(pair[0].val_loss - pair[1].val_loss))
        return [{**named, "nearest": [[s.name, s.val_loss] for s in (a, b)]}]
    return [named | _at(study, _around(ours, loss), _around(theirs, loss), loss, drawn, rng) for loss in losses]


def _by_loss(study: Study, line: Line) -> list[Setting]:
    """A line's settings that have circuits, best first."""
    able = [study.settings[i] for i in line["settings"]]
    return sorted((s for s in able if any(m.reached & {*study.tasks} for m in s.models)), key=lambda s: s.val_loss)


def _around(line: list[Setting], loss: float) -> tuple[Setting, Setting]:
    """The neighbours on a line between which a loss lies; the same one twice where it is a setting's own."""
    for setting in line:
        if setting.val_loss == loss:
            return setting, setting
    return next((a, b) for a, b in pairwise(line) if a.val_loss < loss < b.val_loss)


def _at(
    study: Study, ours: tuple, theirs: tuple, loss: float, drawn: dict[int, np.ndarray], rng: np.random.Generator
) -> dict[str, Any]:
    compared = {id(s): s for s in (*ours, *theirs)}
    logs, controls = ({key: of[key] for key in compared} for of in (study.log_edges, study.log_nonsense))
    shared = _there(logs) & ~np.isin(study.tasks, study.trivial)
    tasks = [task for task, there in zip(study.tasks, shared, strict=True) if there]
    tasks = [task for task in tasks if any(row["n_edges"] for row in _circuits(compared.values(), [task]))]
    shared = np.isin(study.tasks, tasks)
    circuits = _circuits(compared.values(), tasks)
    anchor = next(s for s in (*ours, *theirs) if s.val_loss == loss)  # its seeds decide at which loss is compared
    counts = {
        "loss": loss, "at": anchor.name, "n_tasks": len(tasks), "n_asked": len(study.tasks),
        "n_circuits": len(circuits),
        "n_without_edges": sum(not row["n_edges"] for row in circuits),
    }  # fmt: skip
    if not tasks:
        return counts | dict.fromkeys(("edges", "dense_edges", "factor", "interval", "nonsense"))

    def sides(logs: dict, shared: np.ndarray, weights: dict) -> tuple[np.ndarray, np.ndarray]:
        """(T, B) of both sides: log edges at the anchor's loss, seeds weighted."""
        at = anchor.val_losses @ weights[id(anchor)]
        return tuple(_interpolated(pair, at, logs, shared, weights) for pair in (ours, theirs))

    def factor(logs: dict, shared: np.ndarray) -> float:
        mine, dense = sides(logs, shared, once)
        return float(np.exp((dense - mine).mean()))

    once = {key: np.full((len(found), 1), 1 / len(found)) for key, found in logs.items()}
    mine, dense = sides(logs, shared, {key: draw(rng, len(found)) for key, found in logs.items()})
    resampled = np.exp(((dense - mine) * drawn[len(tasks)]).sum(0))
    both = shared & _there(controls)
    alone = len(tasks) == 1 and all(len(found) == 1 for found in logs.values())
    edges, dense_edges = (float(np.exp(side.mean())) for side in sides(logs, shared, once))
    return counts | {
        "edges": edges, "dense_edges": dense_edges, "factor": dense_edges / edges,
        "interval": None if alone else interval(resampled),
        "nonsense": {"n_tasks": int(both.sum()), "factor": factor(controls, both), "real": factor(logs, both)}
        if both.any() else None,
    }  # fmt: skip


def _there(logs: dict[int, np.ndarray]) -> np.ndarray:
    """(T,): which tasks have a circuit in every seed of all settings."""
    return np.all([~np.isnan(found).any(0) for found in logs.values()], axis=0)


def _circuits(settings: Iterable[Setting], tasks: Iterable[str]) -> list[Row]:
    return [model.outcomes[task] for setting in settings for model in setting.models for task in tasks]


def _interpolated(
    pair: tuple[Setting, Setting], loss: np.ndarray, logs: dict, shared: np.ndarray, weights: dict
) -> np.ndarray:
    """(T, B): log edges at losses (B,) between two settings, with seeds, and so their losses, weighted by (R, B)."""
    (first, a), (second, b) = [
        (s.val_losses @ w, logs[id(s)][:, shared].T @ w) for s, w in ((s, weights[id(s)]) for s in pair)
    ]
    apart = np.where(second == first, 1.0, second - first)
    return a + np.clip((loss - first) / apart, 0, 1) * (b - a)
