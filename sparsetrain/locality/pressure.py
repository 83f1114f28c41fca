"""Three ways to make long wires dear, each a function of weights and distances.

Coordinates are those of a matrix's rows (M, sheet) and columns (K, sheet), see `Layout.matrix_coordinates`. Where a
weight (M, K) is held at candidates alone, `at` names them, and what is returned is (E,) as its values are.
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from sparsetrain.locality.positions import LocalityError

At = tuple[Tensor, Tensor]


def distances(rows: Tensor, columns: Tensor, at: At | None = None) -> Tensor:
    """The distance along the axes of each row from each column (M, K), or of the entries `at` (E,) alone.

    Args:
        rows: (M, sheet), float.
        columns: (K, sheet), the same type.
        at: row and column of each candidate, (E,) int64 each.
    """
    if at is not None:
        return (rows[at[0]] - columns[at[1]]).abs().sum(-1)
    total = (rows[:, :1] - columns[:, 0]).abs_()
    for axis in range(1, rows.shape[1]):
        total += (rows[:, axis : axis + 1] - columns[:, axis]).abs_()
    return total


def distance_factor(rows: Tensor, columns: Tensor, beta: float, at: At | None = None) -> Tensor:
    """exp(-beta d), what magnitudes are multiplied with before the greatest are kept: (M, K), or (E,) with `at`.

    Args:
        rows, columns, at: see `distances`.
        beta: 0 or more; 0 is no pressure, 4 is strong.

    Raises:
        LocalityError: beta is negative or not finite.
    """
    if not 0 <= beta < math.inf:
        raise LocalityError(f"beta must be 0 or more and finite, got {beta}; 4 is strong")
    return distances(rows, columns, at).mul_(-beta).exp_()


def scale_of(weight: Tensor) -> Tensor:
    """The mean magnitude of the entries that are not zero, detached, 0-d; 1 where there are none."""
    weight = weight.detach()
    n = weight.count_nonzero()
    return torch.where(n > 0, weight.abs().sum() / n.clamp(min=1), 1.0)


def wire_cost(weight: Tensor, distance: Tensor) -> Tensor:
    """sum |w| d / mean |w|, differentiable in the weight: the cost of a matrix, which its scale does not change.

    Args:
        weight: a matrix or the values of its candidates; of a fused q, k, v each third by itself (`row_parts`).
        distance: of each of its entries, see `distances`.

    Source: Liu et al. 2023 (BIMT), the connection cost.
    Differs: the scale is taken out, since a norm or the next matrix can make up for it; no vertical gap, which is the
        same for every nonzero, whose number is fixed here.
    """
    return (weight.abs() * distance).sum() / scale_of(weight)


def wire_gradient(weight: Tensor, distance: Tensor) -> Tensor:
    """The gradient of `wire_cost`, sign(w) d / mean |w|: 0 where the weight is 0."""
    return weight.detach().sign().mul_(distance).div_(scale_of(weight))


def shrink_(weight: Tensor, distance: Tensor, amount: float) -> None:
    """The proximal step of `wire_cost`, in place: |w| falls by amount x mean |w| x d, at most to zero.

    Args:
        weight, distance: as in `wire_cost`.
        amount: learning rate x lambda, 0 or more.

    Raises:
        LocalityError: the amount is negative.
    """
    if not amount >= 0:
        raise LocalityError(f"the amount to shrink by must be 0 or more, got {amount}")
    less = distance * (amount * scale_of(weight))
    weight.sub_(torch.clamp(weight, -less, less))


def published_cost(
    layers: Iterable[tuple[Tensor, Tensor | None, Tensor]],
    gap: float,
    factor: float = 1.0,
    reduce: Literal["sum", "mean"] = "sum",
    embedding: Tensor | None = None,
) -> Tensor:
    """The connection cost as published, differentiable: |w| (factor x d + gap), and |b| gap for each bias.

    Args:
        layers: weight (M, K), bias (M,) or None (not charged), and distances (M, K) of each layer.
        gap: the vertical distance of two layers.
        factor: of horizontal distances.
        reduce: whether a layer counts with its sum or its mean.
        embedding: a table whose entries are charged a gap each.

    Source: Liu et al. 2023 (BIMT), get_cc of the released notebooks.
    """
    reduced = {"sum": torch.sum, "mean": torch.mean}[reduce]
    terms = [] if embedding is None else [reduced(gap * embedding.abs())]
    for weight, bias, distance in layers:
        terms.append(reduced(weight.abs() * (factor * distance + gap)))
        if bias is not None:
            terms.append(reduced(gap * bias.abs()))
    return torch.stack(terms).sum()
