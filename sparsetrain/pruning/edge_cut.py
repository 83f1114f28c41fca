"""From a ranking of edges to the smallest edge set found that reaches a target."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from sparsetrain.pruning.edges import EdgeGraph, EdgeSet, flat, n_edges, top_edges, unflat

Loss = Callable[[EdgeSet], float]  # less is better


@dataclass(frozen=True)
class EdgeCut:
    """An edge set, its loss, whether that is at most the target, and how many sets were evaluated to find it."""

    edges: EdgeSet
    loss: float
    reached: bool
    n_evaluations: int = 0


def smallest(graph: EdgeGraph, scores: EdgeSet, loss: Loss, target: float, clean_evaluations: int = 2000) -> EdgeCut:
    """Cut a ranking at the size that just reaches the target, then drop every edge that the target does not need.

    Args:
        graph: of the edges.
        scores: for each edge, greater where it matters more.
        loss: of an edge set; no number (NaN) reaches no target.
        target: the loss that is to be reached.
        clean_evaluations: how many sets may be evaluated to drop edges one by one; 0 leaves the ranking's own set.

    Returns:
        The smallest set found. Where nothing reaches the target, the best size tried. Where no edge is needed, the set
        without edges, reached.
    """
    count = _Counted(loss, target)
    order = flat(graph, scores).argsort(descending=True, stable=True)
    cut = bisect(lambda n: count(top_edges(graph, scores, n)), len(order))
    if cut.reached:
        cut = clean(graph, cut, order.flip(0), count, clean_evaluations)
        tidy = graph.connected(cut.edges)
        if n_edges(tidy) < n_edges(cut.edges) and (tried := count(tidy)).reached:
            cut = tried
    return EdgeCut(cut.edges, cut.loss, cut.reached, count.n)


def bisect(cut: Callable[[int], EdgeCut], n_all: int) -> EdgeCut:
    """The smallest size that reaches the target, or the best tried: sizes are doubled, then halved into.

    The loss need not be monotone in the size, so a smaller one may reach it too.
    """
    best = cut(0)
    low, high = 0, 0
    for high in [*(2**i for i in range(n_all.bit_length()) if 2**i < n_all), n_all]:
        if best.reached:
            break
        tried = cut(high)
        best = tried if tried.reached or not best.loss <= tried.loss else best
        low = low if tried.reached else high
    high = n_edges(best.edges)
    while best.reached and high - low > 1:
        middle = (low + high) // 2
        tried = cut(middle)
        if tried.reached:
            best, high = tried, middle
        else:
            low = middle
    return best


def clean(graph: EdgeGraph, cut: EdgeCut, order: Tensor, loss: "_Counted", most: int) -> EdgeCut:
    """Drop edges while the target holds, until none can go alone or `most` sets were evaluated.

    Edges are tried in `order`, half of them at once, then half of what did not go, down to single ones; a set with
    few edges to drop, or few to keep, takes few evaluations.
    """
    stop = loss.n + most
    before = -1
    while n_edges(cut.edges) not in (0, before):
        before = n_edges(cut.edges)
        kept = flat(graph, cut.edges)
        progress = tqdm(desc="cleaning", unit=" edges", total=before, disable=None)
        waiting = [order[kept[order]]]
        while waiting and loss.n < stop:
            chunk = waiting.pop()
            fewer = flat(graph, cut.edges)
            fewer[chunk] = False
            tried = loss(unflat(graph, fewer))
            if tried.reached:
                cut = tried
            elif len(chunk) > 1:
                waiting += reversed(chunk.tensor_split(2))
                continue
            progress.update(len(chunk))
        progress.close()
    return cut


class _Counted:
    """A loss as an EdgeCut, and how often it was asked for."""

    def __init__(self, loss: Loss, target: float):
        self.loss, self.target, self.n = loss, target, 0

    def __call__(self, edges: EdgeSet) -> EdgeCut:
        self.n += 1
        value = self.loss(edges)
        return EdgeCut(edges, math.inf if math.isnan(value) else value, value <= self.target)
