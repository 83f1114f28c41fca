"""How good a ranking or a circuit is: faithfulness by size, and beside known circuits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsetrain.pruning.edges import Batch, EdgeGraph, EdgeSet, flat, mean_metric, n_edges, top_edges
from sparsetrain.pruning.objective import Metric

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Curve:
    """Faithfulness by circuit size.

    Attributes:
        shares: of the graph's edges that the circuits are cut at.
        sizes: how many edges the circuits have, without those on no path.
        faithfulness: of each circuit: 0 as with no edge, 1 as the full model; it may leave [0, 1].
    """

    shares: tuple[float, ...]
    sizes: tuple[int, ...]
    faithfulness: tuple[float, ...]

    @property
    def area(self) -> float:
        """Trapezoid area under the curve: with signed scores the circuit performance ratio (CPR) of MIB.

        It runs over the shares as they are, from the first to the last, so its best is 0.999 unless a circuit
        overshoots the full model, which raises it.

        Source: Mueller et al. 2025.
        """
        return _trapezoid(self.shares, self.faithfulness)

    @property
    def distance(self) -> float:
        """Trapezoid area of |1 - faithfulness|: with absolute scores the circuit-model distance (CMD) of MIB."""
        return _trapezoid(self.shares, [abs(1 - f) for f in self.faithfulness])


def curve(
    graph: EdgeGraph,
    prompts: Sequence[Batch],
    scores: EdgeSet,
    metric: Metric,
    shares: Sequence[float] = SHARES,
    choose: Callable[[EdgeSet, int], EdgeSet] | None = None,
) -> Curve:
    """Cut a ranking at several sizes: f_k = (m(C_k) - m(empty)) / (m(full) - m(empty)).

    Args:
        graph: either graph.
        prompts: held-out prompts; see `batches`.
        scores: greater is kept first; take the absolute value for the distance.
        metric: m; MIB's is the logit difference.
        shares: of the edges, ascending, in (0, 1].
        choose: the n edges that scores put first; None: the n of greatest score.

    Raises:
        ValueError: the metric of the full model is that without any edge.

    MIB's evaluation grows some circuits from the logits: `choose` may do so (`attribution.grow`). Edges on no path are
    dropped.
    """
    nothing = {group: torch.zeros_like(there) for group, there in graph.edges.items()}
    empty, full = (mean_metric(graph, prompts, edges, metric) for edges in (nothing, graph.edges))
    if full == empty:
        raise ValueError(
            f"the metric must tell the full model from one without edges, got {full} for both; "
            "take another metric or ablation"
        )
    total, choose = n_edges(graph.edges), choose or partial(top_edges, graph)
    circuits = [graph.connected(choose(scores, int(share * total))) for share in shares]
    values = [mean_metric(graph, prompts, circuit, metric) for circuit in circuits]
    return Curve(
        tuple(shares), tuple(map(n_edges, circuits)), tuple((value - empty) / (full - empty) for value in values)
    )


def auroc(graph: EdgeGraph, scores: EdgeSet, known: EdgeSet) -> float:
    """The chance that an edge of the known circuit scores higher than one outside it; ties count half.

    Raises:
        ValueError: every edge is in the known circuit, or none is.
    """
    value, label = flat(graph, scores).double().cpu(), flat(graph, known).cpu()
    n = int(label.sum())
    if n in (0, len(label)):
        raise ValueError(f"AUROC needs edges inside and outside the known circuit, got {n} of {len(label)} inside")
    below = torch.searchsorted(value[~label].sort().values, value[label].contiguous(), right=False)
    not_above = torch.searchsorted(value[~label].sort().values, value[label].contiguous(), right=True)
    return ((below + not_above).double().mean() / (2 * (len(label) - n))).item()


def compare(graph: EdgeGraph, found: EdgeSet, known: EdgeSet) -> dict[str, float]:
    """Precision and recall of a circuit, `exact` (1 where it is the known one), and `overlap`, the IoU of the two."""
    ours, theirs = flat(graph, found), flat(graph, known)
    both = int((ours & theirs).sum())
    return {
        "precision": both / max(1, int(ours.sum())),
        "recall": both / max(1, int(theirs.sum())),
        "exact": float(torch.equal(ours, theirs)),
        "overlap": both / max(1, int((ours | theirs).sum())),
    }


def _trapezoid(x: Sequence[float], y: Sequence[float] | Tensor) -> float:
    return sum((b - a) * (u + v) / 2 for a, b, u, v in zip(x, x[1:], y, y[1:], strict=False))
