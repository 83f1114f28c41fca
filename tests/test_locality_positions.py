import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import small_plan
from safetensors.torch import load_file, save_file

from sparsetrain.config import ModelOptions
from sparsetrain.locality.positions import (
    Layout,
    LocalityError,
    from_tensors,
    identity,
    plan_of,
    random_layout,
    slot_coordinates,
)
from sparsetrain.model import Transformer

OPTIONS = ModelOptions(n_layers=2, d_model=24, d_head=6, mlp_ratio=3, n_ctx=8, d_pos=5)


def test_slots_of_a_line_are_the_published_coordinates():
    assert slot_coordinates(4, 1).tolist() == [[0.125], [0.375], [0.625], [0.875]]


def test_slots_of_a_square_by_hand():
    assert slot_coordinates(4, 2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    found = slot_coordinates(5, 2)  # two rows, of three and of two
    expected = [[1 / 6, 0.25], [0.5, 0.25], [5 / 6, 0.25], [0.25, 0.75], [0.75, 0.75]]
    np.testing.assert_allclose(found, expected)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 90), sheet=st.sampled_from([1, 2]))
def test_slots_are_distinct_inside_the_sheet_and_centred(n, sheet):
    places = slot_coordinates(n, sheet)
    assert places.shape == (n, sheet)
    assert ((places > 0) & (places < 1)).all()
    assert len(np.unique(places.round(12), axis=0)) == n
    np.testing.assert_allclose(places[:, 0].mean(), 0.5)


@pytest.mark.parametrize(("n", "block"), [(36, 4), (35, 5), (24, 6)])
def test_channels_of_a_head_lie_in_its_cell(n, block):
    places = slot_coordinates(n, 2, block).reshape(-1, block, 2)
    np.testing.assert_allclose(places.mean((0, 1))[0], 0.5)
    middle = places.mean(1)
    nearest = np.abs(places[:, :, None] - middle).sum(-1).argmin(-1)
    assert (nearest == np.arange(n // block)[:, None]).all()


@pytest.mark.parametrize("positions", ["none", "learned", "concat"])
@pytest.mark.parametrize("tokens", [True, False])
def test_plan_has_every_matrix_of_the_model_with_its_shape(positions, tokens):
    options = replace(OPTIONS, positions=positions)
    model = Transformer(options, 11)
    plan = plan_of(options, 11, tokens=tokens)
    layout = identity(plan)
    weights = {n: p for n, p in model.named_parameters() if p.dim() == 2 and n != "bigram"}
    left_out = set() if tokens else {"embed.weight", "unembed.weight", "positions.weight"}
    if positions == "concat":
        left_out.add("positions.weight")
    assert {m.name for m in plan.matrices} == weights.keys() - left_out
    for m in plan.matrices:
        rows, columns = layout.matrix_coordinates(m.name)
        assert (len(rows), len(columns)) == weights[m.name].shape


def test_a_queries_row_and_its_keys_lie_together():
    layout = random_layout(plan_of(OPTIONS, 11), 0)
    rows, _ = layout.matrix_coordinates("blocks.1.attn.qkv.weight")
    q, k, v = rows.chunk(3)
    assert torch.equal(q, k) and not torch.equal(q, v)
    assert torch.equal(v, layout.matrix_coordinates("blocks.1.attn.out.weight")[1])


@pytest.mark.parametrize("sheet", [1, 2])
def test_layout_is_read_back_as_it_was_written(tmp_path, sheet):
    plan = plan_of(replace(OPTIONS, positions="concat"), 11, sheet)
    layout = random_layout(plan, 3)
    save_file(layout.tensors(), tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    assert all(t.dtype == torch.int64 and name.startswith("locality.") for name, t in tensors.items())
    again = from_tensors(plan, {**tensors, "embed.weight": torch.zeros(2)})
    assert all(np.array_equal(again.slots[name], slots) for name, slots in layout.slots.items())


def test_random_layouts_differ_by_seed_and_leave_what_does_not_move():
    plan = small_plan()
    one, same, other = (random_layout(plan, seed).slots for seed in (0, 0, 1))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["a"], other["a"])
    assert np.array_equal(one["fixed"], np.arange(5))


def test_every_misfit_of_a_layout_is_named():
    tensors = random_layout(plan_of(OPTIONS, 11), 0).tensors()
    other = plan_of(replace(OPTIONS, n_layers=1, positions="concat"), 12)
    with pytest.raises(LocalityError) as error:
        from_tensors(other, tensors)
    message = str(error.value)
    assert "positions is missing there" in message and "blocks.1.mlp is unknown here" in message
    assert "tokens_in must be a permutation of 12 slots in int64, got int64 of shape (11,)" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": np.zeros(13, np.int64)}, "a must be a permutation of 13 slots"),
        ({"a": np.arange(13) + 1}, "a must be a permutation of 13 slots"),
        ({"a": np.arange(13.0)}, "got float64"),
        ({"heads": np.roll(np.arange(12), 1)}, "heads must keep the 4 channels of each head in one block"),
        ({"heads": np.roll(np.arange(12), 4)}, "more must have its heads in the order of h' other channels"),
    ],
)
def test_a_layout_that_is_none_is_refused(change, words):
    with pytest.raises(LocalityError, match=re.escape(words)):
        identity(small_plan()).replace(change)


def test_bad_questions_are_refused():
    with pytest.raises(LocalityError, match="sheet must have 1 or 2 dimensions, got 3"):
        small_plan(sheet=3)
    with pytest.raises(LocalityError, match="matrix must be one of one, two, got three"):
        identity(small_plan()).matrix_coordinates("three")
    assert isinstance(identity(small_plan()), Layout)
