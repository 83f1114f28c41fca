"""Budgets, schedules and counts."""

import pytest
import torch

from sparsetrain import sparsity
from sparsetrain.config import RunConfig, SparsityOptions, load_config
from sparsetrain.linear import Linear
from sparsetrain.model import Transformer


def model(*overrides) -> Transformer:
    options = load_config(RunConfig, ["model.n_layers=1", "model.d_model=32", "sparsity.density=1", *overrides]).model
    return Transformer(options, 40, torch.Generator().manual_seed(0))


def test_linear_annealing_goes_from_dense_to_the_target_in_its_window():
    o = SparsityOptions(density=0.1, anneal_start=0.2, anneal_stop=0.6)
    assert [sparsity.density(o, p) for p in (0, 0.2, 0.4, 0.6, 1)] == pytest.approx([1, 1, 0.55, 0.1, 0.1])


def test_exponential_annealing_falls_by_equal_factors():
    o = SparsityOptions(density=0.01, anneal="exponential", anneal_start=0.0, anneal_stop=1.0)
    assert [sparsity.density(o, p) for p in (0, 0.25, 0.5, 1)] == pytest.approx([1, 10**-0.5, 0.1, 0.01])


def test_a_window_of_no_width_is_a_step():
    o = SparsityOptions(density=0.1, anneal_start=0.5, anneal_stop=0.5)
    assert [sparsity.density(o, p) for p in (0.49, 0.5)] == [1, pytest.approx(0.1)]


def test_late_embeddings_stay_dense_until_the_cap_bites():
    o = SparsityOptions(density=0.1, embedding_density=0.4, anneal_start=0, anneal_stop=1, embedding_anneal="late")
    # the block density is 0.25 at progress 5/6, where 0.4 / 0.1 x 0.25 is 1
    assert sparsity.embedding_density(o, 0.8) == 1
    assert sparsity.embedding_density(o, 0.9) == pytest.approx(4 * sparsity.density(o, 0.9))
    assert sparsity.embedding_density(o, 1) == pytest.approx(0.4)


def test_what_is_projected_and_what_never_is():
    m = model("model.positions=learned")
    names = {t.name for t in sparsity.projected(m, SparsityOptions())}
    left = {name for name, _ in m.named_parameters()} - names
    assert left == {
        "bigram", "norm.weight", "blocks.0.attn.sink", "blocks.0.attn.norm.resid.weight",
        "blocks.0.mlp.norm.resid.weight", "blocks.0.attn.qkv.bias", "blocks.0.attn.out.bias",
        "blocks.0.mlp.up.bias", "blocks.0.mlp.out.bias",
    }  # fmt: skip
    with_biases = {t.name for t in sparsity.projected(m, SparsityOptions(biases="sparse"))}
    assert with_biases - names == {n for n in left if n.endswith("bias")}


def test_projection_meets_every_budget_and_floor():
    m = model()
    options = SparsityOptions(density=0.25, min_alive=4, anneal_start=0, anneal_stop=0)
    tensors = sparsity.projected(m, options)
    sparsity.project_all_(tensors, options, 1.0)
    for t in tensors:
        alive = t.dense() != 0
        assert int(alive.sum()) == t.l0(options, 1.0), t.name
        assert alive.sum(1).min() >= t.min_per_row
        assert alive.sum(0).min() >= t.min_per_column
    floors = {t.name.split(".", 2)[-1]: (t.min_per_row, t.min_per_column) for t in tensors if t.kind == "block"}
    assert floors == {
        "attn.qkv.weight": (4, 0), "attn.out.weight": (0, 4), "mlp.up.weight": (4, 0), "mlp.out.weight": (0, 4),
    }  # fmt: skip


def test_nonzeros_are_multiplied_where_that_pays_and_give_the_same_logits_and_gradients():
    m = model("model.d_model=256")
    with torch.no_grad():
        for linear in (module for module in m.modules() if isinstance(module, Linear)):
            keep = torch.rand(linear.shape, generator=torch.Generator().manual_seed(1)) < 0.01
            linear.weight.mul_(keep)
        m.blocks[0].mlp.up.weight.fill_(0.01)
    tokens = torch.arange(256).view(4, 64) % 40

    def run():
        scale = torch.ones(256, requires_grad=True)
        logits, _ = m.run(tokens, edits={"blocks.0.attn_in": lambda x: x * scale})
        return logits.detach(), torch.autograd.grad(logits[..., 0].sum(), scale)[0]

    dense = run()
    sparsity.multiply_nonzeros_(m.requires_grad_(False), n_tokens=4096)
    active = {name for name, module in m.named_modules() if isinstance(module, Linear) and module.active is not None}
    assert {"blocks.0.attn.qkv", "blocks.0.mlp.out"} <= active and "blocks.0.mlp.up" not in active
    for a, b in zip(dense, run(), strict=True):
        torch.testing.assert_close(a, b)


def test_counts_see_dead_rows_and_columns():
    m = model()
    with torch.no_grad():
        m.blocks[0].mlp.up.weight[:3] = 0
        m.blocks[0].mlp.up.weight[:, :5] = 0
    row = sparsity.count(sparsity.projected(m, SparsityOptions()))["blocks.0.mlp.up.weight"]
    assert row == {"n_nonzero": 125 * 27, "density": 125 * 27 / (128 * 32), "dead_rows": 3, "dead_columns": 5}
