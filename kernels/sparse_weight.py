"""The nonzeros of a weight matrix, in row-major and in column-major order, checked when built."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsetrain.kernels.native import call, library

LARGEST = 2**31 - 1  # offsets and indices are int32: half the bytes of int64, which every kernel reads
SMALL = 1 << 22  # entries of a matrix that one thread searches sooner than two


@dataclass(frozen=True, eq=False)
class Order:
    """Nonzeros grouped by line: CSR where the lines are rows, CSC where they are columns.

    Attributes:
        offsets: (lines + 1,) int32; line i holds the nonzeros offsets[i] to offsets[i + 1].
        indices: (E,) int32, the place of each nonzero within its line, ascending in each line.
        by_length: (lines,) int32, the lines from longest to shortest; a grid that starts the longest first ends evenly.
    """

    offsets: Tensor
    indices: Tensor
    by_length: Tensor

    @property
    def n_lines(self) -> int:
        return self.by_length.numel()

    def to(self, device: torch.device | str) -> "Order":
        return Order(self.offsets.to(device), self.indices.to(device), self.by_length.to(device))


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A weight (M, K) that keeps its E nonzeros alone. Build one with `from_dense` or `from_rows`.

    Attributes:
        shape: (M, K).
        values: (E,), row by row and by column within a row. It may require a gradient, or be part of a graph.
        rows: the nonzeros by row; what y = x W^T and the gradient of `values` read.
        columns: the same nonzeros by column; what the gradient of x reads.
        to_column_major: (E,) int32; values[to_column_major] is in the order of `columns`.

    Source: two orders of one matrix, so that no product needs atomics or a sort, as in MegaBlocks (Gale et al. 2022).
    """

    shape: tuple[int, int]
    values: Tensor
    rows: Order
    columns: Order
    to_column_major: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor) -> "SparseWeight":
        """Keep the entries of `weight` (M, K) that are not zero. A gradient of the values reaches `weight`.

        Raises:
            ValueError: `weight` is not a matrix of finite floats.
        """
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(f"weight must be a matrix of floats, got {weight.dtype} of shape {tuple(weight.shape)}")
        values, columns, offsets, wrong = (_nonzeros_c if _takes_c(weight) else _nonzeros)(weight.detach())
        made = cls._build(tuple(weight.shape), values, columns, offsets, wrong)
        if weight.requires_grad:
            made = made.with_values(weight[made.row_of_each(), columns.long()])
        return made

    @classmethod
    def from_rows(cls, shape: tuple[int, int], values: Tensor, columns: Tensor, offsets: Tensor) -> "SparseWeight":
        """Build from compressed rows (CSR).

        Args:
            shape: (M, K).
            values: (E,) floats, finite; exact zeros are allowed and stay part of the support.
            columns: (E,) integers in [0, K), ascending within a row and without duplicates.
            offsets: (M + 1,) integers from 0 to E, not falling.

        Raises:
            ValueError: names everything that does not hold.
        """
        _check_rows(shape, values, columns, offsets)
        return cls._build(tuple(shape), values, columns.int(), offsets.int(), _not_finite(values))

    @classmethod
    def _build(
        cls, shape: tuple[int, int], values: Tensor, columns: Tensor, offsets: Tensor, wrong: int
    ) -> "SparseWeight":
        """Build from compressed rows in int32, with the number of values that are not finite."""
        if values.numel() > LARGEST or max(shape) > LARGEST:
            raise ValueError(
                f"weight must have fewer than 2^31 nonzeros, rows and columns, got {values.numel()} {shape}"
            )
        if wrong:
            raise ValueError(f"values must be finite, got {wrong} that are not")
        return cls(shape, values, *_orders(shape, columns.contiguous(), offsets.contiguous()))

    def with_values(self, values: Tensor) -> "SparseWeight":
        """The same support with other values (E,); nothing is copied.

        Raises:
            ValueError: the shape or the device differ, or the values are no floats. Whether they are finite is not
                checked again: on a GPU that would wait for it.
        """
        if not values.is_floating_point():
            raise ValueError(f"values must be floats, got {values.dtype}")
        if values.shape != self.values.shape or values.device != self.values.device:
            raise ValueError(
                f"values must have shape {tuple(self.values.shape)} on {self.values.device}, "
                f"got {tuple(values.shape)} on {values.device}"
            )
        return replace(self, values=values)

    def to(self, device: torch.device | str) -> "SparseWeight":
        """The same weight on a device, itself if it is there; a gradient of the values passes."""
        values = self.values.to(device)
        if values is self.values:
            return self
        moved = (self.rows.to(device), self.columns.to(device), self.to_column_major.to(device))
        return SparseWeight(self.shape, values, *moved)

    def without_zeros(self) -> tuple["SparseWeight", Tensor]:
        """Drop the stored entries whose value is exactly zero, without writing the matrix out.

        Returns:
            The others as a weight of their own, whose values pass their gradient to these, and their positions (E',)
            int32 in `values`, ascending. Whether the values are finite is not checked again.
        """
        values, rows = self.values.detach(), self.rows
        if _takes_c(values):
            offsets, places = torch.empty_like(rows.offsets), torch.empty_like(rows.indices)
            call("drop_zeros", values.contiguous(), rows.offsets, self.shape[0], offsets, places)
            places = places[: int(offsets[-1])].clone()
            orders = _orders_c(self.shape, rows.indices.index_select(0, places), offsets)
        else:
            kept = values != 0
            places = kept.nonzero().flatten().int()
            new = _offsets(kept)  # the place of each entry among those that are kept
            in_columns = kept[self.to_column_major]
            orders = (
                _order(new[rows.offsets], rows.indices[kept]),
                _order(_offsets(in_columns)[self.columns.offsets], self.columns.indices[in_columns]),
                new[self.to_column_major[in_columns]],
            )
        return SparseWeight(self.shape, self.values.index_select(0, places), *orders), places

    def to_dense(self) -> Tensor:
        """The matrix (M, K), in the type of `values` and differentiable in them."""
        dense = self.values.new_zeros(self.shape)
        return dense.index_put((self.row_of_each(), self.rows.indices.long()), self.values)

    def row_of_each(self) -> Tensor:
        """(E,) int64: the row of each value."""
        lengths = self.rows.offsets.diff().long()
        lines = torch.arange(self.shape[0], device=self.values.device)
        return torch.repeat_interleave(lines, lengths, output_size=self.n_nonzero)

    @property
    def n_nonzero(self) -> int:
        """E, the nonzeros (stored zeros included)."""
        return self.values.numel()

    @property
    def density(self) -> float:
        """The share of entries that are stored, 0 to 1."""
        return self.n_nonzero / max(1, self.shape[0] * self.shape[1])

    def __repr__(self) -> str:
        m, k = self.shape
        kind = f"{self.values.dtype}, {self.values.device}"
        return f"SparseWeight({m} x {k}, {self.n_nonzero} nonzeros, density {self.density:.3%}, {kind})"


