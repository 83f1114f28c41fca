"""The projection of weights whose rows lie on two processes, against its definition."""

import math

import pytest
import ranks
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetrain.kernels import reference, sharded

POOLS = (
    [1.0], [0.0], [0.0, -0.0], [1.0, -1.0, 0.5, 0.0, -0.0],
    [1e-45, -1e-45, 3e38, math.inf, -math.inf, math.nan, 0.0],
)  # fmt: skip
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@pytest.fixture(scope="module")
def both():
    with ranks.group() as call:
        yield call


def project(weights, budgets):
    """What is left of this process' rows."""
    shards = [(*w.chunk(ranks.N), *[w[:0]] * ranks.N)[dist.get_rank()].clone() for w in weights]
    sharded.project_(shards, budgets)
    return shards


def assert_exact(both, weights, budgets):
    for weight, budget, *parts in zip(weights, budgets, *both(project, weights, budgets), strict=True):
        expected, found = reference.project(weight, *budget), torch.cat(parts)
        bits = BITS[weight.dtype]
        assert torch.equal(found.view(bits), expected.view(bits)), (weight, budget, found, expected)


@st.composite
def cases(draw, dtype=torch.float32):
    """A weight, random or of few values so that most are tied, and a budget with floors that may exceed it."""
    m, k = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    if draw(st.booleans()):
        weight = torch.randn(m, k, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))), dtype=dtype)
    else:
        values = draw(st.lists(st.sampled_from(draw(st.sampled_from(POOLS))), min_size=m * k, max_size=m * k))
        weight = torch.tensor(values, dtype=dtype).view(m, k)
    n_kept = draw(st.integers(1, m * k))
    if draw(st.integers(0, 4)) == 0:
        return weight.flatten(), (n_kept, 0, 0)
    return weight, (n_kept, draw(st.integers(0, k)), draw(st.integers(0, m)))


@settings(max_examples=15, deadline=None)  # a call takes as long for ten weights as for one
@given(st.lists(cases(), min_size=5, max_size=15))
def test_what_is_left_is_bit_for_bit_that_of_the_whole_weight(both, found):
    assert_exact(both, *zip(*found, strict=True))


@settings(max_examples=3, deadline=None)
@given(st.lists(cases(torch.float64), min_size=5, max_size=15))
def test_float64_too(both, found):
    assert_exact(both, *zip(*found, strict=True))


def test_a_weight_of_the_size_of_a_layer_with_both_floors(both):
    weight = torch.randn(301, 129, generator=torch.Generator().manual_seed(0)).mul_(50).round_()  # ties everywhere
    assert_exact(both, [weight, weight.t().contiguous()], [(3000, 4, 7), (900, 0, 4)])


def test_a_single_row_lies_on_the_first_process_alone(both):
    assert_exact(both, [torch.tensor([[2.0, -3.0, 3.0, 0.0]])], [(2, 1, 1)])


def test_nothing_to_project(both):
    both(project, [], [])
