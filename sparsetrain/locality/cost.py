"""What a node's wires would cost at any place, by prefix sums; see `Cost`."""

import numpy as np

from sparsetrain.locality.edges import Edges, Piece
from sparsetrain.locality.positions import Layout


class Cost:
    """The cost of a class's nodes as a function of place, while all other classes stay where they are.

    Node a, with wires of weight A_ab to nodes at x_b, costs sum_b A_ab |s - x_b| at s, axis by axis. With its wires
    sorted by x_b, L0 and L1 the sums of A_ab and of A_ab x_b over those with x_b <= s, and T0 and T1 over all of them,
    that is s (2 L0 - T0) + T1 - 2 L1. Wires that join two nodes of the class are not in it; a Plan has none.

    Building takes O(E log E) for the class's E wires, a place O(log E).
    """

    def __init__(self, name: str, edges: Edges, layout: Layout):
        n = layout.plan.classes[name].n
        nodes, places, weights = _wires(name, edges, layout)
        # one search finds both a node's wires and, among these, those up to a place: places lie in (0, 1)
        self._axes = [_Axis(nodes, x, weights, n) for x in places.T]

    def at(self, nodes: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The cost of each of these nodes (N,) int64 at its place (N, sheet): (N,) float64."""
        return sum(axis.at(nodes, x) for axis, x in zip(self._axes, places.T, strict=True))

    def table(self, slots: np.ndarray) -> np.ndarray:
        """C (n, S), the cost of every node at each of S places (S, sheet)."""
        n = len(self._axes[0].total)
        nodes = np.repeat(np.arange(n), len(slots))
        return self.at(nodes, np.tile(slots, (n, 1))).reshape(n, len(slots))


class _Axis:
    def __init__(self, nodes: np.ndarray, x: np.ndarray, weights: np.ndarray, n: int):
        keys = nodes + x
        order = np.argsort(keys, kind="stable")
        self.keys = keys[order]
        self.before = np.concatenate([[0], weights[order].cumsum()])
        self.moment_before = np.concatenate([[0], (weights * x)[order].cumsum()])
        first = np.searchsorted(self.keys, np.arange(n + 1))
        self.start, self.moment_start = self.before[first[:-1]], self.moment_before[first[:-1]]
        self.total, self.moment = np.diff(self.before[first]), np.diff(self.moment_before[first])

    def at(self, nodes: np.ndarray, x: np.ndarray) -> np.ndarray:
        upto = np.searchsorted(self.keys, nodes + x)
        below, moment_below = self.before[upto] - self.start[nodes], self.moment_before[upto] - self.moment_start[nodes]
        return x * (2 * below - self.total[nodes]) + self.moment[nodes] - 2 * moment_below


def total_cost(edges: Edges, layout: Layout) -> float:
    """The sum of |w| d over all edges, |w| as the pieces hold it."""
    return float(sum(piece.weights @ piece.lengths(layout) for piece in edges))


def _wires(name: str, edges: Edges, layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the class's wires the own node (E,), the place of the other end (E, sheet), and the weight (E,)."""
    found = [_seen_from(name, piece, layout) for piece in edges if name in (piece.row_class, piece.column_class)]
    if not found:
        return np.zeros(0, np.int64), np.zeros((0, layout.plan.sheet)), np.zeros(0)
    nodes, places, weights = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return nodes, places, weights


def _seen_from(name: str, piece: Piece, layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if piece.row_class == name:
        return piece.rows, layout.coordinates(piece.column_class)[piece.columns], piece.weights
    return piece.columns, layout.coordinates(piece.row_class)[piece.rows], piece.weights
