"""The one door to the kernels: checks arguments, picks the backend, and hands over to what holds the gradients.

Activations may be token-major, (..., T, K) as torch lays them out, or channel-major: the same shape with the tokens
contiguous, x.mT.is_contiguous(). Every op returns the layout it was given. Sparse products read channel-major
activations and convert others, so a model that keeps them channel-major pays for no transposes.

Gradients are first derivatives: what is differentiated twice has lost its dependence on saved tensors.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.kernels import choice, cpu, fused, products, reference
from sparsetrain.kernels.checks import check_attend, check_count, check_k, check_linear, check_loss
from sparsetrain.kernels.choice import BACKENDS, Backend, pick, sparse_pays, using
from sparsetrain.kernels.layout import channel_major, swapped, to_blocks
from sparsetrain.kernels.sparse_weight import SparseWeight

__all__ = [
    "abs_topk", "act_abs_topk", "attend", "channel_major", "dense_gradient", "linear", "next_token_loss",
    "norm_abs_topk", "project_", "sparse_linear", "sparse_pays", "using",
]  # fmt: skip

Activation = Literal["gelu", "gelu_tanh", "relu"]
WIDEST_HEAD = 128  # channels of a head that attention in C is tested with


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias for a dense weight: `torch.nn.functional.linear` that keeps the layout of x.

    Args:
        x: (..., K), token-major or channel-major.
        weight: (M, K). bias: (M,) or None.

    Returns:
        (..., M) in the type of x (of autocast, where it is on) and the layout of x, differentiable in all three.
    """
    if not reference.is_channel_major(x):
        return F.linear(x, weight, bias)
    x = products.autocast(x)
    y = products.DenseLinear.apply(to_blocks(x), weight, bias).mT
    return y.reshape(*x.shape[:-1], weight.shape[0])


