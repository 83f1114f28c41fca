"""A first layout from the spectrum of the whole graph."""

import numpy as np

from sparsetrain.locality.edges import Edges, numbered
from sparsetrain.locality.positions import Layout, NodeClass, Plan, row_lengths

N_STEPS = 80  # of Lanczos; on planted and trained graphs the order no longer changes from 40 to 60 on


def fiedler_layout(edges: Edges, layout: Layout, seed: int) -> Layout:
    """Sort the nodes of every class by the Fiedler vector of the graph of all |w|; on a square also by the next one.

    Heads are sorted by the mean of their channels. Classes that do not move stay as they are.

    Args:
        edges: of the whole graph.
        layout: where the classes that do not move lie.
        seed: of the vector that Lanczos starts from.

    Source: Fiedler 1973, and Hall 1970, *An r-dimensional quadratic placement algorithm*: of all unit vectors that are
        orthogonal to the constant one, the Laplacian's second eigenvector has the smallest sum of w (x_a - x_b)^2. Here
        of the normalised Laplacian, with the mean degree added to each degree (Qin and Rohe 2013), lest a few nodes
        that hardly anything is joined to are the cut.
    """
    plan = layout.plan
    vectors = smooth_vectors(edges, plan, plan.sheet, seed)
    by_heads: dict[str, list[np.ndarray]] = {}
    for name, c in plan.classes.items():
        if c.block:
            by_heads.setdefault(c.heads, []).append(_means(vectors[name], c.block))
    slots = {}
    for name, c in plan.classes.items():
        if c.moves:
            heads = np.mean(by_heads[c.heads], axis=0) if c.block else None
            slots[name] = _sorted(vectors[name], c, heads)
    return layout.replace(slots)


def smooth_vectors(edges: Edges, plan: Plan, n_vectors: int, seed: int) -> dict[str, np.ndarray]:
    """The smoothest vectors on the graph that are not constant: (n, n_vectors) for each class."""
    vectors = _leading(*numbered(edges, plan), n_vectors, seed)
    ends = np.cumsum([c.n for c in plan.classes.values()])
    return dict(zip(plan.classes, np.split(vectors, ends[:-1]), strict=True))


def _leading(a: np.ndarray, b: np.ndarray, weights: np.ndarray, n: int, n_vectors: int, seed: int) -> np.ndarray:
    """Eigenvectors (n, n_vectors) of the normalised adjacency matrix, after the one that is known, by Lanczos."""
    degrees = np.bincount(a, weights, n) + np.bincount(b, weights, n)
    degrees += degrees.mean()
    scale = degrees**-0.5
    weights = weights * scale[a] * scale[b]
    basis, diagonal, beside = np.empty((min(N_STEPS, n - 1) + 1, n)), [], []
    basis[0] = np.sqrt(degrees / degrees.sum())  # its eigenvector is a constant on the graph
    v = np.random.default_rng(seed).standard_normal(n)
    for step in range(1, len(basis)):
        for _ in range(2):  # once leaves a remainder by rounding
            v -= (basis[:step] @ v) @ basis[:step]
        beside.append(np.linalg.norm(v))
        if beside[-1] < 1e-10:  # nothing is left that the graph lets this start reach
            break
        basis[step] = v / beside[-1]
        v = np.bincount(a, weights * basis[step][b], n) + np.bincount(b, weights * basis[step][a], n)
        diagonal.append(basis[step] @ v)
    inner = beside[1 : len(diagonal)]
    _, small = np.linalg.eigh(np.diag(diagonal) + np.diag(inner, 1) + np.diag(inner, -1))
    leading = small[:, ::-1][:, :n_vectors]
    found = np.zeros((n, n_vectors))
    found[:, : leading.shape[1]] = (leading.T @ basis[1 : len(diagonal) + 1]).T
    return found * scale[:, None]


def _sorted(vectors: np.ndarray, c: NodeClass, heads: np.ndarray | None) -> np.ndarray:
    """The slot of each node of a class, by its vectors (n, sheet), and those of its heads."""
    if heads is None:
        return slots_by(vectors)
    within = np.stack([slots_by(v) for v in vectors.reshape(-1, c.block, vectors.shape[1])])
    return (slots_by(heads)[:, None] * c.block + within).ravel()


def slots_by(vectors: np.ndarray) -> np.ndarray:
    """The slot of each node by its vectors (n, sheet).

    On a line by the only vector; on a square the second one says the row, and within the row the first the place.
    """
    n, sheet = vectors.shape
    order = np.argsort(vectors[:, -1], kind="stable")
    if sheet == 2:
        lengths = row_lengths(n)
        row = np.repeat(np.arange(len(lengths)), lengths)
        order = order[np.lexsort((vectors[order, 0], row))]
    return np.argsort(order)


def _means(vectors: np.ndarray, block: int) -> np.ndarray:
    return vectors.reshape(-1, block, vectors.shape[1]).mean(1)
