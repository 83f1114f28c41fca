"""The CPU path, for float32 and bfloat16: C that is compiled on first use, and what torch and numpy can do without.

AbsTopK bisects a threshold, the projection samples one; the sparse products and attention (float32 alone) read
channel-major activations. Without a C compiler AbsTopK runs on numpy's quickselect, the projection and attention are
their definitions, and the products run on torch's embedding_bag, the study's choice for CPUs, which C beats by 1.3 to 2
times (docs/log.md, 2026-11-21).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from sparsetrain.kernels import reference
from sparsetrain.kernels.graphs import constant_in_graphs
from sparsetrain.kernels.native import call, library
from sparsetrain.kernels.reference import is_channel_major
from sparsetrain.kernels.sparse_weight import Order, SparseWeight

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
BEFORE = ("nothing", "norm", "gelu", "relu")  # what tiles.c does before AbsTopK, in its order
SMALL = 1 << 21  # multiply-adds, or elements, below which a second thread costs more than it brings
DENSE_ENOUGH = 0.4  # share of nonzeros from which a dense product makes the gradient of a weight faster


def abs_topk(x: Tensor, k: int) -> Tensor:
    """`reference.abs_topk` without its gradient. The result has the layout of x, token-major or channel-major."""
    if library() is None:
        return _laid_out_as(x, _abs_topk_numpy(x, k))
    x = _dense(x)
    out = torch.empty_like(x)
    if not x.numel():
        return out
    if not is_channel_major(x):
        width = x.shape[-1]
        _call("abs_topk", x.dtype, x, out, x.numel() // width, width, k, threads=_threads(16 * x.numel()))
    elif x.dtype == torch.float32:
        _tile_topk("nothing", x, out, k)
    else:
        blocks, width, tokens, _, _ = _tile_sizes(x)
        _call("tile_topk", x.dtype, x, out, blocks, width, tokens, k, threads=_threads(16 * x.numel()))
    return out


def abs_topk_backward(grad: Tensor, out: Tensor) -> Tensor:
    """The gradient of `abs_topk` at its input, from its output, in the layout of the output."""
    if library() is None:
        return torch.where(out != 0, grad, 0)
    grad = _laid_out_as(out, grad)
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


def norm_abs_topk(x: Tensor, gain: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor]:
    """`reference.norm_abs_topk` of float32 without its gradient, and what each token was multiplied by.

    Returns:
        (..., D) in the layout of x, and (...): the reciprocal of each token's root mean square.
    """
    if library() is None:
        scales = (x.square().mean(-1) + eps).rsqrt()
        y = x * scales[..., None] * gain
        return (y if k == x.shape[-1] else abs_topk(y, k)), scales
    x = _dense(x)
    out, scales = torch.empty_like(x), x.new_empty(x.shape[:-1])
    _tile_topk("norm", x, out, k, gain.contiguous(), scales, eps)
    return out, scales


def norm_abs_topk_backward(
    grad: Tensor, x: Tensor, gain: Tensor, scales: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of `norm_abs_topk` at x and gain; `out` is its output, or None where all of it was kept."""
    if library() is None:
        grad = grad if out is None else torch.where(out != 0, grad, 0)
        normed = x * scales[..., None]
        along = (grad * gain * normed).mean(-1, keepdim=True)
        return (grad * gain - normed * along) * scales[..., None], (grad * normed).reshape(-1, gain.numel()).sum(0)
    x = _dense(x)
    grad = _laid_out_as(x, grad)
    x_grad, gain_grad = torch.empty_like(x), torch.zeros_like(gain)
    if x.numel():
        _call(
            "norm_abs_topk_backward", x.dtype, grad, x, gain.contiguous(), scales, out, x_grad, gain_grad,
            *_tile_sizes(x), threads=_threads(8 * x.numel()),
        )  # fmt: skip
    return x_grad, gain_grad


def act_abs_topk(x: Tensor, k: int, activation: str) -> Tensor:
    """`reference.act_abs_topk` of float32 without its gradient, in the layout of x."""
    if library() is None:
        return reference.act_abs_topk(x, k, activation)
    x = _dense(x)
    out = torch.empty_like(x)
    _tile_topk(activation, x, out, k)
    return out


