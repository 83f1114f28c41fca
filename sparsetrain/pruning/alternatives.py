"""Redundancy: all the minimal circuits that do the same, so that an OR of two branches is not told as one of them."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrain.pruning.edges import Batch, EdgeGraph, EdgeSet, flat, mean_metric, unflat
from sparsetrain.pruning.objective import Metric


@dataclass(frozen=True)
class Alternatives:
    """Circuits each of which is enough, and no smaller part of which is.

    Attributes:
        circuits: the alternatives; one where nothing is redundant, none where the limit came before the first.
        needed: the edges in all of them.
        complete: false where the search was stopped by its limit, so that there may be more.
    """

    circuits: list[EdgeSet]
    needed: EdgeSet
    complete: bool


def alternatives(
    graph: EdgeGraph, prompts: Sequence[Batch], metric: Metric, edges: EdgeSet, tolerance: float, most_runs: int = 2000
) -> Alternatives:
    """Find the minimal circuits among some edges.

    A minimal circuit is found by cutting ever smaller parts of the edges while the metric holds. Then each of its edges
    is forbidden in turn: where the rest is still enough, it holds another one.

    Args:
        graph: either graph.
        prompts: see `batches`.
        metric: what must hold.
        edges: where to look: the whole graph, or the first so many edges of a ranking.
        tolerance: how far the metric may fall below that of `edges`.
        most_runs: runs of all prompts after which the search stops; what it was shrinking then is left out.

    Source: enumeration of hitting sets, Reiter 1987; shrinking by halves, Junker 2004.
    """
    start = flat(graph, edges)
    target = mean_metric(graph, prompts, edges, metric) - tolerance
    n_runs = 0

    def enough(kept: Tensor) -> bool:
        nonlocal n_runs
        n_runs += 1
        return mean_metric(graph, prompts, unflat(graph, kept), metric) >= target

    def go_on() -> bool:
        return n_runs < most_runs

    found: list[Tensor] = []
    queue, queued = deque([frozenset[int]()]), set[frozenset[int]]()
    while queue and go_on():
        forbidden = queue.popleft()
        circuit = next((c for c in found if not c[list(forbidden)].any()), None)
        if circuit is None:
            rest = start.clone()
            rest[list(forbidden)] = False
            if not enough(rest):
                continue
            circuit = _shrink(rest, enough, go_on)
            if circuit is None:
                queue.appendleft(forbidden)
                break
            found.append(circuit)
        more = {forbidden | {edge} for edge in circuit.nonzero().flatten().tolist()} - queued
        queue.extend(sorted(more, key=sorted))
        queued |= more
        n_runs += 1  # also where a circuit was known, lest the queue grow without end
    needed = torch.stack(found).all(0) if found else torch.zeros_like(start)
    return Alternatives([unflat(graph, circuit) for circuit in found], unflat(graph, needed), not queue)


def _shrink(kept: Tensor, enough: Callable[[Tensor], bool], go_on: Callable[[], bool]) -> Tensor | None:
    """Cut what can be cut, by halves, from the logits down; None if it was stopped."""
    parts = [kept.nonzero().flatten()]
    while parts:
        if not go_on():
            return None
        part = parts.pop()
        fewer = kept.clone()
        fewer[part] = False
        if enough(fewer):
            kept = fewer
        elif len(part) > 1:
            parts += part.chunk(2)
    return kept
