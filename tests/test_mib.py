"""The JSON form of MIB, as `Graph.from_json` of EAP-IG reads it."""

import json

import pytest

from sparsetrain.bench.known_circuits import named_edges
from sparsetrain.bench.made_circuits import gate
from sparsetrain.pruning import edges
from sparsetrain.pruning.component_graph import ComponentGraph
from sparsetrain.pruning.mib import mib_json


def test_nodes_and_edges_are_named_and_marked():
    graph = ComponentGraph(gate("add"))
    circuit = named_edges(graph, [("input", "a0.h1<v>"), ("a0.h1", "m0"), ("m0", "logits")])
    scores = {group: 2.0 * there for group, there in graph.edges.items()}
    scores["logits"][0, 1] = -0.5
    written = json.loads(json.dumps(mib_json(graph, scores, circuit)))
    assert written["cfg"] == {"n_layers": 1, "n_heads": 3, "parallel_attn_mlp": False, "d_model": 6}
    inside = {"input": True, "a0.h0": False, "a0.h1": True, "a0.h2": False, "m0": True, "logits": True}
    assert written["nodes"] == {node: {"in_graph": there} for node, there in inside.items()}
    assert len(written["edges"]) == edges.n_edges(graph.edges) == 9 + 4 + 5
    assert written["edges"]["input->a0.h1<v>"] == {"score": 2.0, "in_graph": True}
    assert written["edges"]["a0.h0->logits"] == {"score": -0.5, "in_graph": False}


def test_a_split_embedding_is_refused():
    graph = ComponentGraph(gate("add"), split_embedding=True)
    with pytest.raises(ValueError, match="one input node, got a split embedding"):
        mib_json(graph, edges.like(graph, 0.0), graph.edges)
