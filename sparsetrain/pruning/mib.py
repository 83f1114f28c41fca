"""Circuits in the JSON form of the MIB benchmark, which `Graph.from_json` of hannamw/EAP-IG reads."""

from typing import Any

from sparsetrain.pruning.component_graph import ComponentGraph
from sparsetrain.pruning.edges import EdgeSet, edge_names, flat


def mib_json(graph: ComponentGraph, scores: EdgeSet, edges: EdgeSet) -> dict[str, Any]:
    """What MIB's evaluation reads of a ranking and a circuit; write it with `files.write_json`.

    Nodes are `input`, `a0.h0`, `m0` ... and `logits`, each with `in_graph`: whether an edge of the circuit begins there
    (always, of the logits). Edges are `input->a0.h0<q>` ... with `score` and `in_graph`.

    Args:
        graph: a component graph with one embedding.
        scores: of every edge, signed.
        edges: the circuit.

    Raises:
        ValueError: the embedding is split: MIB has one input node.
    """
    if graph.split_embedding:
        raise ValueError(
            "mib_json needs a graph with one input node, got a split embedding; rank the edges of a whole one"
        )
    names = [f"{source}->{target}" for source, target in edge_names(graph, graph.edges)]
    begins = {source for source, _ in edge_names(graph, edges)} | {"logits"}
    options = graph.model.options
    return {
        "cfg": {
            "n_layers": options.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": False,
            "d_model": options.d_model,
        },
        "nodes": {node: {"in_graph": node in begins} for node in [*graph.sources, "logits"]},
        "edges": {
            name: {"score": score, "in_graph": kept}
            for name, score, kept in zip(names, flat(graph, scores).tolist(), flat(graph, edges).tolist(), strict=True)
        },
    }  # fmt: skip
