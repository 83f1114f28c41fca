"""The bf16 products on slabs of tokens: the same numbers as float64, whatever the slices look like."""

import pytest
import torch

from sparsetrain.kernels import ops, slabs
from sparsetrain.kernels.sparse_weight import SparseWeight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def masked(m: int, k: int, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=generator) * (torch.rand(m, k, generator=generator) < density)


def one_long_row(m: int, k: int) -> torch.Tensor:
    dense = masked(m, k, 0.03)
    dense[m // 2] = 1.0
    return dense


CASES = {
    "even": masked(150, 20, 0.3), "skewed": one_long_row(130, 40), "empty": torch.zeros(5, 7), "full": torch.ones(3, 4),
    "one row": torch.ones(1, 9), "more lines than a slice": masked(300, 6, 0.2),
}  # fmt: skip


def activations(channels: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, 128, generator=generator).to(DEVICE, torch.bfloat16)


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_equal_float64(name):
    weight = SparseWeight.from_dense(CASES[name].to(DEVICE, torch.bfloat16).float())
    learnt = weight.with_values(weight.values.clone().requires_grad_())
    x, grad = activations(weight.shape[1], 0).mT.requires_grad_(), activations(weight.shape[0], 1).mT
    bias = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(2)).to(DEVICE)
    y = ops.sparse_linear(x, learnt, bias, backend="triton slabs")
    x_grad, values_grad = torch.autograd.grad(y, (x, learnt.values), grad)
    exact = weight.with_values(weight.values.double())
    inputs = (x.detach().double().requires_grad_(), exact.values.requires_grad_())
    truth = ops.sparse_linear(inputs[0], exact, bias.double(), backend="reference")
    for ours, expected, tolerance in (
        (y, truth, 2e-3), (x_grad, torch.autograd.grad(truth, inputs[0], grad.double(), retain_graph=True)[0], 2e-3),
        (values_grad, torch.autograd.grad(truth, inputs[1], grad.double())[0], 1e-6),
    ):  # fmt: skip
        assert (ours.double() - expected).norm() <= tolerance * expected.norm().clamp(min=1e-30)


def test_every_output_is_written(monkeypatch):
    real = torch.empty

    def poisoned(*args, **kwargs):
        made = real(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    weight = SparseWeight.from_dense(CASES["skewed"].to(DEVICE))
    x, y = activations(40, 0), activations(130, 1)
    assert slabs.matmul(x, weight.values, weight.rows).isfinite().all()
    assert slabs.sampled_matmul(y, x, weight.rows).isfinite().all()


@pytest.mark.parametrize("slab, warps", [(32, 8), (16, 32), (8, 4)])
def test_any_slab_and_number_of_warps_give_the_same_bits(slab, warps):
    weight, x = SparseWeight.from_dense(CASES["skewed"].to(DEVICE)), activations(40, 0)
    expected = slabs.matmul(x, weight.values, weight.rows)
    assert torch.equal(slabs.matmul(x, weight.values, weight.rows, slab=slab, warps=warps), expected)


@pytest.mark.parametrize("blocks", [33, 40])
def test_sampled_sums_have_no_group_without_a_slab(blocks, monkeypatch):
    """More slabs than groups, and not a multiple: what no group wrote must not be added."""
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(7) if k.get("dtype") else real(*a, **k))
    weight = SparseWeight.from_dense(torch.eye(3, 8, device=DEVICE))
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(blocks, n, 64, generator=generator).to(DEVICE, torch.bfloat16) for n in (8, 3))
    exact = (y.double() * x[:, :3].double()).sum((0, 2))
    torch.testing.assert_close(slabs.sampled_matmul(y, x, weight.rows).double(), exact, rtol=1e-5, atol=1e-4)


def test_a_tensor_that_begins_inside_a_word_is_read_right():
    weight = SparseWeight.from_dense(torch.eye(4, 4, device=DEVICE))
    flat = torch.randn(4 * 64 + 1, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    x = flat[1:].view(1, 4, 64)
    assert torch.equal(slabs.matmul(x, weight.values, weight.rows), x)


def test_padding_reads_nothing_of_the_lines_that_have_ended():
    """A NaN in the channel that an empty slot would name must not reach lines without that channel."""
    dense = CASES["skewed"]
    weight = SparseWeight.from_dense(dense.to(DEVICE))
    x = activations(40, 0)
    x[:, 0] = torch.nan
    reached = slabs.matmul(x, weight.values, weight.rows).isnan().any(-1).any(0).cpu()
    assert torch.equal(reached, dense[:, 0] != 0)


def test_slices_hold_every_nonzero_once_and_are_made_once():
    weight = SparseWeight.from_dense(CASES["skewed"])
    cut = slabs.slices(weight.rows, 64)
    assert slabs.slices(weight.rows, 64) is cut
    assert sorted(cut.slots.tolist()) == cut.slots.unique().tolist()
    assert torch.equal(cut.source[cut.slots], torch.arange(weight.n_nonzero, dtype=torch.int32))
    assert (cut.starts % cut.height == 0).all()


@pytest.mark.parametrize("channels, tokens", [(1024, 64), (1600, 64), (1601, 32), (2048, 32), (4096, 16), (65536, 8)])
def test_a_slab_fits_the_l1_cache_or_is_the_smallest(channels, tokens):
    assert slabs.slab_tokens(channels) == tokens
    assert channels * tokens * 2 <= slabs.L1_BYTES or tokens == 8


def test_what_slabs_cannot_take_is_refused():
    weight = SparseWeight.from_dense(torch.eye(4, device=DEVICE))
    with pytest.raises(ValueError, match="'triton slabs' cannot run here: it takes bfloat16 and blocks of whole slabs"):
        ops.sparse_linear(torch.zeros(64, 4, device=DEVICE), weight, backend="triton slabs")
    with pytest.raises(ValueError, match="got torch.bfloat16 and blocks of 63 tokens"):
        ops.sparse_linear(torch.zeros(63, 4, device=DEVICE, dtype=torch.bfloat16), weight, backend="triton slabs")
