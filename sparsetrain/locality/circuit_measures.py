"""How local a circuit is: its share of the wiring, and how near its nodes are to each other.

Circuits of the channel graph: node sets are masks by site, edges are named by "site:channel" at both ends.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor

from sparsetrain.locality.edges import Edges, Piece
from sparsetrain.locality.modularity import mean_pairwise
from sparsetrain.locality.positions import Layout, LocalityError

Nodes = dict[str, np.ndarray]  # indices of nodes, ascending, by class

CLASS_OF_SITE = {"q": "qk", "k": "qk", "v": "v", "z": "v", "mlp_act": "mlp"}
MATRIX_OF_TARGET = {"q": ("attn.qkv.weight", 0), "k": ("attn.qkv.weight", 1), "v": ("attn.qkv.weight", 2),
                    "attn_out": ("attn.out.weight", 0), "mlp_act": ("mlp.up.weight", 0),
                    "mlp_out": ("mlp.out.weight", 0)}  # fmt: skip
N_STRATA = 10  # of nodes by degree, within which random node sets are drawn
WINDOW = 0.1  # of each axis


def nodes_by_class(masks: Mapping[str, Tensor], layout: Layout) -> Nodes:
    """The nodes that a circuit has in each class; a residual channel counts once, at whatever sites it is used.

    Raises:
        LocalityError: a site is none of a transformer's, or a channel none of the layout's, as in the component graph.
    """
    found: dict[str, set[int]] = {}
    for site, mask in masks.items():
        for channel in mask.nonzero().flatten().tolist():
            name, i = node_at(site, channel, layout)
            found.setdefault(name, set()).add(i)
    return {name: np.array(sorted(found[name])) for name in layout.plan.classes if name in found}


def node_at(site: str, channel: int, layout: Layout) -> tuple[str, int]:
    """The class that a channel at a site belongs to, and which of its nodes it is; raises LocalityError for none."""
    at, _, kind = site.rpartition(".")
    classes, i = layout.plan.classes, channel
    name = f"{at}.{CLASS_OF_SITE[kind]}" if kind in CLASS_OF_SITE else "residual"
    if kind in ("attn_in", "mlp_in") and i >= classes[name].n:
        name, i = "positions", i - classes[name].n
    if kind in ("heads", "mlp", "logits") or name not in classes or i >= classes[name].n:
        raise LocalityError(f"a node must be a channel of the layout's model, got {site}:{channel}; prune channels")
    return name, i


def wiring_measures(circuit_edges: Iterable[tuple[str, str]], edges: Edges, layout: Layout) -> dict[str, float]:
    """How much of the wiring between blocks' nodes a circuit takes.

    Args:
        circuit_edges: source and target of each of its edges, "site:channel".
        edges, layout: of the model; the embedding and the unembedding are left out, which circuits do not cut.

    Returns:
        `wire_share`, its part of sum |w| d; `weight_share`, of sum |w|; `edge_share`, of the number of edges; `length`
        and `model_length`, the mean length of its edges and of all, by weight. Shares that are alike say that the
        circuit's wires are as long as any.

    Raises:
        LocalityError: an edge is no nonzero weight of the model, or there are none.
    """
    wanted = _by_part(circuit_edges, layout)
    pieces = [
        (p, _inside(p, wanted.get((p.matrix, p.part), []), layout)) for p in edges if p.matrix.startswith("blocks.")
    ]
    n_wanted, n_found = sum(map(len, wanted.values())), sum(int(inside.sum()) for _, inside in pieces)
    if not n_wanted or n_wanted != n_found:
        raise LocalityError(
            f"a circuit's edges must be nonzero weights of the model, got {n_wanted} of which {n_found} are; "
            "measure it on the run it was found in"
        )
    n, weight, wire = (sum(x) for x in zip(*(_sums(p, np.ones(len(p), bool), layout) for p, _ in pieces), strict=True))
    n_in, weight_in, wire_in = (sum(x) for x in zip(*(_sums(p, inside, layout) for p, inside in pieces), strict=True))
    return {
        "wire_share": wire_in / wire,
        "weight_share": weight_in / weight,
        "edge_share": n_in / n,
        "length": wire_in / weight_in,
        "model_length": wire / weight,
    }


def spread_measures(nodes: Nodes, edges: Edges, layout: Layout, seed: int, n_draws: int = 200) -> dict[str, float]:
    """How near a circuit's nodes are to each other, beside random nodes of the same classes and about the same degrees.

    Degrees matter, since a layout puts well joined nodes in the middle.

    Args:
        nodes: of a circuit, see `nodes_by_class`.
        edges, layout: of the model.
        seed: of the random node sets.
        n_draws: how many of them.

    Returns:
        `distance`, the mean over all pairs of nodes; `span`, the greatest less the least coordinate, a mean over the
        classes with two nodes or more and over the axes; `window`, the greatest share of nodes within a tenth of an
        axis, a mean over the axes; for each the mean of the random sets as `random_...`; `z`, how many standard
        deviations of theirs the distance lies below their mean.
    """
    ours = _spread(nodes, layout)
    strata, rng = _strata(edges, layout), np.random.default_rng(seed)
    drawn = np.array([_spread(_alike(nodes, strata, rng), layout) for _ in range(n_draws)])
    names, mean, deviation = ("distance", "span", "window"), drawn.mean(0), drawn.std(0)[0]
    found = dict(zip(names, ours, strict=True)) | {f"random_{n}": float(m) for n, m in zip(names, mean, strict=True)}
    return found | {"z": float((mean[0] - ours[0]) / deviation) if deviation else 0.0}


def overlap_measures(
    a: Nodes, b: Nodes, edges: Edges, layout: Layout, seed: int, n_draws: int = 200
) -> dict[str, float]:
    """How far two circuits lie in the same places, whether or not they have nodes in common.

    Args:
        a, b: nodes of two circuits of one model.
        edges, layout, seed, n_draws: see `spread_measures`.

    Returns:
        `overlap`, the sum over cells of a tenth of each axis of the smaller of the two shares of nodes, in [0, 1];
        `random_overlap`, its mean for random node sets like the two; `shared`, the share of common nodes (intersection
        over union).
    """
    strata, rng = _strata(edges, layout), np.random.default_rng(seed)
    drawn = [_overlap(_alike(a, strata, rng), _alike(b, strata, rng), layout) for _ in range(n_draws)]
    sets = [{(name, i) for name, found in nodes.items() for i in found.tolist()} for nodes in (a, b)]
    return {
        "overlap": _overlap(a, b, layout),
        "random_overlap": float(np.mean(drawn)),
        "shared": len(sets[0] & sets[1]) / max(1, len(sets[0] | sets[1])),
    }


def _by_part(circuit_edges: Iterable[tuple[str, str]], layout: Layout) -> dict[tuple[str, int], list[tuple]]:
    """The edges as (row, class of the column, column), by matrix and part."""
    found: dict[tuple[str, int], list[tuple]] = {}
    for source, target in circuit_edges:
        (source_site, j), (site, i) = _parsed(source), _parsed(target)
        at, _, kind = site.rpartition(".")
        if kind not in MATRIX_OF_TARGET:
            raise LocalityError(f"an edge must end at a channel of {', '.join(MATRIX_OF_TARGET)}, got {target}")
        matrix, part = MATRIX_OF_TARGET[kind]
        found.setdefault((f"{at}.{matrix}", part), []).append(
            (node_at(site, i, layout)[1], *node_at(source_site, j, layout))
        )
    return found


def _parsed(name: str) -> tuple[str, int]:
    site, _, channel = name.rpartition(":")
    if not channel.isdigit():
        raise LocalityError(f'a node must be named "site:channel", got {name!r}; prune channels')
    return site, int(channel)


def _inside(piece: Piece, wanted: list[tuple], layout: Layout) -> np.ndarray:
    """Which edges of a piece are wanted: (E,) bool."""
    n = layout.plan.classes[piece.column_class].n
    keys = [row * n + column for row, name, column in wanted if name == piece.column_class]
    return np.isin(piece.rows * n + piece.columns, keys)


def _sums(piece: Piece, inside: np.ndarray, layout: Layout) -> tuple[int, float, float]:
    """Number, weight, and weight times length of some edges of a piece."""
    weights = piece.weights[inside]
    return len(weights), float(weights.sum()), float(weights @ piece.lengths(layout)[inside])


def _strata(edges: Edges, layout: Layout) -> dict[str, np.ndarray]:
    """The nodes of each class by the sum of their |w|, in strata: (n,) from 0 to N_STRATA - 1."""
    degrees = {name: np.zeros(c.n) for name, c in layout.plan.classes.items()}
    for p in edges:
        for name, ends in ((p.row_class, p.rows), (p.column_class, p.columns)):
            degrees[name] += np.bincount(ends, p.weights, len(degrees[name]))
    return {name: np.argsort(np.argsort(d, kind="stable")) * N_STRATA // len(d) for name, d in degrees.items()}


def _alike(nodes: Nodes, strata: Mapping[str, np.ndarray], rng: np.random.Generator) -> Nodes:
    """Random nodes, as many of each class and stratum."""
    return {
        name: np.concatenate([
            rng.choice(np.flatnonzero(strata[name] == s), n, replace=False)
            for s, n in enumerate(np.bincount(strata[name][indices])) if n
        ])
        for name, indices in nodes.items()
    }  # fmt: skip


def _places(nodes: Nodes, layout: Layout) -> list[np.ndarray]:
    return [layout.coordinates(name)[indices] for name, indices in nodes.items()]


def _spread(nodes: Nodes, layout: Layout) -> tuple[float, float, float]:
    """Distance, span and window, see `spread_measures`."""
    by_class = _places(nodes, layout)
    spans = [np.ptp(places, axis=0).mean() for places in by_class if len(places) > 1]
    together = np.sort(np.concatenate(by_class), axis=0)
    n_within = [np.searchsorted(x, x + WINDOW, side="right") - np.arange(len(x)) for x in together.T]
    window = np.mean([n.max() for n in n_within]) / len(together)
    return mean_pairwise(together), float(np.mean(spans)) if spans else 0.0, float(window)


def _overlap(a: Nodes, b: Nodes, layout: Layout) -> float:
    shares = []
    for nodes in (a, b):
        places = np.concatenate(_places(nodes, layout))
        counts = np.histogramdd(places, round(1 / WINDOW), [(0, 1)] * layout.plan.sheet)[0]
        shares.append(counts / len(places))
    return float(np.minimum(*shares).sum())
