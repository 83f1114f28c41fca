"""The CPU path, for float32 and bfloat16: C that is compiled on first use, and what torch and numpy can do without.

AbsTopK and the projection bisect a threshold; the sparse products and attention (float32 alone) read channel-major
activations. Without a C compiler AbsTopK runs on numpy's quickselect and the products on torch's embedding_bag, the
study's choice for CPUs, which C beats by 1.3 to 2 times (docs/log.md, 2026-11-21); attention runs on its reference.
"""

import ctypes

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.kernels.native import library
from sparsetrain.kernels.reference import is_channel_major
from sparsetrain.kernels.sparse_weight import Order

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


def project(weight: Tensor, k: int, min_per_row: int = 0, min_per_column: int = 0) -> Tensor:
    """`reference.project`."""
    if not min_per_row and not min_per_column:
        return abs_topk(weight.flatten(), k).view_as(weight)
    kept = torch.zeros_like(weight)
    if min_per_row:
        kept = abs_topk(weight, min_per_row)
    if min_per_column:
        by_column = abs_topk(weight.t(), min_per_column).t()
        kept = torch.where(by_column != 0, by_column, kept)
    n_kept = int(kept.count_nonzero())
    if n_kept >= k:
        return abs_topk(kept.flatten(), k).view_as(weight)
    rest = torch.where(kept != 0, 0, weight)
    return kept + abs_topk(rest.flatten(), k - n_kept).view_as(weight)


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


@torch.compiler.assume_constant_result
def has_library() -> bool:
    """Whether the C is there; attention, which has no other fast path, is left to its reference where it is not."""
    return library() is not None


def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, d_head: int) -> tuple[Tensor, Tensor]:
    """`reference.attend` on channels, in float32.

    Args:
        q, k, v: (B, D, T) with the tokens contiguous, slices of wider tensors too.
        sink: (H,), contiguous, or None.
        d_head: channels of a head.

    Returns:
        z (B, D, T), contiguous, and what the backward pass needs, (B, H, 2, T): the greatest logit of each query, in
        powers of two, and the reciprocal of its sum of exponentials over that. Sums are in an order of their own,
        whatever the number of threads.
    """
    sequences, channels, tokens = q.shape
    n_heads = channels // d_head
    z, norm = q.new_empty(q.shape), q.new_empty(sequences, n_heads, 2, tokens)
    sizes = (*_strides(q, k, v), sequences, n_heads, tokens, d_head)
    _call("attend", q.dtype, q, k, v, sink, z, norm, *sizes, threads=_threads(z.numel() * tokens))
    return z, norm


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, z: Tensor, norm: Tensor, d_head: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `attend` at q, k, v (B, D, T), contiguous, and at the sink, for each sequence (B, H)."""
    if grad.stride(-1) != 1:
        grad = transposed(grad.mT.contiguous())
    sequences, channels, tokens = q.shape
    n_heads = channels // d_head
    grads = [q.new_empty(q.shape) for _ in range(3)]
    sink_grad = q.new_empty(sequences, n_heads)
    sizes = (*_strides(q, k, v, grad), sequences, n_heads, tokens, d_head)
    threads = _threads(3 * z.numel() * tokens)
    _call("attend_backward", q.dtype, q, k, v, grad, z, norm, sink, *grads, sink_grad, *sizes, threads=threads)
    return *grads, sink_grad


def _strides(*rows: Tensor) -> list[int]:
    """How far apart the sequences and the channels of each (B, D, T) are."""
    return [stride for x in rows for stride in x.stride()[:2]]


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int | None, threads: int) -> None:
    """Call a C function on tensors, contiguous where it is not told their strides; integers are passed as int64."""
    passed = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else None if a is None else ctypes.c_int64(a)
        for a in arguments
    ]
    getattr(library(), f"{name}_{NAMES[dtype]}")(*passed, ctypes.c_int32(threads))


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
