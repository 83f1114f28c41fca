"""Move nodes to where their wires are short: swaps within classes, of channels and of whole heads."""

from collections.abc import Iterator

import numpy as np

from sparsetrain.locality.cost import Cost, total_cost
from sparsetrain.locality.edges import Edges
from sparsetrain.locality.fiedler import fiedler_layout
from sparsetrain.locality.positions import Layout

TOLERANCE = 1e-9  # gains that rounding could make up are no gains; weights are about 1
ALL_PAIRS = 64  # blocks this small have all their pairs tried
FALL = 1.3  # of strides, where not all are tried
ENOUGH = 1e-3  # gain of a sweep, as a share of the cost, below which there is no further one
N_SWEEPS = 30


def relayout(edges: Edges, layout: Layout, seed: int, fresh: bool = False) -> Layout:
    """A layout with short wires: sweeps from the one given, or from the Fiedler order, until they gain little.

    The cost never rises, unless `fresh`. The same arguments give the same layout, bit for bit.

    Args:
        edges: of the model, see `edges_of`.
        layout: where the nodes are now.
        seed: of Lanczos' start and of the distances that swaps are tried at.
        fresh: forget where the nodes are now, but for classes that do not move.
    """
    if fresh:
        layout = fiedler_layout(edges, layout, seed)
    rng = np.random.default_rng(seed)
    cost = total_cost(edges, layout)
    for _ in range(N_SWEEPS):
        layout = sweep(edges, layout, rng)
        before, cost = cost, total_cost(edges, layout)
        if before - cost <= ENOUGH * before:
            break
    return layout


def sweep(edges: Edges, layout: Layout, rng: np.random.Generator) -> Layout:
    """Try swaps in every class that moves, then of every two heads at some distances; no swap is taken at a loss.

    Source: Liu et al. 2023 (BIMT), the swaps.
    Differs: all nodes take part, not those of greatest weight alone; pairs are formed by distance (see `_pairs`), so
        that all that gain are swapped at once; what a swap gains comes from `Cost`, not from the cost of the model.
    """
    heads: dict[str, list[str]] = {}
    for name, c in layout.plan.classes.items():
        if c.moves:
            layout = layout.replace({name: _swap_nodes(Cost(name, edges, layout), layout, name, rng)})
            if c.block:
                heads.setdefault(c.heads, []).append(name)
    for names in heads.values():
        layout = layout.replace(_swap_heads(edges, layout, names, rng))
    return layout


def _swap_nodes(cost: Cost, layout: Layout, name: str, rng: np.random.Generator) -> np.ndarray:
    """The slots of a class's nodes after swaps within it, within heads where it has heads."""
    c, places = layout.plan.classes[name], layout.plan.slots(name)
    node_at = layout.order(name)
    now = cost.at(node_at, places)  # of the node at each slot
    for left, right in _pairs(c.n, c.block or c.n, rng):
        a, b = node_at[left], node_at[right]
        a_right, b_left = cost.at(a, places[right]), cost.at(b, places[left])
        better = now[left] + now[right] - a_right - b_left > TOLERANCE
        left, right = left[better], right[better]
        node_at[left], node_at[right] = b[better], a[better]
        now[left], now[right] = b_left[better], a_right[better]
    return np.argsort(node_at)


def _swap_heads(edges: Edges, layout: Layout, names: list[str], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The slots of all classes of some heads after swaps of whole heads, channels keeping their place within."""
    plan = layout.plan
    costs = {name: Cost(name, edges, layout) for name in names}
    node_at = {name: layout.order(name).reshape(-1, plan.classes[name].block) for name in names}
    n = len(node_at[names[0]])
    for left, right in _pairs(n, n, rng):
        gain = sum(
            _block_cost(costs[name], layout, name, node_at[name][one], here)
            - _block_cost(costs[name], layout, name, node_at[name][one], there)
            for name in names
            for one, here, there in ((left, left, right), (right, right, left))
        )
        better = gain > TOLERANCE
        left, right = left[better], right[better]
        for at in node_at.values():
            at[left], at[right] = at[right], at[left]
    return {name: np.argsort(at.ravel()) for name, at in node_at.items()}


def _block_cost(cost: Cost, layout: Layout, name: str, nodes: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """What the nodes (N, block) of heads cost in these blocks of slots (N,): (N,)."""
    places = layout.plan.slots(name).reshape(-1, nodes.shape[1], layout.plan.sheet)[blocks]
    return cost.at(nodes.ravel(), places.reshape(-1, layout.plan.sheet)).reshape(nodes.shape).sum(1)


def _pairs(n: int, block: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of slots at falling distances within blocks; those that come at once have no slot in common.

    Each distance comes twice: pairs (i, i + stride) where i // stride is even, then where it is odd, as in a sorting
    network. That is O(n log n) pairs, and all n^2 / 2 of a small block.
    """
    within = np.arange(n) % block
    for stride in _strides(block, rng):
        for odd in (0, 1):
            left = np.flatnonzero((within // stride % 2 == odd) & (within + stride < block))
            if len(left):
                yield left, left + stride


def _strides(block: int, rng: np.random.Generator) -> list[int]:
    """Distances from the greatest to 1, drawn anew each time about a geometric series."""
    if block <= ALL_PAIRS:
        return list(range(block - 1, 0, -1))
    n = int(np.log(block / 2) / np.log(FALL)) + 1
    drawn = block / 2 / FALL ** np.arange(n) * rng.uniform(FALL**-0.5, FALL**0.5, n)
    return [*np.maximum(drawn, 1).astype(int).tolist(), 1]
