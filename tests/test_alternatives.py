"""Redundant branches are told as alternatives."""

import pytest

from sparsetrain.bench import made_circuits
from sparsetrain.bench.known_circuits import named_edges
from sparsetrain.bench.made_circuits import gate, gate_data
from sparsetrain.prune_config import PruneConfig
from sparsetrain.pruning import alternatives as module
from sparsetrain.pruning import edges, objective
from sparsetrain.pruning.ablation import build_ablation
from sparsetrain.pruning.alternatives import alternatives
from sparsetrain.pruning.channel_edges import ChannelGraph
from sparsetrain.pruning.component_graph import ComponentGraph
from sparsetrain.pruning.cut import Cut, Problem
from sparsetrain.pruning.prune import look_for_alternatives
from sparsetrain.pruning.space import EdgeSpace

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
    circuits, needed, complete = search("or", most_runs=1)
    assert circuits == [] and needed == set(), "what is not minimal yet is not told as a circuit"
    assert not complete
    circuits, _, complete = search("or", most_runs=25)
    assert len(circuits) == 1 and circuits[0] in BRANCHES
    assert not complete


def test_the_stage_looks_for_circuits_that_do_as_well_calibrated():
    model, data = made_circuits.quote_model(), made_circuits.quote_data()
    model.unembed.weight.mul_(0.002)  # so little that uncalibrated it is all the same
    space = EdgeSpace(ChannelGraph(model))
    ablation = build_ablation(space.read, "corrupted", [], data)
    problem = Problem(space, data, ablation, PruneConfig(alternative_runs=1000))
    circuit = named_edges(space.of, made_circuits.QUOTE_CIRCUIT)
    loss, calibration = problem.score(circuit)
    found = look_for_alternatives(problem, Cut(circuit, loss, True, calibration=calibration), edges.as_gates(circuit))
    assert found.complete and found.circuits
    assert all(problem.score(other)[0] < loss + 0.06 < 0.5 for other in found.circuits)
    assert edges.n_edges(found.needed) >= 6


@pytest.mark.parametrize("most_runs", [1, 5, 20])
def test_shrinking_keeps_to_the_limit(most_runs, monkeypatch):
    runs = []
    counted = edges.mean_metric
    monkeypatch.setattr(module, "mean_metric", lambda *a: runs.append(1) or counted(*a))
    search("or", most_runs=most_runs)
    assert len(runs) <= 1 + most_runs, "the first run is that of the target"