def _takes_c(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() <= LARGEST and library() is not None


def _not_finite(values: Tensor) -> int:
    finite = values.detach().isfinite()
    return 0 if bool(finite.all()) else int((~finite).sum())


def _nonzeros(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Compressed rows (CSR) of what is not zero: values, columns, offsets, and how many values are not finite."""
    row, column = weight.nonzero(as_tuple=True)
    values, lengths = weight[row, column], torch.bincount(row, minlength=weight.shape[0])
    return values, column.int(), _offsets(lengths), _not_finite(values)


def _nonzeros_c(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    weight = weight.contiguous()
    offsets = torch.empty(weight.shape[0] + 1, dtype=torch.int32)
    threads = torch.get_num_threads() if weight.numel() > SMALL else 1
    call("count_nonzeros", weight, *weight.shape, offsets, threads=threads)
    columns = torch.empty(int(offsets[-1]), dtype=torch.int32)
    values = torch.empty(columns.shape)
    wrong = call("take_nonzeros", weight, *weight.shape, offsets, columns, values, threads=threads)
    return values, columns, offsets, wrong


def _orders(shape: tuple[int, int], columns: Tensor, offsets: Tensor) -> tuple[Order, Order, Tensor]:
    """Both orders of nonzeros that are compressed by rows, and what leads from one to the other."""
    if columns.device.type == "cpu" and library() is not None:
        return _orders_c(shape, columns, offsets)
    rows = torch.arange(shape[0], device=offsets.device).repeat_interleave(offsets.diff(), output_size=columns.numel())
    to_column_major = columns.argsort(stable=True)
    by_column = _offsets(torch.bincount(columns, minlength=shape[1]))
    return _order(offsets, columns), _order(by_column, rows[to_column_major].int()), to_column_major.int()


def _orders_c(shape: tuple[int, int], columns: Tensor, offsets: Tensor) -> tuple[Order, Order, Tensor]:
    rows = Order(offsets, columns, torch.empty(shape[0], dtype=torch.int32))
    by_column = Order(*(torch.empty(n, dtype=torch.int32) for n in (shape[1] + 1, columns.numel(), shape[1])))
    to_column_major = torch.empty_like(columns)
    call(
        "order_columns", offsets, columns, *shape, rows.by_length, by_column.offsets, by_column.indices,
        by_column.by_length, to_column_major,
    )  # fmt: skip
    return rows, by_column, to_column_major


def _order(offsets: Tensor, indices: Tensor) -> Order:
    return Order(offsets, indices, offsets.diff().argsort(descending=True, stable=True).int())


def _offsets(lengths: Tensor) -> Tensor:
    """(n + 1,) int32: where each of n lines of these lengths begins, and where the last ends."""
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int32, device=lengths.device)
    offsets[1:] = lengths.cumsum(0)
    return offsets


def _check_rows(shape: tuple[int, int], values: Tensor, columns: Tensor, offsets: Tensor) -> None:
    n_rows, n_columns = shape
    integers = (torch.int32, torch.int64)
    problems = []
    if values.dim() != 1 or not values.is_floating_point():
        problems.append(f"values must be a vector of floats, got {values.dtype} of shape {tuple(values.shape)}")
    if columns.shape != values.shape or columns.dtype not in integers:
        problems.append(
            f"columns must be integers (int32 or int64), one for each of {values.numel()} values, "
            f"got {columns.dtype} of shape {tuple(columns.shape)}"
        )
    if tuple(offsets.shape) != (n_rows + 1,) or offsets.dtype not in integers:
        problems.append(
            f"offsets must be {n_rows + 1} integers (int32 or int64), one more than rows, "
            f"got {offsets.dtype} of shape {tuple(offsets.shape)}"
        )
    if len({t.device for t in (values, columns, offsets)}) > 1:
        problems.append(f"all must lie on one device, got {values.device}, {columns.device}, {offsets.device}")
    if not problems:
        problems += _check_indices(n_columns, values.numel(), columns.long(), offsets.long())
    if problems:
        raise ValueError("; ".join(problems))


def _check_indices(n_columns: int, n_values: int, columns: Tensor, offsets: Tensor) -> list[str]:
    if int(offsets[0]) != 0 or int(offsets[-1]) != n_values or bool((offsets.diff() < 0).any()):
        return [f"offsets must rise from 0 to {n_values}, the number of values, got {offsets.tolist()[:8]}..."]
    problems = []
    outside = (columns < 0) | (columns >= n_columns)
    if bool(outside.any()):
        problems.append(f"columns must be in [0, {n_columns}), got {int(columns[outside][0])}")
    row = torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=columns.device), offsets.diff())
    same_row = row[1:] == row[:-1]
    unsorted = same_row & (columns[1:] <= columns[:-1])
    if bool(unsorted.any()):
        at = int(unsorted.nonzero()[0, 0])
        problems.append(
            "columns must ascend within a row without duplicates, "
            f"got {int(columns[at])} then {int(columns[at + 1])} in row {int(row[at])}"
        )
    return problems
