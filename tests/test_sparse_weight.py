"""The two orders of one set of nonzeros, and what is refused when they are built."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetrain.kernels import sparse_weight
from sparsetrain.kernels.sparse_weight import SparseWeight


def masked(m: int, k: int, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=generator) * (torch.rand(m, k, generator=generator) < density)


def tensors_of(weight: SparseWeight) -> list[torch.Tensor]:
    orders = [t for o in (weight.rows, weight.columns) for t in (o.offsets, o.indices, o.by_length)]
    return [weight.values, weight.to_column_major, *orders]


def assert_same(a: SparseWeight, b: SparseWeight) -> None:
    assert a.shape == b.shape
    for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype and x.is_contiguous()


SIZES = [(0, 3), (3, 0), (1, 1), (1, 500), (500, 1), (63, 17), (40, 130), (700, 300)]


@settings(max_examples=60, deadline=None)
@given(m=st.integers(0, 9), k=st.integers(0, 9), density=st.sampled_from([0, 0.1, 0.5, 1]), seed=st.integers(0, 99))
def test_both_orders_hold_the_same_matrix(m, k, density, seed):
    dense = masked(m, k, density, seed)
    weight = SparseWeight.from_dense(dense)
    assert torch.equal(weight.to_dense(), dense)
    assert weight.n_nonzero == int((dense != 0).sum())
    rows, columns = weight.rows, weight.columns
    for row in range(m):
        inside = slice(int(rows.offsets[row]), int(rows.offsets[row + 1]))
        assert rows.indices[inside].tolist() == dense[row].nonzero().flatten().tolist()
        assert torch.equal(weight.values[inside], dense[row][dense[row] != 0])
    by_column = weight.values[weight.to_column_major]
    for column in range(k):
        inside = slice(int(columns.offsets[column]), int(columns.offsets[column + 1]))
        assert columns.indices[inside].tolist() == dense[:, column].nonzero().flatten().tolist()
        assert torch.equal(by_column[inside], dense[:, column][dense[:, column] != 0])
    for order in (rows, columns):
        lengths = order.offsets.diff()[order.by_length.long()]
        assert sorted(order.by_length.tolist()) == list(range(order.n_lines))
        assert (lengths.diff() <= 0).all()


@pytest.mark.parametrize("m, k", SIZES)
@pytest.mark.parametrize("density", [0, 0.02, 0.3, 1])
def test_c_and_torch_build_the_same(m, k, density, monkeypatch):
    dense = masked(m, k, density)
    with monkeypatch.context() as patch:
        patch.setattr(sparse_weight, "library", lambda: None)
        expected = SparseWeight.from_dense(dense)
        by_rows = SparseWeight.from_rows((m, k), expected.values, expected.rows.indices, expected.rows.offsets)
    before = torch.get_num_threads()
    patched = pytest.MonkeyPatch()
    patched.setattr(sparse_weight, "SMALL", 0)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same(SparseWeight.from_dense(dense), expected)
            assert_same(SparseWeight.from_dense(dense.t().contiguous().t()), expected)
    finally:
        torch.set_num_threads(before)
        patched.undo()
    assert_same(by_rows, expected)
    assert_same(SparseWeight.from_rows((m, k), expected.values, expected.rows.indices, expected.rows.offsets), expected)


@pytest.mark.parametrize("m, k", SIZES)
@pytest.mark.parametrize("zeros", [0, 0.5, 1])
@pytest.mark.parametrize("compiled", [True, False])
def test_without_zeros_is_the_weight_of_what_is_left(m, k, zeros, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(sparse_weight, "library", lambda: None)
    whole = SparseWeight.from_dense(masked(m, k, 0.4))
    values = whole.values * (torch.rand(whole.n_nonzero, generator=torch.Generator().manual_seed(1)) >= zeros)
    weight = whole.with_values(values.requires_grad_())
    left, positions = weight.without_zeros()
    assert_same(left, SparseWeight.from_dense(weight.to_dense()))
    assert positions.dtype == torch.int32 and torch.equal(positions, values.nonzero().flatten().int())
    (grad,) = torch.autograd.grad(left.values.sum(), values)
    assert torch.equal(grad, (values != 0).float())


def test_to_moves_every_tensor():
    weight = SparseWeight.from_dense(masked(5, 7, 0.4).requires_grad_())
    assert weight.to("cpu") is weight
    moved = weight.to("meta")
    assert {t.device.type for t in tensors_of(moved)} == {"meta"}
    assert [(t.shape, t.dtype) for t in tensors_of(moved)] == [(t.shape, t.dtype) for t in tensors_of(weight)]
    assert moved.shape == weight.shape and moved.values.requires_grad
    if torch.cuda.is_available():
        assert_same(weight.to("cuda").to("cpu"), weight)


def test_from_rows_keeps_stored_zeros_and_takes_both_integer_types():
    for integer in (torch.int32, torch.int64):
        weight = SparseWeight.from_rows(
            (2, 3), torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 2, 1], dtype=integer),
            torch.tensor([0, 2, 3], dtype=integer),
        )  # fmt: skip
        assert weight.n_nonzero == 3
        assert weight.to_dense().tolist() == [[1, 0, 0], [0, 2, 0]]
        assert weight.density == 0.5


def test_gradients_pass_through_from_dense_and_to_dense():
    dense = masked(5, 7, 0.4).requires_grad_()
    weight = SparseWeight.from_dense(dense)
    (grad,) = torch.autograd.grad((weight.to_dense() * 3).sum(), dense)
    assert torch.equal(grad, 3.0 * (dense != 0))


def test_with_values_keeps_the_support():
    weight = SparseWeight.from_dense(masked(5, 7, 0.4))
    doubled = weight.with_values(2 * weight.values)
    assert torch.equal(doubled.to_dense(), 2 * weight.to_dense())
    assert doubled.rows is weight.rows
    with pytest.raises(ValueError, match=r"values must have shape \(\d+,\) on cpu, got \(3,\) on cpu"):
        weight.with_values(torch.zeros(3))


@pytest.mark.parametrize(
    "columns, offsets, message",
    [
        ([0, 0, 1], [0, 2, 3], r"ascend within a row without duplicates, got 0 then 0 in row 0"),
        ([2, 1, 0], [0, 2, 3], r"ascend within a row without duplicates, got 2 then 1 in row 0"),
        ([0, 3, 1], [0, 2, 3], r"columns must be in \[0, 3\), got 3"),
        ([0, -1, 1], [0, 1, 3], r"columns must be in \[0, 3\), got -1"),
        ([0, 1, 2], [0, 4, 3], r"offsets must rise from 0 to 3"),
        ([0, 1, 2], [1, 2, 3], r"offsets must rise from 0 to 3"),
        ([0, 1, 2], [0, 3], r"offsets must be 3 integers .*, got torch.int64 of shape \(2,\)"),
        ([0, 1], [0, 2, 3], r"columns must be integers .*, one for each of 3 values"),
        ([0.0, 1.0, 2.0], [0, 2, 3], r"columns must be integers .*, got torch.float32"),
    ],
)
def test_wrong_indices_are_refused(columns, offsets, message):
    with pytest.raises(ValueError, match=message):
        SparseWeight.from_rows((2, 3), torch.ones(3), torch.tensor(columns), torch.tensor(offsets))


def test_wrong_values_are_refused():
    for wrong in (torch.tensor([[1.0, torch.nan]]), torch.tensor([[-torch.inf], [0.0]]).double()):
        with pytest.raises(ValueError, match="values must be finite, got 1 that are not"):
            SparseWeight.from_dense(wrong)
    with pytest.raises(ValueError, match=r"weight must be a matrix of floats, got torch.int64 of shape \(1, 1\)"):
        SparseWeight.from_dense(torch.tensor([[1]]))
    with pytest.raises(ValueError, match=r"weight must be a matrix of floats, got torch.float32 of shape \(3,\)"):
        SparseWeight.from_dense(torch.zeros(3))
    with pytest.raises(ValueError, match="values must be a vector of floats, got torch.int64"):
        SparseWeight.from_rows((1, 1), torch.tensor([1]), torch.tensor([0]), torch.tensor([0, 1]))


def test_it_says_what_it_is():
    weight = SparseWeight.from_dense(torch.eye(4))
    assert repr(weight) == "SparseWeight(4 x 4, 4 nonzeros, density 25.000%, torch.float32, cpu)"
