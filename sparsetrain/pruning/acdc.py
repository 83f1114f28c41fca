"""Automatic circuit discovery: edges are cut one by one, from the logits down, where the metric hardly notices.

Many thresholds are followed at once. Those that have made the same choices so far share their runs, and part where an
edge's effect lies between them; so a sweep costs little more than its thresholds differ.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sparsetrain.config import ConfigError
from sparsetrain.files import write_json
from sparsetrain.prune_config import AcdcOptions
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.edges import Batch, EdgeGraph, EdgeSet, batches, fingerprint, flat, mean_metric, unflat
from sparsetrain.pruning.objective import Metric
from sparsetrain.tasks import TaskData

log = logging.getLogger(__name__)

LONG = 3600  # seconds; a search that would take longer is announced


@dataclass(frozen=True)
class Branch:
    """Thresholds that have made the same choices so far, the edges they keep (n_edges,), and the metric with these."""

    taus: list[float]
    kept: Tensor
    value: float


def find(
    graph: EdgeGraph,
    data: TaskData,
    ablation: Ablation,
    metric: Metric,
    tau: float,
    seed: int = 0,
    state: Path | None = None,
) -> EdgeSet:
    """The edges that one threshold keeps: those without which the metric falls by `tau` or more.

    Other arguments and errors are those of `rank`. Conmy et al. 2023 take 0.0575 of KL for IOI.
    """
    (branch,) = _search(graph, data, ablation, metric, [tau], seed, state)
    return unflat(graph, branch.kept)


def rank(
    graph: EdgeGraph,
    data: TaskData,
    ablation: Ablation,
    metric: Metric,
    options: AcdcOptions,
    seed: int = 0,
    state: Path | None = None,
) -> EdgeSet:
    """Score each edge by the largest threshold at which it survives; 0 where it survives none.

    Targets are visited in reverse topological order, and of each the edges of later sources first. An edge is cut for
    good if the metric falls by less than tau without it. The edges into a node that nothing reads any more go untried.

    Args:
        graph: either graph. It costs a run of all prompts for each edge at least: hours for a channel graph of a
            trained model, which is said when it starts.
        data: the prompts.
        ablation: what an edge that is cut carries.
        metric: what is to be kept, a mean over prompts; the publication's is `kl`.
        options: thresholds.
        seed: of resampled replacements.
        state: a file that the search is saved in after each target, and taken up from if it is there.

    Raises:
        ValueError: `state` holds a search with other settings.
        WriteError: `state` could not be written.

    Source: Conmy et al. 2023, algorithm 1; thresholds 10^linspace(-6, 0, 31) as in the released sweeps.
    """
    if options.lowest_tau > options.highest_tau:
        raise ConfigError(
            f"acdc.lowest_tau must be at most acdc.highest_tau = {options.highest_tau}, got {options.lowest_tau}"
        )
    taus = np.logspace(np.log10(options.lowest_tau), np.log10(options.highest_tau), options.n_taus).tolist()
    scores = torch.zeros(len(flat(graph, graph.edges)))
    for branch in _search(graph, data, ablation, metric, taus, seed, state):
        kept = branch.kept.cpu()
        scores[kept] = scores[kept].clamp(min=max(branch.taus))
    return unflat(graph, scores.to(graph.model.unembed.weight.device))


def _search(
    graph: EdgeGraph, data: TaskData, ablation: Ablation, metric: Metric, taus: list[float], seed: int,
    state: Path | None,
) -> list[Branch]:  # fmt: skip
    """What each threshold keeps: branches, whose thresholds are `taus` all together."""
    prompts = list(batches(graph, data, ablation, seed=seed))
    everything = flat(graph, graph.edges)
    started = time.monotonic()
    branches = [Branch(taus, everything, mean_metric(graph, prompts, graph.edges, metric))]
    _announce(graph, len(everything), time.monotonic() - started)
    rows = _rows(graph)
    search = {
        "taus": taus, "metric": metric.__name__, "graph": graph.kind, "n_edges": len(everything), "seed": seed,
        "ablation": ablation.label(), "weights and prompts": fingerprint(graph.model, data),
    }  # fmt: skip
    first, branches = _resume(state, search, branches)
    tried = sum(map(len, rows[:first]))
    progress = tqdm(desc="acdc", unit=" edges", total=len(everything), initial=tried, disable=None)
    for done, row in enumerate(rows[first:], first + 1):
        branches = [part for branch in branches for part in _visit(graph, prompts, metric, branch, row)]
        progress.update(len(row))
        if state:
            write_json(state, {"search": search, "rows": done, "branches": [_packed(branch) for branch in branches]})
    progress.close()
    return branches


def _visit(graph: EdgeGraph, prompts: Sequence[Batch], metric: Metric, branch: Branch, row: list[int]) -> list[Branch]:
    """Try to cut each edge into one target; a branch becomes several where thresholds part."""
    connected = flat(graph, graph.connected(unflat(graph, branch.kept)))
    if not connected[row].any():
        kept = branch.kept.clone()
        kept[row] = False
        return [Branch(branch.taus, kept, branch.value)]
    branches = [branch]
    for edge in row:
        branches = [part for b in branches for part in _try(graph, prompts, metric, b, edge)]
    return branches


def _try(graph: EdgeGraph, prompts: Sequence[Batch], metric: Metric, branch: Branch, edge: int) -> list[Branch]:
    fewer = branch.kept.clone()
    fewer[edge] = False
    value = mean_metric(graph, prompts, unflat(graph, fewer), metric)
    cut = [tau for tau in branch.taus if branch.value - value < tau]
    kept = [tau for tau in branch.taus if tau not in cut]
    parts = [Branch(cut, fewer, value), Branch(kept, branch.kept, branch.value)]
    return [part for part in parts if part.taus]


def _rows(graph: EdgeGraph) -> list[list[int]]:
    """For each target in reverse topological order its edges, those of later sources first; numbers as in `flat`."""
    rows, n = [], 0
    for there in graph.edges.values():
        for target in there:
            count = int(target.sum())
            rows.append(list(range(n + count - 1, n - 1, -1)))
            n += count
    return rows[::-1]


def _announce(graph: EdgeGraph, n_edges: int, seconds: float) -> None:
    if n_edges * seconds > LONG:
        hours = n_edges * seconds / 3600
        log.warning("acdc runs the prompts once for each of %d edges of the %s graph: %.1f hours at least; another "
                    "method ranks them in minutes", n_edges, graph.kind, hours)  # fmt: skip


def _packed(branch: Branch) -> dict[str, object]:
    kept = np.packbits(branch.kept.cpu().numpy()).tobytes().hex()
    return {"taus": branch.taus, "kept": kept, "value": branch.value}


def _resume(state: Path | None, search: dict[str, object], start: list[Branch]) -> tuple[int, list[Branch]]:
    """How many targets a saved search has visited, and its branches; none and `start` where there is no file."""
    if state is None or not state.exists():
        return 0, start
    try:
        saved = json.loads(state.read_text())
        found, done, packed = (saved[key] for key in ("search", "rows", "branches"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{state} must hold a saved search, got: {error!r}; delete it to start anew") from None
    if found != search:
        other = ", ".join(f"{k} {found.get(k)!r} for {v!r}" for k, v in search.items() if found.get(k) != v)
        raise ConfigError(
            f"{state} must hold a search with the same settings, got {other}; delete it or name another file"
        )
    like = start[0].kept
    branches = []
    for branch in packed:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(branch["kept"]), np.uint8), count=len(like))
        kept = torch.from_numpy(bits.astype(bool)).to(like.device)
        branches.append(Branch(branch["taus"], kept, branch["value"]))
    log.info("acdc goes on from %s, %d targets done", state, done)
    return done, branches
