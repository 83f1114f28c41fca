"""The linear map in its three states gives the same outputs and gradients."""

import pytest
import torch

from sparsetrain.kernels import cpu, ops, reference
from sparsetrain.linear import Linear


def random(*shape: int, seed: int = 0, zeros: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * (torch.rand(shape, generator=generator) >= zeros)


def maps(m: int = 37, k: int = 23) -> tuple[Linear, Linear, Linear]:
    """The same weight, an eighth of it not zero: dense, multiplied by its nonzeros, held at a third of its entries."""
    dense, sparse, held = (Linear(k, m) for _ in range(3))
    weight = random(m, k, zeros=7 / 8)
    for linear in (dense, sparse, held):
        linear.weight.data.copy_(weight)
        linear.bias.data.copy_(random(m, seed=1))
    held.hold_(((weight != 0) | (random(m, k, seed=2) > 0.8)).flatten().nonzero().squeeze(-1))
    for linear in (sparse, held):
        linear.read_(sparse=True)
    return dense, sparse, held


@pytest.mark.parametrize("channel_major", [False, True])
def test_all_states_agree_with_a_dense_layer_in_float64(channel_major):
    dense, sparse, held = maps()
    x = random(3, 19, 23, seed=3)
    grad = random(3, 19, 37, seed=4, zeros=0.75)
    exact = x.double().requires_grad_()
    weight = dense.weight.detach().double().requires_grad_()
    expected = torch.nn.functional.linear(exact, weight, dense.bias.detach().double())
    in_grad, weight_grad = torch.autograd.grad(expected, (exact, weight), grad.double())
    for linear in (dense, sparse, held):
        x_here = (ops.channel_major(x) if channel_major else x).detach().requires_grad_()
        y = linear(x_here)
        assert reference.is_channel_major(y) == channel_major
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        y.backward(grad)
        torch.testing.assert_close(x_here.grad.double(), in_grad, rtol=1e-5, atol=1e-5)
        wanted = weight_grad if linear is not held else weight_grad.flatten()[linear.indices()]
        torch.testing.assert_close(linear.weight.grad.double(), wanted, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(linear.bias.grad.double(), grad.double().sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_what_is_explored_is_the_dense_gradient_of_the_first_sequences():
    _, _, held = maps()
    seen = []
    held.explore, held.explore_blocks = seen.append, 2
    x, grad = random(3, 19, 23, seed=3), random(3, 19, 37, seed=4)
    y = held(x)
    (y + held(2 * x)).backward(grad)  # the second time it is not explored: hybrid passes of a bridge come after the own
    expected = grad[:2].double().flatten(0, 1).t() @ x[:2].double().flatten(0, 1)
    torch.testing.assert_close(seen[0].double(), expected, rtol=1e-5, atol=1e-4)
    assert len(seen) == 1


def test_holding_other_entries_keeps_the_weight_and_says_where_each_was():
    dense, _, held = maps()
    old = held.indices()
    alive = dense.weight.flatten().nonzero().squeeze(-1)
    new = torch.cat([alive, torch.arange(0, 37 * 23, 5)]).unique()
    before = held.weight.detach().clone()
    former = held.hold_(new)
    assert torch.equal(held.dense_weight(), dense.weight)
    assert torch.equal(held.indices(), new)
    kept = torch.isin(new, old)
    assert torch.equal(former >= 0, kept) and torch.equal(old[former[kept]], new[kept])
    assert torch.equal(held.weight.detach()[kept], before[former[kept]])
    assert held.candidates.values is held.weight, "what is projected and what is trained must be one tensor"


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 130, 70, 65), (2, 64, 515, 17), (1, 300, 8, 500)])
def test_dense_gradient_equals_its_definition(shape, dtype, share, monkeypatch):
    blocks, m, k, tokens = shape
    monkeypatch.setattr(cpu, "DENSE_ENOUGH", 2)  # the C path, whatever the share
    y = random(blocks, m, tokens, zeros=1 - share).to(dtype)
    x = random(blocks, k, tokens, seed=1).to(dtype)
    expected = torch.einsum("bmt,bkt->mk", y.double(), x.double())
    monkeypatch.setattr(torch, "empty", lambda *size, **how: torch.full(size, torch.nan, **how))
    torch.testing.assert_close(cpu.dense_gradient(y, x).double(), expected, rtol=1e-5, atol=1e-4)
    monkeypatch.setattr(cpu, "library", lambda: None)
    torch.testing.assert_close(cpu.dense_gradient(y, x).double(), expected, rtol=1e-5, atol=1e-4)


def test_dense_gradient_does_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(cpu, "SMALL", 0)
    y, x = random(4, 300, 100, zeros=0.75), random(4, 600, 100, seed=1)
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(cpu.dense_gradient(y, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_gradient_to_another_shape_is_refused():
    _, sparse, _ = maps()
    with pytest.raises(ValueError, match=r"gradient_to must have the shape of the weight, \(37, 23\), got \(3, 3\)"):
        ops.sparse_linear(random(2, 23), sparse.active, gradient_to=torch.zeros(3, 3))


def test_the_gradient_goes_where_it_is_asked_to_on_the_reference_too():
    _, sparse, held = maps()
    x, grad = random(2, 9, 23), random(2, 9, 37, seed=5)
    for linear in (sparse, held):
        linear(x).backward(grad)
        fast, linear.weight.grad = linear.weight.grad, None
        with ops.using("reference"):
            linear(x).backward(grad)
        torch.testing.assert_close(linear.weight.grad, fast, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout_of_x", [False, True])
@pytest.mark.parametrize("layout_of_grad", [False, True])
def test_dense_gradient_takes_every_pair_of_layouts(layout_of_x, layout_of_grad):
    """A residual stream hands a channel-major gradient to a product whose activations were token-major."""
    x, grad = random(1, 256, 8), random(1, 256, 6, seed=1, zeros=0.75)
    expected = grad[0].double().t() @ x[0].double()
    x, grad = (ops.channel_major(t) if down else t for t, down in ((x, layout_of_x), (grad, layout_of_grad)))
    torch.testing.assert_close(ops.dense_gradient(grad, x).double(), expected, rtol=1e-5, atol=1e-4)


def test_a_weight_that_is_not_finite_is_refused_in_every_state():
    for linear in maps():
        linear.weight.data.view(-1)[linear.weight.flatten().nonzero()[0]] = torch.nan
        with pytest.raises(ValueError, match="values must be finite"):
            linear.read_(sparse=True)
