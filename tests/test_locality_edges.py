from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsetrain.config import ModelOptions
from sparsetrain.locality.edges import edges_of, edges_of_tensors, numbered, row_parts
from sparsetrain.locality.positions import LocalityError, identity, plan_of, random_layout
from sparsetrain.model import Transformer

OPTIONS = ModelOptions(n_layers=1, d_model=8, d_head=4, mlp_ratio=2, n_ctx=8, d_pos=3, positions="concat")


@pytest.fixture
def model():
    model = Transformer(OPTIONS, 5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            if p.dim() == 2:
                p *= torch.rand(p.shape, generator=torch.Generator().manual_seed(i)) < 0.4
    return model


def written_out(edges, plan, model, matrix):
    """The magnitudes of a matrix, put together again from its pieces."""
    m = next(m for m in plan.matrices if m.name == matrix)
    rows, columns = (np.cumsum([0, *(plan.classes[c].n for c in side)]) for side in (m.rows, m.columns))
    found = np.zeros((rows[-1], columns[-1]))
    for p in edges:
        if p.matrix == matrix:
            found[rows[p.part] + p.rows, columns[m.columns.index(p.column_class)] + p.columns] = p.weights
    return found


def test_edges_are_the_nonzeros_with_each_part_scaled_to_mean_one(model):
    plan = plan_of(OPTIONS, 5)
    edges = edges_of(model, plan)
    for m in plan.matrices:
        weight = dict(model.named_parameters())[m.name].detach().abs().double()
        parts = row_parts(plan, m)
        for _, top, bottom in parts:
            part = weight[top:bottom]
            part /= part[part != 0].mean()
        np.testing.assert_allclose(written_out(edges, plan, model, m.name), weight, rtol=1e-12)
    assert [p[0] for p in row_parts(plan, plan.matrices[1])] == ["blocks.0.qk", "blocks.0.qk", "blocks.0.v"]


def test_weights_held_at_candidates_give_the_same_edges(model):
    plan = plan_of(OPTIONS, 5)
    dense = edges_of(model, plan)
    for linear in (model.blocks[0].attn.qkv, model.blocks[0].mlp.up):
        at = (linear.weight != 0) | (torch.rand(linear.weight.shape) < 0.3)  # some candidates are zero
        linear.hold_(at.flatten().nonzero().flatten())
    for one, other in zip(dense, edges_of(model, plan), strict=True):
        assert np.array_equal(one.rows, other.rows) and np.array_equal(one.columns, other.columns)
        assert np.array_equal(one.weights, other.weights)


@pytest.mark.parametrize("held", [False, True])
def test_a_share_takes_the_greatest_of_each_matrix(model, held):
    up = model.blocks[0].mlp.up
    weight = up.weight.detach().clone()
    if held:
        up.hold_((weight != 0).flatten().nonzero().flatten())
    edges = [p for p in edges_of(model, plan_of(OPTIONS, 5), share=0.1) if p.matrix == "blocks.0.mlp.up.weight"]
    n = int(0.1 * weight.numel())
    smallest = weight.abs().flatten().sort(descending=True).values[n - 1]
    kept = (weight.abs() >= smallest).nonzero().tolist()
    found = {
        (i, j + (8 if p.column_class == "positions" else 0))
        for p in edges
        for i, j in zip(p.rows, p.columns, strict=True)
    }
    assert n == len(kept) and found == {tuple(at) for at in kept}


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_out_of_range_is_refused(model, share):
    with pytest.raises(LocalityError, match=r"must be in \(0, 1\], got"):
        edges_of(model, plan_of(OPTIONS, 5), share)


def test_lengths_by_hand(model):
    plan = plan_of(OPTIONS, 5, sheet=2)
    layout = random_layout(plan, 0)
    piece = next(p for p in edges_of(model, plan) if len(p) > 1)
    a, b = layout.coordinates(piece.row_class)[piece.rows[1]], layout.coordinates(piece.column_class)[piece.columns[1]]
    assert piece.lengths(layout)[1] == abs(a[0] - b[0]) + abs(a[1] - b[1])
    assert piece.counted().weights.tolist() == [1.0] * len(piece)


def test_nodes_are_numbered_through(model):
    plan = plan_of(OPTIONS, 5)
    edges = edges_of(model, plan)
    a, b, weights, n = numbered(edges, plan)
    names = list(plan.classes)
    assert n == sum(c.n for c in plan.classes.values()) and len(a) == len(b) == len(weights) == sum(map(len, edges))
    last = edges[-1]
    assert a[-1] == sum(plan.classes[x].n for x in names[: names.index(last.row_class)]) + last.rows[-1]


def test_a_matrix_without_nonzeros_is_named(model):
    with torch.no_grad():
        model.blocks[0].mlp.out.weight.zero_()
    with pytest.raises(LocalityError, match=r"blocks.0.mlp.out.weight must have nonzero weights .* got none"):
        edges_of(model, plan_of(OPTIONS, 5))


def test_a_plan_of_another_model_is_refused(model):
    plan = plan_of(replace(OPTIONS, mlp_ratio=3), 5)
    with pytest.raises(LocalityError, match=r"blocks.0.mlp.up.weight must have shape \(24, 11\), got \(16, 11\)"):
        edges_of(model, plan)


def test_laying_out_does_not_touch_the_model(model):
    from sparsetrain.locality.relayout import relayout

    tokens = torch.arange(5)[None]
    before, state = model(tokens), {n: p.clone() for n, p in model.state_dict().items()}
    plan = plan_of(OPTIONS, 5)
    layout = relayout(edges_of(model, plan), identity(plan), 0, fresh=True)
    assert not np.array_equal(layout.slots["residual"], np.arange(8))
    assert torch.equal(model(tokens), before)
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())


def test_tensors_of_a_file_will_do(model):
    plan = plan_of(OPTIONS, 5)
    from_file = edges_of_tensors({n: t.clone() for n, t in model.state_dict().items()}, plan)
    assert sum(map(len, from_file)) == sum(map(len, edges_of(model, plan)))
