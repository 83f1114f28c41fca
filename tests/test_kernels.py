"""Every op against its definition, on shapes that break careless code."""

import itertools

import pytest
import torch

from sparsetrain.kernels import cpu, ops, reference
from sparsetrain.kernels.sparse_weight import SparseWeight

SHAPES = [((3, 7), 3), ((5, 4, 33), 8), ((2, 1), 0), ((1, 64), 63), ((7, 130), 1), ((0, 5), 2)]
FILLS = {
    "normal": lambda s, g: torch.randn(s, generator=g),
    "ties": lambda s, g: torch.randn(s, generator=g).round(),
    "zeros": lambda s, g: torch.zeros(s),
    "equal": lambda s, g: -torch.ones(s),
    "extreme": lambda s, g: torch.randn(s, generator=g) * 10.0 ** torch.randint(-44, 38, s, generator=g),
}


@pytest.mark.parametrize("shape, k", SHAPES)
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_abs_topk_equals_its_definition(shape, k, fill, dtype):
    x = FILLS[fill](shape, torch.Generator().manual_seed(0)).to(dtype)
    expected = reference.abs_topk(x, k)
    assert torch.equal(ops.abs_topk(x, k), expected)
    if x.numel():
        assert torch.equal(cpu._abs_topk_numpy(x, k), expected), "the path without a C compiler"


@pytest.mark.parametrize(
    "shape, k", [((7, 5), 2), ((2, 16, 33), 8), ((3, 50, 9), 1), ((1, 2, 3, 64), 60), ((40, 1), 0)]
)
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_abs_topk_keeps_the_layout_of_channel_major_activations(shape, k, fill, dtype):
    x = FILLS[fill](shape, torch.Generator().manual_seed(0)).to(dtype).mT.contiguous().mT.requires_grad_()
    out = ops.abs_topk(x, k)
    assert out.stride() == x.stride()
    assert torch.equal(out, reference.abs_topk(x, k))
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (ours,) = torch.autograd.grad(out, x, grad)
    assert torch.equal(ours, grad * (out != 0))


