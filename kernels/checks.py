"""What the arguments of an op must be, said all at once where they are not."""

from numbers import Integral

import torch
from torch import Tensor

from sparsetrain.kernels.sparse_weight import SparseWeight


def check_count(name: str, count: int, most: int, what: str) -> None:
    if not isinstance(count, Integral):
        raise ValueError(f"{name} must be an integer, got {count!r}")
    if not 0 <= count <= most:
        raise ValueError(f"{name} must be in [0, {most}]{what} got {count}")


def check_k(x: Tensor, k: int) -> None:
    if x.dim() == 0:
        raise ValueError("x must have a dimension to select along, got a 0-d tensor")
    check_count("k", k, x.shape[-1], ", the width of x,")


def check_loss(logits: Tensor, table: Tensor | None, tokens: Tensor, targets: Tensor) -> None:
    problems = []
    if logits.dim() != 3 or not logits.is_floating_point() or not logits.numel():
        problems.append(f"logits must hold floats (B, T, V), got {logits.dtype} of shape {tuple(logits.shape)}")
    vocab = logits.shape[-1] if logits.dim() else 0
    if table is not None and (tuple(table.shape) != (vocab, vocab) or table.device != logits.device):
        problems.append(
            f"table must have shape ({vocab}, {vocab}) on {logits.device}, as the logits, got {tuple(table.shape)} on "
            f"{table.device}"
        )
    for name, ids in (("tokens", tokens), ("targets", targets)):
        if ids.shape != logits.shape[:-1] or ids.dtype != torch.int64 or ids.device != logits.device:
            problems.append(
                f"{name} must be int64 of shape {tuple(logits.shape[:-1])} on {logits.device}, got {ids.dtype} of "
                f"shape {tuple(ids.shape)} on {ids.device}"
            )
    if problems:
        raise ValueError("; ".join(problems))


def check_linear(
    x: Tensor, weight: SparseWeight, bias: Tensor | None, gradient_to: Tensor | SparseWeight | None
) -> None:
    if not isinstance(weight, SparseWeight):
        raise TypeError(f"weight must be a SparseWeight, got {type(weight).__name__}; build one with from_dense")
    m, k = weight.shape
    problems = []
    if x.dim() < 1 or x.shape[-1] != k:
        problems.append(f"x must have {k} channels last, the columns of the weight, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        problems.append(f"x must hold floats, got {x.dtype}")
    if x.device != weight.values.device:
        problems.append(f"x must be on {weight.values.device}, where the weight is, got {x.device}")
    if bias is not None and (tuple(bias.shape) != (m,) or bias.device != weight.values.device):
        problems.append(
            f"bias must have shape ({m},) on {weight.values.device}, got {tuple(bias.shape)} on {bias.device}"
        )
    if gradient_to is not None and tuple(gradient_to.shape) != (m, k):
        problems.append(f"gradient_to must have the shape of the weight, {(m, k)}, got {tuple(gradient_to.shape)}")
    if problems:
        raise ValueError("; ".join(problems))


def check_attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, d_head: int) -> None:
    problems = []
    if q.dim() != 3 or not q.is_floating_point():
        problems.append(f"q must be (B, T, D) floats, got {q.dtype} of shape {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if (x.shape, x.dtype, x.device) != (q.shape, q.dtype, q.device):
            problems.append(
                f"{name} must be like q, {q.dtype} of shape {tuple(q.shape)} on {q.device}, "
                f"got {x.dtype} of shape {tuple(x.shape)} on {x.device}"
            )
    if d_head < 1 or q.shape[-1] % d_head:
        problems.append(f"d_head must divide {q.shape[-1]}, the channels of q, got {d_head}")
    elif sink is not None and (tuple(sink.shape) != (q.shape[-1] // d_head,) or sink.device != q.device):
        problems.append(
            f"sink must have shape ({q.shape[-1] // d_head},), a logit for each head, on {q.device}, "
            f"got {tuple(sink.shape)} on {sink.device}"
        )
    if problems:
        raise ValueError("; ".join(problems))
