import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetrain.locality.positions import LocalityError
from sparsetrain.locality.pressure import (
    distance_factor,
    distances,
    published_cost,
    scale_of,
    shrink_,
    wire_cost,
    wire_gradient,
)

sizes = {"m": st.integers(1, 40), "k": st.integers(1, 40), "sheet": st.sampled_from([1, 2])}


def drawn(m, k, sheet, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    rows, columns = (torch.rand(n, sheet, generator=g, dtype=torch.float64).to(dtype) for n in (m, k))
    weight = torch.randn(m, k, generator=g, dtype=torch.float64) * (torch.rand(m, k, generator=g) < 0.4)
    return rows, columns, weight.to(dtype)


def slow_distances(rows, columns):
    return torch.tensor([[sum(abs(a - b) for a, b in zip(r, c, strict=True)) for c in columns.tolist()]
                         for r in rows.tolist()], dtype=torch.float64)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(**sizes, beta=st.sampled_from([0.0, 0.5, 4.0, 40.0]))
def test_distances_and_factors_are_their_definitions(m, k, sheet, beta):
    rows, columns, _ = drawn(m, k, sheet)
    expected = slow_distances(rows, columns)
    torch.testing.assert_close(distances(rows, columns), expected)
    torch.testing.assert_close(distance_factor(rows, columns, beta), (-beta * expected).exp(), rtol=1e-11, atol=0)


@settings(max_examples=20, deadline=None)
@given(**sizes)
def test_candidates_get_what_the_whole_matrix_would(m, k, sheet):
    rows, columns, weight = drawn(m, k, sheet)
    at = weight.nonzero(as_tuple=True)
    torch.testing.assert_close(distances(rows, columns, at), distances(rows, columns)[at])
    torch.testing.assert_close(distance_factor(rows, columns, 4, at), distance_factor(rows, columns, 4)[at])
    d = distances(rows, columns)
    torch.testing.assert_close(wire_cost(weight[at], d[at]), wire_cost(weight, d))
    torch.testing.assert_close(wire_gradient(weight[at], d[at]), wire_gradient(weight, d)[at])


def test_beta_nought_is_no_pressure():
    rows, columns, _ = drawn(5, 7, 2)
    assert torch.equal(distance_factor(rows, columns, 0), torch.ones(5, 7, dtype=torch.float64))


def test_wire_cost_by_hand_and_whatever_the_scale():
    weight = torch.tensor([[1.0, 0.0], [-3.0, 0.0]], dtype=torch.float64)
    distance = torch.tensor([[0.5, 0.1], [0.25, 0.1]], dtype=torch.float64)
    assert wire_cost(weight, distance).item() == (0.5 + 0.75) / 2
    assert wire_cost(7 * weight, distance).item() == pytest.approx(0.625)
    assert wire_cost(torch.zeros(2, 2), distance).item() == 0 and scale_of(torch.zeros(2)).item() == 1


@settings(max_examples=20, deadline=None)
@given(**sizes)
def test_wire_gradient_is_that_of_autograd_and_of_differences(m, k, sheet):
    rows, columns, weight = drawn(m, k, sheet)
    d = distances(rows, columns)
    leaf = weight.clone().requires_grad_()
    wire_cost(leaf, d).backward()
    gradient = wire_gradient(weight, d)
    torch.testing.assert_close(gradient, leaf.grad)
    assert (gradient[weight == 0] == 0).all()
    far = weight.abs() > 1e-3
    scale = scale_of(weight)
    step = 1e-6 * far
    rise = ((weight + step).abs() - (weight - step).abs()) * d / scale / 2e-6
    torch.testing.assert_close(gradient[far], rise[far], rtol=1e-6, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(**sizes, amount=st.sampled_from([0.0, 0.01, 1.0, 100.0]))
def test_shrinking_is_the_proximal_step(m, k, sheet, amount):
    """Each entry is the minimiser of (u - w)^2 / 2 + amount scale d |u|, found by trying many u."""
    rows, columns, weight = drawn(m, k, sheet)
    d, scale, shrunk = distances(rows, columns), scale_of(weight).item(), weight.clone()
    shrink_(shrunk, d, amount)
    tried = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None] * weight.flatten()
    objective = (tried - weight.flatten()).square() / 2 + amount * scale * d.flatten() * tried.abs()
    best = tried.gather(0, objective.argmin(0)[None])[0].view(m, k)
    torch.testing.assert_close(shrunk, best, rtol=0, atol=5e-4 * max(1.0, weight.abs().max().item()))
    assert (shrunk.abs() <= weight.abs()).all() and (shrunk * weight >= 0).all()


def test_published_cost_by_hand():
    weight = torch.tensor([[1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([-4.0], dtype=torch.float64, requires_grad=True)
    layer = (weight, bias, torch.tensor([[0.25, 0.5]], dtype=torch.float64))
    cost = published_cost([layer, (weight, None, layer[2])], gap=0.1, factor=2.0)
    assert cost.item() == pytest.approx(2 * (0.6 + 2 * 1.1) + 0.4)
    cost.backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[1.2, -2.2]], dtype=torch.float64))
    torch.testing.assert_close(bias.grad, torch.tensor([-0.1], dtype=torch.float64))
    table = torch.full((2, 2), 3.0, dtype=torch.float64)
    mean = published_cost([layer], gap=0.1, reduce="mean", embedding=table)
    assert mean.item() == pytest.approx((0.35 + 2 * 0.6) / 2 + 0.4 + 0.3)


@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf])
def test_beta_out_of_range_is_refused(beta):
    rows, columns, _ = drawn(2, 2, 1)
    with pytest.raises(LocalityError, match="beta must be 0 or more and finite, got"):
        distance_factor(rows, columns, beta)


@pytest.mark.parametrize("amount", [-1.0, math.nan])
def test_a_negative_shrinkage_is_refused(amount):
    with pytest.raises(LocalityError, match="amount to shrink by must be 0 or more, got"):
        shrink_(torch.ones(2), torch.ones(2), amount)
