"""Newman's modularity of a model's graph, beside that of graphs with the same degrees."""

from collections.abc import Sequence
from typing import Any

import networkx
import numpy as np

from sparsetrain.locality.edges import Edges, numbered
from sparsetrain.locality.measures import shuffled
from sparsetrain.locality.positions import Layout, LocalityError, Plan


def modularity_measures(edges: Edges, layout: Layout, seeds: Sequence[int] = (0, 1, 2, 3, 4)) -> dict[str, Any]:
    """Newman's Q of the graph of |w| over all nodes, and of its null.

    Args:
        edges: of a model.
        layout: where the nodes lie; Q does not depend on it.
        seeds: of the shuffles of the null (see `shuffled`), two or more. Their first is that of the communities too.

    Returns:
        `q` and `n_communities` (of two nodes and more), as Louvain finds them; `null`, a list, Q of each shuffle;
        `z`, how many standard deviations of the null q lies above its mean (0 if the null does not vary); `spread`, the
        mean distance along each axis of the sheet between two nodes of a community, to that between any two nodes:
        near 0 if communities are places, near 1 if they have nothing to do with places.

    Raises:
        LocalityError: there are fewer than two seeds.

    Source: Newman 2006, *Modularity and community structure in networks*; Blondel et al. 2008 (Louvain).
    """
    if len(seeds) < 2:
        raise LocalityError(f"the null must have two seeds or more, got {len(seeds)}; z needs a deviation")
    q, communities = _louvain(edges, layout.plan, seeds[0])
    null = [_louvain(shuffled(edges, seed), layout.plan, seed)[0] for seed in seeds]
    deviation = float(np.std(null, ddof=1))
    return {
        "q": q,
        "n_communities": len(communities),
        "null": null,
        "z": (q - float(np.mean(null))) / deviation if deviation else 0.0,
        "spread": _spread(communities, layout),
    }


def _louvain(edges: Edges, plan: Plan, seed: int) -> tuple[float, list[list[int]]]:
    a, b, weights, n = numbered(edges, plan)
    ends = np.minimum(a, b) * n + np.maximum(a, b)
    pairs, of_each = np.unique(ends, return_inverse=True)  # q and k may both join two nodes, or a layer's two matrices
    summed = np.bincount(of_each, weights).tolist()
    graph = networkx.Graph()
    graph.add_weighted_edges_from(zip((pairs // n).tolist(), (pairs % n).tolist(), summed, strict=True))
    communities = networkx.community.louvain_communities(graph, seed=seed)
    found = networkx.community.modularity(graph, communities)
    return found, [sorted(nodes) for nodes in communities if len(nodes) > 1]


def _spread(communities: list[list[int]], layout: Layout) -> float:
    """Mean of |x - y| within communities, to that over all nodes that are in one."""
    places = np.concatenate([layout.coordinates(name) for name in layout.plan.classes])
    parts = [places[nodes] for nodes in communities]
    sizes = [len(part) for part in parts]
    whole = mean_pairwise(np.concatenate(parts))
    return float(np.average([mean_pairwise(p) for p in parts], weights=sizes)) / whole if whole else 1.0


def mean_pairwise(places: np.ndarray) -> float:
    """The mean distance along the axes of two different ones of these places (N, sheet); 0 for fewer than two."""
    n = len(places)
    if n < 2:
        return 0.0
    rank = 2 * np.arange(n) - n + 1  # how often a sorted place is the greater of two, less how often the smaller
    return float((rank @ np.sort(places, axis=0)).sum() / (n * (n - 1) / 2))
