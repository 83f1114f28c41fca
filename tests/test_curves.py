"""Measures of rankings and circuits, against what is worked out by hand."""

import functools

import pytest
import torch

from sparsetrain.bench.known_circuits import named_edges
from sparsetrain.bench.made_circuits import gate, gate_data
from sparsetrain.pruning import attribution, curves, edges, objective
from sparsetrain.pruning.ablation import build_ablation
from sparsetrain.pruning.component_graph import ComponentGraph

CIRCUIT = [("tokens", "a0.h0<v>"), ("tokens", "a0.h1<v>"), ("a0.h0", "m0"), ("a0.h1", "m0"), ("m0", "logits")]


@pytest.fixture
def adder():
    """The sum of two heads: each branch carries half of the metric."""
    graph, data = ComponentGraph(gate("add"), split_embedding=True), gate_data("add")
    return graph, list(edges.batches(graph, data, build_ablation(graph.read, "corrupted", [], data)))


def in_order(graph, pairs):
    """Scores that put these edges first, in this order."""
    scores = torch.zeros(edges.n_edges(graph.edges))
    names = edges.edge_names(graph, graph.edges)
    for place, pair in enumerate(pairs):
        scores[names.index(pair)] = len(pairs) - place
    return edges.unflat(graph, scores)


def test_faithfulness_rises_by_half_with_each_branch_of_a_sum(adder):
    graph, prompts = adder
    n = edges.n_edges(graph.edges)
    order = [CIRCUIT[i] for i in (4, 0, 2, 1, 3)]  # the first branch is whole at three edges, the second at five
    sizes = [2, 3, 4, 5, n]
    found = curves.curve(
        graph, prompts, in_order(graph, order), objective.logit_difference, [s / n + 1e-9 for s in sizes]
    )
    assert found.sizes == (0, 3, 3, 5, n)
    torch.testing.assert_close(torch.tensor(found.faithfulness), torch.tensor([0, 0.5, 0.5, 1, 1]))
    assert found.area == pytest.approx((0.25 + 0.5 + 0.75 + (n - 5)) / n)
    assert found.distance == pytest.approx((0.75 + 0.5 + 0.25) / n)


def test_a_curve_cuts_its_ranking_as_it_is_told(adder):
    graph, prompts = adder
    upstream_first = in_order(graph, [CIRCUIT[i] for i in (1, 0, 2, 4)])
    shares = [3 / edges.n_edges(graph.edges) + 1e-9, 1.0]
    assert curves.curve(graph, prompts, upstream_first, objective.logit_difference, shares).sizes[0] == 0
    grow = functools.partial(attribution.grow, graph)
    grown = curves.curve(graph, prompts, upstream_first, objective.logit_difference, shares, grow)
    assert grown.sizes[0] == 3, "from the logits down, one branch is whole at three edges"


def test_a_curve_needs_a_metric_that_tells_full_from_empty(adder):
    graph, prompts = adder
    with pytest.raises(ValueError, match="must tell the full model from one without edges, got 0.0 for both"):
        curves.curve(graph, prompts, edges.like(graph, 1.0), lambda outputs, data, ends: outputs[:, 0] * 0)


def test_auroc_by_counting_pairs(adder):
    graph, _ = adder
    known = named_edges(graph, CIRCUIT)
    n = edges.n_edges(graph.edges)
    scores = torch.randint(6, (n,), generator=torch.Generator().manual_seed(0))
    label = edges.flat(graph, known)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[label].tolist() for b in scores[~label].tolist()]
    assert curves.auroc(graph, edges.unflat(graph, scores.float()), known) == pytest.approx(sum(pairs) / len(pairs))
    assert curves.auroc(graph, in_order(graph, CIRCUIT), known) == 1
    with pytest.raises(ValueError, match=f"inside and outside the known circuit, got {n} of {n} inside"):
        curves.auroc(graph, in_order(graph, CIRCUIT), graph.edges)


def test_circuits_are_compared(adder):
    graph, _ = adder
    known, three = named_edges(graph, CIRCUIT), named_edges(graph, [*CIRCUIT[:2], ("positions", "m0")])
    assert curves.compare(graph, three, known) == {"precision": 2 / 3, "recall": 2 / 5, "exact": 0, "overlap": 2 / 6}
    assert curves.compare(graph, known, known)["exact"] == 1