def gelu_abs_topk_backward(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """The gradient of `act_abs_topk` with "gelu" at x, from x and its output, in the layout of the output."""
    if library() is None:
        return torch.ops.aten.gelu_backward(torch.where(out != 0, grad, 0), x)
    grad, x = _laid_out_as(out, grad), _laid_out_as(out, x)
    x_grad = torch.empty_like(grad)
    sizes = (grad, x, out, x_grad, grad.numel())
    _call("gelu_abs_topk_backward", x.dtype, *sizes, threads=_threads(8 * grad.numel()))
    return x_grad


def next_token_loss(
    logits: Tensor, table: Tensor | None, tokens: Tensor, targets: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """`reference.next_token_loss` of float32, and its gradient at the logits, which costs little more.

    Returns:
        0-d, and (B, T, V) in the layout of the logits; empty if there shall be no gradient.

    Raises:
        ValueError: a token or target is not in [0, V).
    """
    vocab = logits.shape[-1]
    for name, ids in (("tokens", tokens), ("targets", targets)):
        least, most = ids.aminmax()
        if least < 0 or most >= vocab:
            raise ValueError(f"{name} must be in [0, {vocab}), the width of the logits, got {least} to {most}")
    if library() is None:
        return _next_token_loss_torch(logits, table, tokens, targets, with_gradient)
    logits = _dense(logits)
    losses = logits.new_empty(tokens.shape)
    gradient = torch.empty_like(logits) if with_gradient else None
    table = None if table is None else table.contiguous()
    blocks, width, n_tokens, step, stride = _tile_sizes(logits)
    _call(
        "next_token_loss", logits.dtype, logits, table, tokens.contiguous(), targets.contiguous(), losses, gradient,
        blocks, width, n_tokens, step, stride, threads=_threads(8 * logits.numel()),
    )  # fmt: skip
    return _mean(losses), logits.new_empty(0) if gradient is None else gradient


def table_gradient(gradient: Tensor, tokens: Tensor) -> Tensor:
    """The gradient of `next_token_loss` at the table (V, V), from that at the logits (B, T, V).

    Each entry is summed over the tokens in their order, whatever the number of threads.
    """
    vocab = gradient.shape[-1]
    if library() is None:
        return gradient.new_zeros(vocab, vocab).index_add_(0, tokens.flatten(), gradient.flatten(0, -2))
    gradient = _dense(gradient)
    table_grad = gradient.new_empty(vocab, vocab)
    _call(
        "table_gradient", gradient.dtype, gradient, tokens.contiguous(), table_grad, *_tile_sizes(gradient),
        threads=_threads(8 * gradient.numel()),
    )  # fmt: skip
    return table_grad


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


def dense_gradient(y: Tensor, x: Tensor) -> Tensor:
    """The sum over b of y[b] x[b]^T, fp32: the gradient of a dense weight. Faster where y is mostly exact zeros.

    Args:
        y: (B, M, T), contiguous. x: (B, K, T), contiguous, the same type.

    Returns:
        (M, K) float32. Above a share of nonzeros of DENSE_ENOUGH in the first block of y, float32 takes dense products.
    """
    blocks, rows, tokens = y.shape
    assert x.shape[::2] == (blocks, tokens), "both must be in the same blocks"
    exact = y.dtype == torch.float32
    if library() is None or not y.numel() or (exact and int(y[0].count_nonzero()) > DENSE_ENOUGH * y[0].numel()):
        grad = torch.zeros(rows, x.shape[1])
        for a, b in zip(y, x, strict=True):
            grad.addmm_(a.float(), b.float().mT)
        return grad
    grad = torch.empty(rows, x.shape[1])
    threads = _threads(grad.numel() * blocks * tokens)
    _call("dense_gradient", y.dtype, y, x, grad, rows, x.shape[1], tokens, blocks, threads=threads)
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


@constant_in_graphs
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


def _dense(x: Tensor) -> Tensor:
    """x, or a token-major copy of what is neither token-major nor channel-major."""
    return x if is_channel_major(x) else x.contiguous()


def _laid_out_as(like: Tensor, x: Tensor) -> Tensor:
    """x in the layout of `like`, channel-major or token-major; a copy if it has another."""
    return x.mT.contiguous().mT if is_channel_major(like) else x.contiguous()


def _tile_sizes(x: Tensor) -> tuple[int, int, int, int, int]:
    """Blocks, channels and tokens of x, how far apart its channels lie, and how far its tokens."""
    width = x.shape[-1]
    if is_channel_major(x):
        tokens = x.shape[-2]
        return x.numel() // (width * tokens), width, tokens, tokens, 1
    return 1, width, x.numel() // width, 1, width


def _tile_topk(
    before: str,
    x: Tensor,
    out: Tensor,
    k: int,
    gain: Tensor | None = None,
    scales: Tensor | None = None,
    eps: float = 0,
) -> None:  # fmt: skip
    """Write AbsTopK of what `before` names into `out`."""
    if x.numel():
        threads = _threads(16 * x.numel())  # reads x about this many times
        sizes = _tile_sizes(x)
        _call("tile_topk", x.dtype, x, out, gain, scales, BEFORE.index(before), *sizes, k, eps, threads=threads)


def _mean(losses: Tensor) -> Tensor:
    """Summed row by row, since torch splits a full sum by thread."""
    return losses.double().sum(-1).sum(-1).div(losses.numel()).to(losses.dtype)


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int | None, threads: int) -> None:
    call(f"{name}_{NAMES[dtype]}", *arguments, threads=threads)


def _threads(work: int) -> int:
    return torch.get_num_threads() if work > SMALL else 1


def _next_token_loss_torch(
    logits: Tensor, table: Tensor | None, tokens: Tensor, targets: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    y = logits if table is None else logits + F.embedding(tokens, table)
    log_p = y.log_softmax(-1)
    loss = _mean(-log_p.gather(-1, targets[..., None]).squeeze(-1))
    if not with_gradient:
        return loss, logits.new_empty(0)
    gradient = log_p.exp_().scatter_add_(-1, targets[..., None], -torch.ones_like(targets[..., None], dtype=y.dtype))
    return loss, _laid_out_as(logits, gradient.div_(targets.numel()))


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
