"""How local a layout is, beside what random places and a model of the same degrees would give."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sparsetrain.locality.cost import total_cost
from sparsetrain.locality.edges import Edges, Piece
from sparsetrain.locality.positions import Layout, LocalityError, Plan
from sparsetrain.locality.relayout import relayout

LONG = (0.1, 0.25)  # lengths beyond which wires are counted
N_BINS = 20


def mean_length(edges: Edges, layout: Layout) -> float:
    """J = sum |w| d / sum |w|, with |w| as the pieces hold it: each matrix (each of q, k, v) scaled to mean 1."""
    return total_cost(edges, layout) / sum(float(piece.weights.sum()) for piece in edges)


def mean_count_length(edges: Edges, layout: Layout) -> float:
    """The mean length of the edges, all counted alike."""
    return mean_length([piece.counted() for piece in edges], layout)


def random_length(edges: Edges, plan: Plan) -> float:
    """What `mean_length` would be on average if all nodes had random places: about 1/3 for each axis of the sheet."""
    weights = [float(piece.weights.sum()) for piece in edges]
    lengths = [_mean_distance(plan.slots(p.row_class), plan.slots(p.column_class)) for p in edges]
    return float(np.average(lengths, weights=weights))


def _mean_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean distance of all pairs of places (N, sheet) and (M, sheet), in O((N + M) log M)."""
    total = 0.0
    for x, y in zip(a.T, np.sort(b, axis=0).T, strict=True):
        upto, sums = np.searchsorted(y, x), np.concatenate([[0], y.cumsum()])
        total += float(np.mean(x * (2 * upto - len(y)) + sums[-1] - 2 * sums[upto])) / len(y)
    return total


def shuffled(edges: Edges, seed: int) -> Edges:
    """Other edges between the same nodes: every node keeps its number of edges in every matrix.

    One end of each edge is drawn anew, without replacement, from those of its piece; the weight stays with the other
    end. A few edges may come to lie between the same two nodes.
    """
    rng = np.random.default_rng(seed)
    return [replace(piece, columns=rng.permutation(piece.columns)) for piece in edges]


def null_lengths(edges: Edges, layout: Layout, seeds: Sequence[int]) -> list[float]:
    """`mean_length` of shuffled edges, one shuffle for each seed, after they were laid out anew."""
    found = []
    for seed in seeds:
        other = shuffled(edges, seed)
        found.append(mean_length(other, relayout(other, layout, seed, fresh=True)))
    return found


def length_measures(edges: Edges, layout: Layout, seeds: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """The length of the wires with all that it takes to read it.

    Args:
        edges, layout: of a model.
        seeds: of the shuffles of the null, one or more.

    Returns:
        `length` and `count_length`, the mean by weight and by number; `random`, what random places give; `null`, a
        list, what a model with the same degrees gives after its own layout was found; `ratio`, length to the null's
        mean: 1 says that there is nothing local but the degrees; `longer`, the shares of |w| at lengths beyond 0.1 and
        0.25; `histogram`, shares of |w| at lengths in 20 equal bins of [0, dimension of the sheet].

    Raises:
        LocalityError: there are no seeds.
    """
    if not seeds:
        raise LocalityError("the null must have one seed or more, got none; a length alone says nothing")
    null, length = null_lengths(edges, layout, seeds), mean_length(edges, layout)
    lengths = np.concatenate([piece.lengths(layout) for piece in edges])
    weights = np.concatenate([piece.weights for piece in edges])
    weights = weights / weights.sum()
    return {
        "length": length,
        "count_length": mean_count_length(edges, layout),
        "random": random_length(edges, layout.plan),
        "null": null,
        "ratio": length / float(np.mean(null)),
        "longer": {limit: float(weights[lengths > limit].sum()) for limit in LONG},
        "histogram": np.histogram(lengths, N_BINS, (0, layout.plan.sheet), weights=weights)[0].tolist(),
    }


def clusterability(edges: Edges, layout: Layout, k: int) -> float:
    """The share of w^2 that lies between nodes of the same of k runs of slots, equally long in each class.

    1/k is what random places give on average.

    Source: Golechha, Cope and Schoots 2024, *Training neural networks for modularity aids interpretability*.
    """
    inside = sum(
        float(piece.weights[_same_run(piece, layout, k)] @ piece.weights[_same_run(piece, layout, k)])
        for piece in edges
    )
    return inside / sum(float(piece.weights @ piece.weights) for piece in edges)


def block_fill(edges: Edges, layout: Layout, block: int, share: float) -> float:
    """The share of nonzeros that lie in the fullest tiles of the matrices, whose rows and columns are put in the
    order of their slots; what a product that skips empty tiles would have.

    Args:
        edges, layout: of a model; `identity` gives the matrices as they are.
        block: rows and columns of a tile.
        share: of all tiles, that are taken; in (0, 1].
    """
    counts, n_tiles = [], 0
    for piece in edges:
        rows, columns = layout.slots[piece.row_class], layout.slots[piece.column_class]
        n_across = math.ceil(len(columns) / block)
        tiles = rows[piece.rows] // block * n_across + columns[piece.columns] // block
        counts.append(np.unique(tiles, return_counts=True)[1])
        n_tiles += math.ceil(len(rows) / block) * n_across
    fullest = np.sort(np.concatenate(counts))[::-1][: math.ceil(share * n_tiles)]
    return float(fullest.sum() / sum(len(piece) for piece in edges))


def _same_run(piece: Piece, layout: Layout, k: int) -> np.ndarray:
    ends = [
        layout.slots[name][nodes] * k // len(layout.slots[name])
        for name, nodes in ((piece.row_class, piece.rows), (piece.column_class, piece.columns))
    ]
    return ends[0] == ends[1]
