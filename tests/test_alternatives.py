"""Redundant branches are told as alternatives."""

import pytest

from sparsetrain.bench.made_circuits import gate, gate_data
from sparsetrain.pruning import edges, objective
from sparsetrain.pruning.ablation import build_ablation
from sparsetrain.pruning.alternatives import alternatives
from sparsetrain.pruning.component_graph import ComponentGraph

BRANCHES = [{("tokens", f"a0.h{h}<v>"), (f"a0.h{h}", "m0"), ("m0", "logits")} for h in range(2)]


def search(name, **options):
    graph, data = ComponentGraph(gate(name), split_embedding=True), gate_data(name)
    prompts = list(edges.batches(graph, data, build_ablation(graph.read, "corrupted", [], data)))
    found = alternatives(graph, prompts, objective.logit_difference, graph.edges, 1e-3, **options)
    names = [set(edges.edge_names(graph, circuit)) for circuit in found.circuits]
    return names, set(edges.edge_names(graph, found.needed)), found.complete


def test_an_or_has_two_minimal_circuits_with_five_edges_in_all():
    circuits, needed, complete = search("or")
    assert len(circuits) == 2
    assert all(branch in circuits for branch in BRANCHES)
    assert len(set.union(*circuits)) == 5
    assert needed == {("m0", "logits")}
    assert complete


@pytest.mark.parametrize("name", ["and", "add"])
def test_an_and_and_a_sum_have_one(name):
    circuits, needed, complete = search(name)
    assert circuits == [set.union(*BRANCHES)]
    assert needed == circuits[0]
    assert complete


def test_the_search_stops_at_its_limit():
    circuits, _, complete = search("or", most_runs=1)
    assert len(circuits) == 1
    assert not complete
