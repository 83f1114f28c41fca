"""The one door to the kernels: picks the backend for a tensor; autograd lives here."""

import torch
from torch import Tensor

from sparsetrain.kernels import cpu, reference


def abs_topk(x: Tensor, k: int) -> Tensor:
    """Keep the k entries of greatest magnitude along the last dimension and set the others to zero.

    Args:
        x: (..., D). The fast CPU path takes float32 and bfloat16; other types and devices take the reference.
        k: entries kept, 0 <= k <= D. Ties go to the lowest index.

    Returns:
        (..., D), differentiable: the gradient passes where the output is not zero.

    Raises:
        ValueError: k is out of range.

    Source: Gao et al. 2025, A.1. Differs: an entry that is kept at exactly 0 gets no gradient.
    """
    if not 0 <= k <= x.shape[-1]:
        raise ValueError(f"k must be in [0, {x.shape[-1]}], the width of x, got {k}")
    if k == x.shape[-1]:
        return x
    if _takes_cpu_path(x):
        return _abs_topk(x, k)
    return reference.abs_topk(x, k)


@torch.no_grad()
def project_(weight: Tensor, k: int, min_per_row: int = 0, min_per_column: int = 0) -> Tensor:
    """Set all but the k entries greatest in magnitude to zero, in place; see `reference.project`.

    Args:
        weight: (M, K) or (M,).
        k: entries kept in all, 0 <= k <= numel.
        min_per_row, min_per_column: entries of each row and column that are kept first, out of the same k.

    Returns:
        `weight` itself.

    Raises:
        ValueError: k is out of range.

    Source: Gao et al. 2025, A.2.
    """
    if not 0 <= k <= weight.numel():
        raise ValueError(f"k must be in [0, {weight.numel()}], the size of the weight, got {k}")
    if k == weight.numel():
        return weight
    backend = cpu if _takes_cpu_path(weight) else reference
    return weight.copy_(backend.project(weight, k, min_per_row, min_per_column))


def _takes_cpu_path(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in cpu.NAMES


# Registered as custom ops so that torch.compile keeps them whole instead of tracing into ctypes.
@torch.library.custom_op("sparsetrain::abs_topk", mutates_args=())
def _abs_topk(x: Tensor, k: int) -> Tensor:
    return cpu.abs_topk(x, k)


@_abs_topk.register_fake
def _(x: Tensor, k: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("sparsetrain::abs_topk_backward", mutates_args=())
def _abs_topk_backward(grad: Tensor, out: Tensor) -> Tensor:
    return cpu.abs_topk_backward(grad, out)


@_abs_topk_backward.register_fake
def _(grad: Tensor, out: Tensor) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _keep_output(ctx, inputs, output) -> None:
    ctx.save_for_backward(output)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    return _abs_topk_backward(grad, ctx.saved_tensors[0]), None


_abs_topk.register_autograd(_backward, setup_context=_keep_output)
