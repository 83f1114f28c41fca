"""Every op in plain torch: the definition that each backend is held to. Slow, exact, any float type."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.kernels.sparse_weight import SparseWeight

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}


def sparse_linear(x: Tensor, weight: SparseWeight, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias, as a dense product with the weight written out.

    Args:
        x: (..., K), any float type.
        weight: (M, K); its values are rounded to the type of x.
        bias: (M,) or None.

    Returns:
        (..., M) in the type of x and, where x is channel-major, channel-major. Differentiable in x, values and bias.
    """
    dense = weight.to_dense().to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if not is_channel_major(x):
        return F.linear(x, dense, bias)
    y = (dense @ x.mT).mT
    return y if bias is None else y + bias


def is_channel_major(x: Tensor) -> bool:
    """Whether the tokens of x (..., T, K) are contiguous, channel by channel, and its channels are not."""
    return x.dim() > 1 and x.mT.is_contiguous() and not x.is_contiguous()


def abs_topk(x: Tensor, k: int) -> Tensor:
    """Keep the k entries of greatest magnitude along the last dimension and set the others to zero.

    Args:
        x: (..., D), any float type. NaN counts as larger than every number.
        k: entries kept, 0 <= k <= D. Ties go to the lowest index.

    Returns:
        (..., D). Differentiable: the gradient passes where the output is not zero, so a kept exact zero gets none.

    Source: Gao et al. 2025, A.1.
    """
    return torch.where(_top_mask(x, k) & (x != 0), x, 0)


def norm_abs_topk(x: Tensor, gain: Tensor, eps: float, k: int) -> Tensor:
    """RMSNorm over the last dimension, then AbsTopK.

    Args:
        x: (..., D), any float type.
        gain: (D,), what each channel is multiplied by.
        eps: added to the mean of the squares.
        k: entries kept, 0 <= k <= D; D keeps all, and passes the gradient to all.

    Returns:
        (..., D). Differentiable in x and gain, where the output is not zero.

    Source: Zhang and Sennrich 2019, *Root Mean Square Layer Normalization*; Gao et al. 2025, A.1.
    """
    y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gain
    return y if k == x.shape[-1] else abs_topk(y, k)


def act_abs_topk(x: Tensor, k: int, activation: str) -> Tensor:
    """An activation function, then AbsTopK.

    Args:
        x: (..., D), any float type.
        k: entries kept, 0 <= k <= D; D keeps all, and passes the gradient to all.
        activation: "gelu" (exact, with the error function), "gelu_tanh" (GPT-2's approximation) or "relu".

    Returns:
        (..., D). Differentiable, where the output is not zero.

    Source: Gao et al. 2025, A.1.
    """
    y = ACTIVATIONS[activation](x)
    return y if k == x.shape[-1] else abs_topk(y, k)


def next_token_loss(logits: Tensor, table: Tensor | None, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of logits + table[tokens].

    Args:
        logits: (B, T, V), any float type; computed in float32 where it is narrower.
        table: (V, V), to each current token what it adds to the logits, or None.
        tokens: (B, T) int64, the current tokens. targets: (B, T) int64, the next ones.

    Returns:
        0-d, float32 or float64. Differentiable in logits and table.

    Source: Gao et al. 2025, A.1 (the dense bigram table).
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    if table is not None:
        logits = logits + F.embedding(tokens, table.to(logits.dtype))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


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
    return _keep(weight.flatten(), forced.flatten(), k).view(weight.shape)


def project_support(weight: SparseWeight, k: int, min_per_row: int = 0, min_per_column: int = 0) -> Tensor:
    """`project` for the values of a sparse weight, with the floors held among the entries it stores.

    Args:
        weight: (M, K).
        k: values kept in all, 0 <= k <= E.
        min_per_row: the this-many greatest stored entries of each row are kept first, out of the same k.
        min_per_column: the same for columns. Where the floors together exceed k, the greatest of the floors win.

    Returns:
        (E,) the values, all but k of them zero. Ties go to the first in row-major order.
    """
    forced = torch.zeros_like(weight.values, dtype=torch.bool)
    lines = (weight.rows, weight.row_of_each(), min_per_row), (weight.columns, weight.rows.indices, min_per_column)
    by_size = _descending(weight.values)
    for order, line, n_least in lines:
        by_line = by_size[line[by_size].argsort(stable=True)]  # line by line, each by size
        rank = torch.arange(weight.n_nonzero, device=line.device) - order.offsets[line[by_line].long()]
        forced[by_line[rank < n_least]] = True
    return _keep(weight.values, forced & (weight.values != 0), k)


def _keep(x: Tensor, forced: Tensor, k: int) -> Tensor:
    """x (N,) with all but k entries zero: those that are forced are kept first, then the greatest."""
    by_size = _descending(x)
    order = by_size[(~forced[by_size]).argsort(stable=True)]  # forced entries first, each part by size
    kept = torch.zeros_like(forced)
    kept[order[:k]] = True
    return torch.where(kept, x, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, d_head: int, causal: bool = True) -> Tensor:
    """Softmax attention, scaled by 1 / sqrt(d_head), with an optional learnt logit in each head's denominator.

    Args:
        q, k, v: (B, T, D), any float type; heads are groups of d_head neighbouring channels.
        sink: (H,) logits, or None.
        d_head: channels of a head.
        causal: whether each position sees itself and what comes before it alone, or all positions.

    Returns:
        (B, T, D), channel-major where q is. Where every key loses to the sink, the output tends to zero.

    Source: Gao et al. 2025, A.1 (attention sinks). Differs: no T x T mask. The sink is a key at position -1 whose
    value is zero and whose logit comes from an extra feature, q' = [q, 1, 0...] and k' = [0, sink x sqrt(K), 0...].
    One unused query keeps the matrix square, and the features are padded to a multiple of 8, as the fast causal
    kernels of a GPU ask.
    """
    by_channel = tokens_contiguous(q)
    scale = 1 / math.sqrt(d_head)
    if sink is None:  # the fast kernels ask for contiguous channels; with a sink, padding makes them so
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    q, k, v = (x.unflatten(-1, (-1, d_head)).transpose(1, 2) for x in (q, k, v))  # (B, H, T, K)
    if sink is not None:
        extra = 8 - d_head % 8
        logit = (sink / scale).to(q.dtype)[None, :, None, None].expand(q.shape[0], -1, 1, 1)
        q = F.pad(F.pad(q, (0, 1), value=1.0), (0, extra - 1, 1, 0))
        k = torch.cat([F.pad(logit, (d_head, extra - 1)), F.pad(k, (0, extra))], dim=2)
        v = F.pad(v, (0, extra, 1, 0))
    z = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    if sink is not None:
        z = z[:, :, 1:, :d_head]
    if by_channel:
        return z.mT.flatten(1, 2).mT  # (B, H, K, T), one copy
    return z.transpose(1, 2).flatten(-2)


def tokens_contiguous(x: Tensor) -> bool:
    """Whether x (B, T, D) is channel-major or a slice of channels of what is."""
    return x.stride(-2) == 1 and x.shape[-2] > 1 and x.stride(-1) >= x.shape[-2]


def _top_mask(x: Tensor, k: int) -> Tensor:
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, _descending(x)[..., :k], True)


def _descending(x: Tensor) -> Tensor:
    """Indices along the last dimension by falling magnitude, NaN before infinity, ties by index."""
    return x.detach().abs().argsort(dim=-1, descending=True, stable=True)
