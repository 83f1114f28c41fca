"""Every op against its definition, on shapes that break careless code."""

import pytest
import torch

from sparsetrain.kernels import cpu, ops, reference

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
        wide = x.view(210, 330)
        assert torch.equal(ops.project_(wide.clone(), 5000, 2, 3), reference.project(wide, 5000, 2, 3))
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


def test_abs_topk_refuses_a_k_out_of_range():
    with pytest.raises(ValueError, match=r"k must be in \[0, 4\], the width of x, got 5"):
        ops.abs_topk(torch.zeros(2, 4), 5)


@pytest.mark.parametrize("floors", [(0, 0), (4, 0), (0, 4), (4, 4), (20, 0), (0, 1)])
@pytest.mark.parametrize("fill", ["normal", "ties", "equal"])
def test_project_equals_its_definition(floors, fill):
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        w = FILLS[fill]((37, 53), generator)
        assert torch.equal(ops.project_(w.clone(), 400, *floors), reference.project(w, 400, *floors))


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


def test_project_works_in_float64_through_the_reference():
    w = torch.randn(9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert int((ops.project_(w, 30, 2) != 0).sum()) == 30