def sparse_linear(
    x: Tensor,
    weight: SparseWeight,
    bias: Tensor | None = None,
    backend: Backend = "auto",
    gradient_to: Tensor | SparseWeight | None = None,
) -> Tensor:
    """y = x W^T + bias for a weight that keeps its nonzeros alone.

    Args:
        x: (..., K), finite or not: a NaN reaches the outputs that read it. Channel-major is faster.
        weight: (M, K), on the device of x.
        bias: (M,) or None.
        backend: "cpu" (float32, bfloat16), "triton" (CUDA; float32, bfloat16, float16), "reference" (a dense
            product, any type), or "auto": whichever of the fast one and the dense one the cost model says is
            faster, which is logged once; with `gradient_to` the fast one, since the caller has chosen already.
            "triton rows" and "triton slabs" are its two designs, see `slabs`.
        gradient_to: what the gradient of the weight goes to, in place of `weight.values`, which is then taken as
            values that were read from it: the dense weight (M, K), every entry of which gets its gradient, or a
            SparseWeight of the same shape with more nonzeros, whose values do.

    Returns:
        (..., M) in the type of x (of autocast, where it is on) and the layout of x, differentiable in x, bias, and
        `weight.values` or what `gradient_to` names. Sums are fp32; the gradient of the weight is summed in fp32 too.

    Raises:
        TypeError: `weight` is not a SparseWeight.
        ValueError: shapes or devices do not fit, or the backend cannot run.

    Source: the products of Gao et al. 2025, A.2, which its authors ran dense.
    """
    check_linear(x, weight, bias, gradient_to)
    x = products.autocast(x)
    chosen = choice.pick_product(backend, x, weight, gradient_to is None) if x.numel() else "reference"
    if chosen == "reference":
        if gradient_to is None:
            return reference.sparse_linear(x, weight, bias)
        return linear(x, gradient_to if isinstance(gradient_to, Tensor) else gradient_to.to_dense(), bias)
    blocks = to_blocks(x)
    rows, columns = weight.rows, weight.columns
    bias = None if bias is None else bias.contiguous()
    learnt, wanted = weight.values, rows  # the gradient is wanted at the nonzeros of `wanted`, or everywhere
    if gradient_to is not None:
        dense = isinstance(gradient_to, Tensor)
        learnt, wanted = (gradient_to, None) if dense else (gradient_to.values, gradient_to.rows)
    y = products.SparseLinear.apply(
        blocks, learnt, weight.values.detach().contiguous(), bias, weight.to_column_major, rows, columns, wanted, chosen
    )
    y = y.mT if reference.is_channel_major(x) else swapped(y)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def dense_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a dense weight, from those of y = x W^T: the sum over tokens of grad x^T.

    Args:
        grad: (..., M). x: (..., K), the same tokens; taken in the type of grad.

    Returns:
        (M, K), fp32. Both are read once where they are channel-major.
    """
    if grad.dim() > 2 and reference.is_channel_major(x) != reference.is_channel_major(grad):
        x, grad = channel_major(x), channel_major(grad)
    return products.dense_gradient(to_blocks(grad), to_blocks(x.to(grad.dtype)))


def abs_topk(x: Tensor, k: int, backend: Backend = "auto") -> Tensor:
    """Keep the k entries of greatest magnitude along the last dimension and set the others to zero.

    Args:
        x: (..., D).
        k: entries kept, 0 <= k <= D. Ties go to the lowest index.
        backend: as in `sparse_linear`; "auto" takes the fast one where it takes the type of x.

    Returns:
        (..., D), differentiable: the gradient passes where the output is not zero. For k = D it is x itself.

    Raises:
        ValueError: k is out of range, or the backend cannot run.

    Source: Gao et al. 2025, A.1. Differs: an entry that is kept at exactly 0 gets no gradient.
    """
    check_k(x, k)
    chosen = pick(backend, x, longest=x.shape[-1])
    if k == x.shape[-1]:
        return x
    return reference.abs_topk(x, k) if chosen == "reference" else fused.abs_topk(x, k, chosen)


def norm_abs_topk(x: Tensor, gain: Tensor, eps: float, k: int, backend: Backend = "auto") -> Tensor:
    """RMSNorm over the last dimension, then AbsTopK.

    Args:
        x: (..., D).
        gain: (D,), on the device of x.
        eps: added to the mean of the squares.
        k: entries kept, 0 <= k <= D; D keeps all.
        backend: as in `abs_topk`. On a CPU float32 is fused; other types and devices take torch's norm first.

    Returns:
        (..., D) in the layout of x, differentiable in x and gain: the gradient passes where the output is not zero,
        or everywhere for k = D.

    Raises:
        ValueError: shapes or devices do not fit, or the backend cannot run.

    Source: Gao et al. 2025, A.1.
    """
    check_k(x, k)
    if tuple(gain.shape) != (x.shape[-1],) or gain.device != x.device:
        raise ValueError(
            f"gain must have shape ({x.shape[-1]},) on {x.device}, as the channels of x, got {tuple(gain.shape)} on "
            f"{gain.device}"
        )
    chosen = pick(backend, x, longest=x.shape[-1])
    if chosen == "reference":
        return reference.norm_abs_topk(x, gain, eps, k)
    if chosen == "cpu" and x.dtype == gain.dtype == torch.float32:
        return fused.NormAbsTopk.apply(x, gain, eps, k)
    if reference.is_channel_major(x):  # torch's norm would turn it token-major
        normed = reference.norm_abs_topk(x if x.dtype == torch.float64 else x.float(), gain, eps, x.shape[-1])
        return abs_topk(normed.to(x.dtype), k, chosen)
    return abs_topk(F.rms_norm(x, gain.shape, gain, eps), k, chosen)


def act_abs_topk(x: Tensor, k: int, activation: Activation, backend: Backend = "auto") -> Tensor:
    """An activation function, then AbsTopK.

    Args:
        x: (..., D).
        k: entries kept, 0 <= k <= D; D keeps all.
        activation: "gelu" (exact, with the error function), "gelu_tanh" (GPT-2's approximation) or "relu".
        backend: as in `abs_topk`. On a CPU float32 is fused, but for "gelu_tanh"; what is not takes torch's activation
            first.

    Returns:
        (..., D) in the layout of x, differentiable: the gradient passes where the output is not zero, or everywhere
        for k = D.

    Raises:
        ValueError: k is out of range, the activation is unknown, or the backend cannot run.

    Source: Gao et al. 2025, A.1.
    """
    check_k(x, k)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}")
    chosen = pick(backend, x, longest=x.shape[-1])
    if chosen == "reference":
        return reference.act_abs_topk(x, k, activation)
    if chosen == "cpu" and x.dtype == torch.float32 and k < x.shape[-1] and activation in cpu.BEFORE:
        return fused.ActAbsTopk.apply(x, k, activation)
    return abs_topk(reference.ACTIVATIONS[activation](x), k, chosen)


def next_token_loss(
    logits: Tensor, table: Tensor | None, tokens: Tensor, targets: Tensor, backend: Backend = "auto"
) -> Tensor:
    """Mean cross-entropy, in nats, of logits + table[tokens]; outside autocast, in float32 or float64.

    Args:
        logits: (B, T, V). Channel-major is faster.
        table: (V, V), to each current token what it adds to the logits (the bigram table), or None.
        tokens: (B, T) int64, the current tokens. targets: (B, T) int64, the next ones.
        backend: "cpu", "reference", or "auto", which takes "cpu" for what is on a CPU and not float64.

    Returns:
        0-d, differentiable in logits and table. With "cpu" the gradient of the logits is written along with the loss,
        in place of a second tensor of their size, and the table's is summed in the order of the tokens.

    Raises:
        ValueError: shapes, types or devices do not fit, a token is not in [0, V), or the backend cannot run.

    Source: Gao et al. 2025, A.1 (the dense bigram table).
    """
    check_loss(logits, table, tokens, targets)
    chosen = pick(backend, logits, ("auto", "reference", "cpu"))
    with torch.autocast(logits.device.type, enabled=False):
        if chosen != "cpu":
            return reference.next_token_loss(logits, table, tokens, targets)
        logits, table = logits.float(), None if table is None else table.float()
        if torch.is_grad_enabled() and (logits.requires_grad or (table is not None and table.requires_grad)):
            return fused.NextTokenLoss.apply(logits, table, tokens, targets)
        return fused.next_token_loss(logits, table, tokens, targets, False)[0]


def attend(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, d_head: int, causal: bool = True, backend: Backend = "auto"
) -> Tensor:
    """Softmax attention, scaled by 1 / sqrt(d_head), with an optional learnt logit in each head's denominator.

    Args:
        q, k, v: (B, T, D), token-major, channel-major, or slices of channels of either; channel-major is faster. Heads
            are groups of d_head neighbouring channels. Channels of k and v that are exactly zero cost no time on a
            CPU, and there a NaN or an infinity that only meets such zeros is not seen.
        sink: (H,) logits, or None.
        d_head: channels of a head.
        causal: whether each position sees itself and what comes before it alone, or all positions.
        backend: "cpu" (float32, causal, d_head up to 128), "reference" (torch's own attention), or "auto": "cpu" where
            it runs.

    Returns:
        (B, T, D) in the layout of q, differentiable in q, k, v and sink, at their zeros too. Where every key loses
        to the sink, the output tends to zero.

    Raises:
        ValueError: shapes, types or devices do not fit, or the backend cannot run.

    Source: Gao et al. 2025, A.1 (attention sinks).
    """
    check_attend(q, k, v, sink, d_head)
    chosen = pick(backend, q, ("auto", "reference", "cpu"), types=(torch.float32,))
    if chosen == "cpu" and (d_head > WIDEST_HEAD or not causal):
        if backend == "cpu":
            got = f"got {d_head} and causal={causal}; use 'auto'"
            raise ValueError(f"d_head must be at most {WIDEST_HEAD} and causal True for backend 'cpu', {got}")
        chosen = "reference"
    if chosen == "reference" or not q.numel() or not cpu.has_library():
        z = reference.attend(q, k, v, sink, d_head, causal)
        return channel_major(z) if reference.tokens_contiguous(q) else z
    rows = (x.mT if reference.tokens_contiguous(x) else swapped(x) for x in (q, k, v))  # (B, D, T)
    z, _ = fused.attend(*rows, None if sink is None else sink.to(q.dtype).contiguous(), d_head)
    return z.mT if reference.tokens_contiguous(q) else swapped(z)


@torch.no_grad()
def project_(
    weight: Tensor | SparseWeight, k: int, min_per_row: int = 0, min_per_column: int = 0, backend: Backend = "auto"
) -> Tensor | SparseWeight:
    """Set all but the k entries greatest in magnitude to zero, in place; see `reference.project`.

    Args:
        weight: (M, K), (M,), or a SparseWeight, whose values are projected among themselves: its support stays, and
            nothing as large as the matrix is built.
        k: entries kept in all, 0 <= k <= numel, or E for a SparseWeight.
        min_per_row, min_per_column: entries of each row and column (of those that a SparseWeight stores) that are kept
            first, out of the same k.
        backend: as in `abs_topk`; a SparseWeight takes "cpu", "reference" and "auto".

    Returns:
        `weight` itself.

    Raises:
        ValueError: k or a floor is out of range or no integer, the backend cannot run, or the values of a
            SparseWeight are part of a graph.

    Source: Gao et al. 2025, A.2.
    """
    is_sparse = isinstance(weight, SparseWeight)
    values = weight.values if is_sparse else weight
    if len(weight.shape) not in (1, 2):
        raise ValueError(f"weight must be a matrix or a vector, got shape {tuple(weight.shape)}")
    if is_sparse and values.grad_fn is not None:
        raise ValueError("values of weight must not be part of a graph, for they are changed in place; detach them")
    check_count("k", k, values.numel(), ", the nonzeros of the weight," if is_sparse else ", the size of the weight,")
    for name, floor, size in (
        ("min_per_row", min_per_row, weight.shape[-1]),
        ("min_per_column", min_per_column, weight.shape[0]),
    ):
        if floor:
            most = size if len(weight.shape) == 2 else 0
            check_count(name, floor, most, f" for a weight of shape {tuple(weight.shape)},")
    longest = max(weight.shape) if min_per_row or min_per_column else 0
    chosen = pick(backend, values, BACKENDS[:3] if is_sparse else BACKENDS, longest)
    if k == values.numel():
        return weight
    budget = (k, min_per_row, min_per_column)
    if chosen == "cpu":
        (cpu.project_support_ if is_sparse else cpu.project_)(weight, *budget)
    elif is_sparse:
        values.copy_(reference.project_support(weight, *budget))
    else:
        weight.copy_(choice.module(chosen, "project").project(weight, *budget))
    return weight