def test_abs_topk_counts_past_what_its_smallest_integer_holds():
    """40,000 rows of bf16 are counted in 16 bits, some at a time; a NaN of all ones is the greatest there is."""
    x = torch.randn(40000, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    for layout in (x.t().contiguous(), x.t()):
        assert torch.equal(ops.abs_topk(layout, 25000), reference.abs_topk(layout, 25000))
    ones = torch.full((4, 20), -1, dtype=torch.int16).view(torch.bfloat16)
    for layout in (ones, ones.mT.contiguous().mT):
        assert int(ops.abs_topk(layout, 5).isnan().sum()) == 20


def test_the_number_of_threads_does_not_change_what_is_kept(monkeypatch):
    monkeypatch.setattr(cpu, "SMALL", 0)
    x = torch.randn(30, 70, 33, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(ops.abs_topk(x, 9), reference.abs_topk(x, 9))
        assert torch.equal(ops.abs_topk(x.mT.contiguous().mT, 9), reference.abs_topk(x, 9))
        wide = x.view(210, 330).round(decimals=2)  # many ties, in more than one piece
        for threads, floors in itertools.product((1, 2, 3), ((0, 0), (2, 0), (0, 3), (2, 3))):
            torch.set_num_threads(threads)
            assert torch.equal(ops.project_(wide.clone(), 5000, *floors), reference.project(wide, 5000, *floors))
    finally:
        torch.set_num_threads(before)


def test_abs_topk_keeps_k_by_magnitude_and_breaks_ties_by_index():
    x = torch.tensor([[1.0, -3.0, 2.0, -3.0, 3.0]])
    assert ops.abs_topk(x, 2).tolist() == [[0, -3, 0, -3, 0]]
    assert ops.abs_topk(x, 4).tolist() == [[0, -3, 2, -3, 3]]


def test_abs_topk_lets_nan_through():
    x = torch.tensor([[1.0, torch.nan, 2.0]])
    assert ops.abs_topk(x, 1).isnan().tolist() == [[False, True, False]]


def test_abs_topk_gradient_passes_where_the_output_is_not_zero():
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = ops.abs_topk(x, 5)
    gradient = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    (ours,) = torch.autograd.grad(out, x, gradient)
    (theirs,) = torch.autograd.grad(reference.abs_topk(x, 5), x, gradient)
    assert torch.equal(ours, theirs)
    assert (ours != 0).sum() == 30


def test_a_kept_zero_gets_no_gradient_on_any_path():
    for function in (ops.abs_topk, reference.abs_topk):
        x = torch.tensor([[0.0, 2.0, 0.0]], requires_grad=True)
        function(x, 2).sum().backward()
        assert x.grad.tolist() == [[0, 1, 0]]


def test_infinity_is_above_every_number_and_nan_above_infinity():
    greatest = torch.finfo(torch.float32).max
    x = torch.tensor([[greatest, torch.inf, 1.0, torch.nan]])
    for function in (ops.abs_topk, reference.abs_topk, cpu._abs_topk_numpy, lambda x, k: ops.abs_topk(x, k, "triton")):
        assert function(x, 1).isnan().tolist() == [[False, False, False, True]]
        assert function(x, 2)[0, :3].tolist() == [0, torch.inf, 0]
        assert function(x, 3)[0, :3].tolist() == [greatest, torch.inf, 0]


def test_project_takes_a_transposed_weight():
    w = torch.randn(9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ops.project_(w.t().clone(), 30), reference.project(w.t(), 30))


def test_infinities_are_kept_first_and_poison_nothing():
    x = torch.tensor([[torch.inf, 1.0, -torch.inf, torch.inf]])
    for function in (ops.abs_topk, reference.abs_topk):
        assert function(x, 2).tolist() == [[torch.inf, 0, -torch.inf, 0]]


def test_abs_topk_reads_strided_inputs():
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(0)).t()
    assert torch.equal(ops.abs_topk(x, 3), reference.abs_topk(x.contiguous(), 3))


def test_abs_topk_passes_torchs_own_checks_of_custom_ops():
    x = torch.randn(4, 16, requires_grad=True)
    torch.library.opcheck(torch.ops.sparsetrain.abs_topk.default, (x, 3, "cpu"))


def test_abs_topk_refuses_what_cannot_be():
    for k in (5, -1):
        with pytest.raises(ValueError, match=rf"k must be in \[0, 4\], the width of x, got {k}"):
            ops.abs_topk(torch.zeros(2, 4), k)
    with pytest.raises(ValueError, match="k must be an integer, got 2.5"):
        ops.abs_topk(torch.zeros(2, 4), 2.5)
    with pytest.raises(ValueError, match="x must have a dimension to select along, got a 0-d tensor"):
        ops.abs_topk(torch.tensor(1.0), 0)


@pytest.mark.parametrize("floors", [(0, 0), (4, 0), (0, 4), (4, 4), (20, 0), (0, 1), (0, 20), (1, 37)])
@pytest.mark.parametrize("fill", [*FILLS, "mostly zeros", "not finite"])
def test_project_equals_its_definition(floors, fill):
    generator = torch.Generator().manual_seed(3)
    for k in (0, 1, 37, 400, 1500, 37 * 53 - 1):
        w = project_input(fill, (37, 53), generator)
        expected = reference.project(w, k, *floors)
        torch.testing.assert_close(ops.project_(w.clone(), k, *floors), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (90, 1), (64, 64), (65, 127), (300, 500), (7, 9001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_project_takes_any_size(shape, dtype):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    k = w.numel() // 10
    for floors in ((0, 0), (1, 0), (0, 1), (1, 1), (min(4, shape[1]), min(4, shape[0]))):
        assert torch.equal(ops.project_(w.clone(), k, *floors), reference.project(w, k, *floors))
    assert torch.equal(ops.project_(w.flatten(), k), reference.project(w.flatten(), k))


def project_input(fill: str, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    if fill in FILLS:
        return FILLS[fill](shape, generator)
    w, few = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) < 0.02
    return w * few if fill == "mostly zeros" else torch.where(few, w / 0 * (w > 1), w)  # infinities and NaN


def test_project_recovers_from_a_sample_that_misleads():
    """The sample's entries are the greatest, so that it takes far too many entries to be that great."""
    w, n = torch.randn(100, 200, generator=torch.Generator().manual_seed(0)), 20000
    step = int(0.6180339887 * n) | 1
    w.view(-1)[torch.arange(n // 16) * step % n] *= 1e6
    for floors in ((0, 0), (3, 0), (0, 3)):
        assert torch.equal(ops.project_(w.clone(), 4000, *floors), reference.project(w, 4000, *floors))


def test_project_does_without_a_compiler(monkeypatch):
    w = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    weight = SparseWeight.from_dense(w)
    expected = ops.project_(w.clone(), 100, 2, 1)
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert torch.equal(ops.project_(w.clone(), 100, 2, 1), expected)
    assert torch.equal(ops.project_(weight, 100, 2, 1).to_dense(), expected)


def test_project_works_in_place_and_autograd_notices():
    w = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    expected = reference.project(w.t(), 10, 1)
    assert ops.project_(w.t(), 10, 1).data_ptr() == w.data_ptr()
    assert torch.equal(w.t(), expected)
    for parameter in (torch.nn.Parameter(w), torch.nn.Parameter(w.t().contiguous())):
        loss = (parameter * parameter).sum()
        ops.project_(parameter, 3)
        assert parameter.count_nonzero() == 3
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_project_fills_the_floors_out_of_the_same_budget():
    w = torch.tensor([[9.0, 8.0, 7.0, 6.0], [0.1, 0.2, 0.3, 0.4]])
    assert ops.project_(w.clone(), 4, min_per_row=1).tolist() == [[9, 8, 7, 0], [0, 0, 0, pytest.approx(0.4)]]
    columns = ops.project_(w.clone(), 4, min_per_column=1)
    assert columns.tolist() == [[9, 8, 7, 6], [0, 0, 0, 0]]


def test_project_refuses_what_cannot_be():
    with pytest.raises(ValueError, match=r"min_per_row must be in \[0, 4\] for a weight of shape \(2, 4\), got 5"):
        ops.project_(torch.zeros(2, 4), 3, min_per_row=5)
    with pytest.raises(ValueError, match=r"min_per_column must be in \[0, 0\] for a weight of shape \(4,\), got 1"):
        ops.project_(torch.zeros(4), 3, min_per_column=1)
    with pytest.raises(ValueError, match=r"weight must be a matrix or a vector, got shape \(1, 2, 2\)"):
        ops.project_(torch.zeros(1, 2, 2), 3)
    with pytest.raises(ValueError, match=r"k must be in \[0, 8\], the size of the weight, got 9"):
        ops.project_(torch.zeros(2, 4), 9)
    for arguments, name in (((2.5,), "k"), ((3, 0.5), "min_per_row"), ((3, 0, 1.0), "min_per_column")):
        with pytest.raises(ValueError, match=rf"{name} must be an integer, got {arguments[-1]}"):
            ops.project_(torch.zeros(2, 4), *arguments)


def test_project_works_in_float64_through_the_reference():
    w = torch.randn(9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert int((ops.project_(w, 30, 2) != 0).sum()) == 30


@pytest.mark.parametrize("floors", [(0, 0), (4, 0), (0, 4), (4, 4), (20, 0), (37, 53)])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_project_within_a_support_equals_the_projection_of_the_matrix(floors, fill, dtype):
    generator = torch.Generator().manual_seed(3)
    support = SparseWeight.from_dense((torch.rand(53, 37, generator=generator) < 0.3).to(dtype))
    for k in (0, 1, 100, 400, support.n_nonzero - 1, support.n_nonzero):
        weight = support.with_values(FILLS[fill]((support.n_nonzero,), generator).to(dtype))
        expected = reference.project(weight.to_dense(), k, *floors)
        by_definition = weight.with_values(reference.project_support(weight, k, *floors))
        assert torch.equal(by_definition.to_dense(), expected)
        assert ops.project_(weight, k, *floors) is weight
        assert torch.equal(weight.to_dense(), expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_project_within_a_support_needs_no_matrix(backend):
    """Written out, this one would take 4 TB."""
    n = 1_000_000
    weight = SparseWeight.from_rows(
        (n, n), torch.arange(1.0, n + 1), torch.arange(n).flip(0), torch.arange(n + 1)
    )  # fmt: skip
    ops.project_(weight, 10, 1, 1, backend=backend)
    assert weight.values.nonzero().flatten().tolist() == list(range(n - 10, n))


def test_project_within_a_support_takes_lines_of_any_length():
    """Empty first and last lines, and full ones, between which lanes have nothing to read."""
    dense = torch.zeros(50, 70)
    dense[20:23, 1:60] = torch.randn(3, 59, generator=torch.Generator().manual_seed(0))
    for floors in ((5, 0), (0, 2), (3, 1)):
        weight = SparseWeight.from_dense(dense)
        assert torch.equal(ops.project_(weight, 100, *floors).to_dense(), reference.project(dense, 100, *floors))


def test_project_within_a_support_refuses_what_cannot_be():
    weight = SparseWeight.from_dense(torch.eye(4))
    with pytest.raises(ValueError, match=r"k must be in \[0, 4\], the nonzeros of the weight, got 5"):
        ops.project_(weight, 5)
    with pytest.raises(ValueError, match=r"min_per_row must be in \[0, 4\] for a weight of shape \(4, 4\), got 5"):
        ops.project_(weight, 2, 5)
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpu, got 'triton'"):
        ops.project_(weight, 2, backend="triton")
    grown = weight.with_values(weight.values.clone().requires_grad_() * 2)
    with pytest.raises(ValueError, match="values of weight must not be part of a graph, .* detach them"):
        ops.project_(grown, 2)
