"""The CPU path, for float32 and bfloat16: C that is compiled on first use, and what torch and numpy can do without.

AbsTopK bisects a threshold, the projection samples one; the sparse products read channel-major activations. Without a
C compiler AbsTopK runs on numpy's quickselect, the projection is its definition, and the products run on torch's
embedding_bag, the study's choice for CPUs, which C beats by 1.3 to 2 times (docs/log.md, 2026-11-21).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from sparsetrain.kernels import reference
from sparsetrain.kernels.native import call, library
from sparsetrain.kernels.reference import is_channel_major
from sparsetrain.kernels.sparse_weight import Order, SparseWeight

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
SMALL = 1 << 21  # multiply-adds, or elements, below which a second thread costs more than it brings


def abs_topk(x: Tensor, k: int) -> Tensor:
    """`reference.abs_topk` without its gradient. The result has the layout of x, token-major or channel-major."""
    if library() is None:
        return _abs_topk_numpy(x, k)
    down = is_channel_major(x)
    x = x if down else x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    if not x.numel():
        return out
    threads = _threads(16 * x.numel())  # a bisection reads x this many times, more or less
    if down:
        tokens = x.shape[-2]
        _call("abs_topk_down", x.dtype, x, out, x.numel() // (width * tokens), width, tokens, k, threads=threads)
    else:
        _call("abs_topk", x.dtype, x, out, x.numel() // width, width, k, threads=threads)
    return out


def abs_topk_backward(grad: Tensor, out: Tensor) -> Tensor:
    """The gradient of `abs_topk` at its input, from its output, in the layout of the output."""
    if library() is None:
        return torch.where(out != 0, grad, 0)
    grad = grad.mT.contiguous().mT if is_channel_major(out) else grad.contiguous()
    in_grad = torch.empty_like(grad)
    _call("abs_topk_backward", grad.dtype, grad, out, in_grad, grad.numel(), threads=_threads(grad.numel()))
    return in_grad


def project_(weight: Tensor, k: int, min_per_row: int = 0, min_per_column: int = 0) -> None:
    """`reference.project`, in place."""
    if library() is None:
        weight.copy_(reference.project(weight, k, min_per_row, min_per_column))
    elif weight.dtype != torch.float32 or not weight.is_contiguous():
        copy = weight.float().contiguous()  # float32 holds every bfloat16, in the same order
        project_(copy, k, min_per_row, min_per_column)
        weight.copy_(copy)
    elif weight.numel():
        threads = _threads(weight.numel() // 2)  # a second thread pays late: three barriers, and memory sets the pace
        call("project", weight, weight.numel(), weight.shape[-1], k, min_per_row, min_per_column, threads=threads)
        increment_version(weight)


def project_support_(weight: SparseWeight, k: int, min_per_row: int = 0, min_per_column: int = 0) -> None:
    """`reference.project_support`, in place."""
    values = weight.values
    if library() is None:
        values.copy_(reference.project_support(weight, k, min_per_row, min_per_column))
    elif values.dtype != torch.float32 or not values.is_contiguous():
        copy = weight.with_values(values.float().contiguous())
        project_support_(copy, k, min_per_row, min_per_column)
        values.copy_(copy.values)
    else:
        orders = (weight.rows.offsets, weight.columns.offsets, weight.to_column_major)
        call("project_support", values, *orders, *weight.shape, k, min_per_row, min_per_column)
        increment_version(values)


def matmul(x: Tensor, values: Tensor, order: Order, bias: Tensor | None = None) -> Tensor:
    """A x + bias for a sparse A (L, K) and channel-major x.

    Args:
        x: (B, K, T), contiguous.
        values: (E,) in the order of `order`.
        order: the L lines of A.
        bias: (L,) or None.

    Returns:
        (B, L, T) in the type of x. Sums are fp32, in the order of the nonzeros, whatever the number of threads.
    """
    values = values.float()
    bias = None if bias is None else bias.float()
    if library() is None:
        return _matmul_bags(x, values, order, bias)
    blocks, channels, tokens = x.shape
    y = x.new_empty(blocks, order.n_lines, tokens)
    if y.numel():
        threads = _threads(order.indices.numel() * blocks * tokens)
        sizes = (order.n_lines, channels, tokens, blocks)
        _call("matmul", x.dtype, x, y, values, order.indices, order.offsets, bias, *sizes, threads=threads)
    return y


def sampled_matmul(y: Tensor, x: Tensor, order: Order) -> Tensor:
    """The entries of sum over b of y[b] x[b]^T at the nonzeros of a sparse (L, K): the gradient of its values.

    Args:
        y: (B, L, T), contiguous. x: (B, K, T), contiguous, the same type.
        order: where the nonzeros are.

    Returns:
        (E,) float32, in the order of `order`.
    """
    if library() is None:
        return _sampled_matmul_bags(y, x, order)
    blocks, channels, tokens = x.shape
    grad = torch.empty(order.indices.numel())
    if grad.numel():
        threads = _threads(grad.numel() * blocks * tokens)
        sizes = (order.n_lines, channels, tokens, blocks)
        _call("sampled_matmul", x.dtype, y, x, grad, order.indices, order.offsets, *sizes, threads=threads)
    return grad


def transposed(x: Tensor) -> Tensor:
    """x.mT (B, C, R) of a contiguous x (B, R, C), contiguous; 2 to 3 times faster than torch's copy."""
    if library() is None:
        return x.mT.clone(memory_format=torch.contiguous_format)
    blocks, rows, columns = x.shape
    y = x.new_empty(blocks, columns, rows)
    if y.numel():
        _call("transpose", x.dtype, x, y, blocks, rows, columns, threads=_threads(x.numel()))
    return y


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int | None, threads: int) -> None:
    call(f"{name}_{NAMES[dtype]}", *arguments, threads=threads)


def _threads(work: int) -> int:
    return torch.get_num_threads() if work > SMALL else 1


def _matmul_bags(x: Tensor, values: Tensor, order: Order, bias: Tensor | None) -> Tensor:
    per_sample = values.to(x.dtype)
    y = x.new_empty(x.shape[0], order.n_lines, x.shape[2])
    for block, out in zip(x, y, strict=True):
        out.copy_(
            F.embedding_bag(
                order.indices, block, order.offsets, mode="sum", per_sample_weights=per_sample, include_last_offset=True
            )
        )
    return y if bias is None else y.add_(bias.to(x.dtype)[:, None])


def _sampled_matmul_bags(y: Tensor, x: Tensor, order: Order) -> Tensor:
    lines = torch.arange(order.n_lines, dtype=torch.int32).repeat_interleave(order.offsets.diff())
    grad = torch.zeros(order.indices.numel())
    for out, block in zip(y, x, strict=True):
        grad += torch.ops.aten._embedding_bag_per_sample_weights_backward(
            out, block, order.indices, order.offsets, lines, 0
        )
    return grad


def _abs_topk_numpy(x: Tensor, k: int) -> Tensor:
    if k == 0:
        return torch.zeros_like(x)
    integer = torch.int32 if x.dtype == torch.float32 else torch.int16
    magnitude = x.contiguous().view(integer) & torch.iinfo(integer).max  # orders as the floats do, NaN above infinity
    kth = x.shape[-1] - k
    threshold = torch.from_numpy(np.partition(magnitude.numpy(), kth, axis=-1)[..., kth : kth + 1])
    above = magnitude > threshold
    tied = magnitude == threshold
    room = k - above.sum(-1, keepdim=True)
    return torch.where(above | (tied & (tied.cumsum(-1) <= room)), x, 0)
