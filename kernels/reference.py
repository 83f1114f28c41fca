"""Every op in plain torch: the definition that each backend is held to. Slow, exact, any float type."""

import torch
from torch import Tensor


def abs_topk(x: Tensor, k: int) -> Tensor:
    """Keep the k entries of greatest magnitude along the last dimension and set the others to zero.

    Args:
        x: (..., D), any float type. NaN counts as larger than every number.
        k: entries kept, 0 <= k <= D. Ties go to the lowest index.

    Returns:
        (..., D). Differentiable: the gradient passes where the output is not zero, so a kept exact zero gets none.

    Source: Gao et al. 2025, A.1.
    """
    return x * _top_mask(x, k)


def project(weight: Tensor, k: int, min_per_row: int = 0, min_per_column: int = 0) -> Tensor:
    """Keep the k entries of a matrix that are greatest in magnitude, after a floor for each row and column.

    Args:
        weight: (M, K) or (M,).
        k: entries kept in all, 0 <= k <= numel.
        min_per_row: the this-many greatest entries of each row are kept first, out of the same k.
        min_per_column: the same for columns. Where the floors together exceed k, the greatest of the floors win.

    Returns:
        The projected weight, the same shape. Ties go to the lowest index.

    Source: Gao et al. 2025, A.2 (top-k by magnitude; at least j = 4 alive in each neuron and attention channel).
    """
    forced = torch.zeros_like(weight, dtype=torch.bool)
    if min_per_row:
        forced |= _top_mask(weight, min_per_row)
    if min_per_column:
        forced |= _top_mask(weight.t(), min_per_column).t()
    forced &= weight != 0  # a row of fewer nonzeros leaves its room to the others
    # Forced entries rank before the others, and among themselves by magnitude.
    rank = weight.abs().double() / (weight.abs().max().double() + 1) + forced
    return weight * _top_mask(rank.flatten(), k).view_as(weight)


def _top_mask(x: Tensor, k: int) -> Tensor:
    order = x.detach().abs().nan_to_num(nan=torch.inf).argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, order[..., :k], True)
