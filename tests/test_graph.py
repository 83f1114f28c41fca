"""Edges counted by hand, and dangling nodes found on a graph one can draw."""

import pytest
import torch

from sparsetrain.config import RunConfig, load_config
from sparsetrain.model import Transformer
from sparsetrain.pruning import graph

SITES = ["blocks.0.attn_in", "blocks.0.q", "blocks.0.k", "blocks.0.v", "blocks.0.attn_out", "blocks.0.mlp_in",
         "blocks.0.mlp_act", "blocks.0.mlp_out", "final_resid"]  # fmt: skip


@pytest.fixture
def model() -> Transformer:
    """One block of width 4, two heads of 2, four neurons; only a few weights are not zero.

    embed channel 0 -> attn_in:0 -> v:0 -> attn_out:1 -> mlp_in:1 -> mlp_act:2 -> mlp_out:3 -> final_resid:3 -> logits,
    with attn_in:0 -> q:0 and attn_in:0 -> k:0 in the same head; beside it a v:3 that nothing feeds, a neuron 1 whose
    write to channel 2 nobody reads, and a q:2 in the other head.
    """
    options = load_config(
        RunConfig,
        ["model.n_layers=1", "model.d_model=4", "model.d_head=2", "model.mlp_ratio=1", "model.n_ctx=4",
         "sparsity.density=1"],
    ).model  # fmt: skip
    model = Transformer(options, 5)
    block = model.blocks[0]
    with torch.no_grad():
        for w in (model.embed.weight, model.unembed.weight, block.attn.qkv.weight, block.attn.out.weight,
                  block.mlp.up.weight, block.mlp.out.weight):  # fmt: skip
            w.zero_()
        model.embed.weight[2, 0] = 1
        qkv = block.attn.qkv.weight
        qkv[0, 0] = qkv[4 + 0, 0] = qkv[8 + 0, 0] = qkv[2, 0] = 0.5
        block.attn.out.weight[1, 0] = 2
        block.attn.out.weight[1, 3] = 2
        block.mlp.up.weight[2, 1] = block.mlp.up.weight[1, 1] = 1
        block.mlp.out.weight[3, 2] = -1
        block.mlp.out.weight[2, 1] = 1
        model.unembed.weight[4, 3] = 1
    return model


def named(nodes) -> set[str]:
    return {f"{s.removeprefix('blocks.0.')}:{c}" for s, m in nodes.items() for c in m.nonzero().flatten().tolist()}


def test_node_sites_are_the_papers_in_forward_order(model):
    assert list(graph.node_sites(model.options)) == SITES
    wide = load_config(RunConfig, ["model.n_layers=12", "model.d_model=1024", "model.d_head=8"]).model
    # Gao et al. 2025, A.5: the released count for csp_yolo1 is 136,192 nodes.
    assert sum(graph.node_sites(wide).values()) == 136_192


def test_edges_of_the_full_model_are_its_nonzero_weights(model):
    assert graph.n_nodes(graph.full(model)) == 36
    assert graph.n_edges(model, graph.full(model)) == 4 + 2 + 2 + 2


def test_edges_need_both_ends(model):
    nodes = graph.full(model)
    nodes["blocks.0.attn_in"][0] = False
    assert graph.n_edges(model, nodes) == 6
    nodes["blocks.0.mlp_act"][:] = False
    assert graph.n_edges(model, nodes) == 2


def test_dangling_nodes_go_until_only_the_path_is_left(model):
    kept = graph.without_dangling(model, graph.full(model))
    assert named(kept) == {
        "attn_in:0", "q:0", "k:0", "v:0", "attn_out:1", "mlp_in:1", "mlp_act:2", "mlp_out:3", "final_resid:3",
    }  # fmt: skip
    assert named(graph.without_dangling(model, kept)) == named(kept)


def test_a_broken_path_leaves_nothing(model):
    nodes = graph.full(model)
    nodes["blocks.0.v"][0] = False
    assert named(graph.without_dangling(model, nodes)) == set()


def test_a_constant_query_stays_with_its_key(model):
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[0, 0] = 0  # q:0 is its bias alone, k:0 is still fed
    assert {"q:0", "k:0"} <= named(graph.without_dangling(model, graph.full(model)))


def test_wires_are_slices_of_the_models_own_weights(model):
    found = {(w.source, w.target): w for w in graph.wires(model)}
    assert len(found) == 6
    assert torch.equal(found["blocks.0.attn_in", "blocks.0.v"].weight, model.blocks[0].attn.qkv.weight[8:])
    assert found["blocks.0.v", "blocks.0.attn_out"].weight[1, 3] == 2
