"""The one door to the kernels: checks arguments, picks the backend, and holds the gradients.

Activations may be token-major, (..., T, K) as torch lays them out, or channel-major: the same shape with the tokens
contiguous, x.mT.is_contiguous(). Every op returns the layout it was given. Sparse products read channel-major
activations and convert others, so a model that keeps them channel-major pays for no transposes.
"""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from numbers import Integral
from operator import index
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.kernels import costs, cpu, reference
from sparsetrain.kernels.sparse_weight import Order, SparseWeight

Backend = Literal["auto", "reference", "cpu", "triton", "triton rows", "triton slabs"]
Activation = Literal["gelu", "relu"]
BACKENDS = ("auto", "reference", "cpu", "triton")
DESIGNS = ("triton rows", "triton slabs")  # of sparse products; "triton" takes the one that should be faster
BLOCK = {"cpu": 128, "cuda": 1024}  # tokens of a block that token-major activations are converted to
WIDEST = 32768  # entries of a row that Triton's selection holds in registers
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}
WIDEST_HEAD = 128  # channels of a head that attention in C is tested with
TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)

log = logging.getLogger(__name__)


class _Forced(threading.local):
    backend: Backend = "auto"


_forced = _Forced()
_taken: dict[tuple, str] = {}


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
    x = _autocast(x)
    y = _DenseLinear.apply(_to_blocks(x), weight, bias).mT
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
    _check_linear(x, weight, bias, gradient_to)
    x = _autocast(x)
    chosen = _linear_backend(backend, x, weight, gradient_to is None) if x.numel() else "reference"
    if chosen == "reference":
        if gradient_to is None:
            return reference.sparse_linear(x, weight, bias)
        return linear(x, gradient_to if isinstance(gradient_to, Tensor) else gradient_to.to_dense(), bias)
    blocks = _to_blocks(x)
    rows, columns = weight.rows, weight.columns
    bias = None if bias is None else bias.contiguous()
    learnt, wanted = weight.values, rows  # the gradient is wanted at the nonzeros of `wanted`, or everywhere
    if gradient_to is not None:
        dense = isinstance(gradient_to, Tensor)
        learnt, wanted = (gradient_to, None) if dense else (gradient_to.values, gradient_to.rows)
    y = _SparseLinear.apply(
        blocks, learnt, weight.values.detach().contiguous(), bias, weight.to_column_major, rows, columns, wanted, chosen
    )
    y = y.mT if reference.is_channel_major(x) else _swapped(y)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def dense_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a dense weight, from those of y = x W^T: the sum over tokens of grad x^T.

    Args:
        grad: (..., M). x: (..., K), the same tokens; taken in the type of grad.

    Returns:
        (M, K), fp32. Both are read once where they are channel-major.
    """
    if reference.is_channel_major(x) and not reference.is_channel_major(grad):
        grad = grad.mT.contiguous().mT
    return _dense_gradient(_to_blocks(grad), _to_blocks(x.to(grad.dtype)))


def channel_major(x: Tensor) -> Tensor:
    """x (..., T, K) with its tokens contiguous, differentiable; a copy unless it is so already."""
    if reference.is_channel_major(x):
        return x
    return _swapped(x.reshape(-1, *x.shape[-2:])).mT.view(x.shape)


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
    _check_k(x, k)
    chosen = _pick(backend, x, longest=x.shape[-1])
    if k == x.shape[-1]:
        return x
    return reference.abs_topk(x, k) if chosen == "reference" else _abs_topk(x, k, chosen)


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
    _check_k(x, k)
    if tuple(gain.shape) != (x.shape[-1],) or gain.device != x.device:
        raise ValueError(
            f"gain must have shape ({x.shape[-1]},) on {x.device}, as the channels of x, got {tuple(gain.shape)} on "
            f"{gain.device}"
        )
    chosen = _pick(backend, x, longest=x.shape[-1])
    if chosen == "reference":
        return reference.norm_abs_topk(x, gain, eps, k)
    if chosen == "cpu" and x.dtype == gain.dtype == torch.float32:
        return _NormAbsTopk.apply(x, gain, eps, k)
    return abs_topk(F.rms_norm(x, gain.shape, gain, eps), k, chosen)


def act_abs_topk(x: Tensor, k: int, activation: Activation, backend: Backend = "auto") -> Tensor:
    """An activation function, then AbsTopK.

    Args:
        x: (..., D).
        k: entries kept, 0 <= k <= D; D keeps all.
        activation: "gelu" (exact, with the error function) or "relu".
        backend: as in `abs_topk`. On a CPU float32 is fused; other types and devices take torch's activation first.

    Returns:
        (..., D) in the layout of x, differentiable: the gradient passes where the output is not zero, or everywhere
        for k = D.

    Raises:
        ValueError: k is out of range, the activation is unknown, or the backend cannot run.

    Source: Gao et al. 2025, A.1.
    """
    _check_k(x, k)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    chosen = _pick(backend, x, longest=x.shape[-1])
    if chosen == "reference":
        return reference.act_abs_topk(x, k, activation)
    if chosen == "cpu" and x.dtype == torch.float32 and k < x.shape[-1]:
        return _ActAbsTopk.apply(x, k, activation)
    return abs_topk(ACTIVATIONS[activation](x), k, chosen)


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
    _check_loss(logits, table, tokens, targets)
    chosen = _pick(backend, logits, ("auto", "reference", "cpu"))
    with torch.autocast(logits.device.type, enabled=False):
        if chosen != "cpu":
            return reference.next_token_loss(logits, table, tokens, targets)
        logits, table = logits.float(), None if table is None else table.float()
        if torch.is_grad_enabled() and (logits.requires_grad or (table is not None and table.requires_grad)):
            return _NextTokenLoss.apply(logits, table, tokens, targets)
        return _next_token_loss(logits, table, tokens, targets, False)[0]


def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, d_head: int, backend: Backend = "auto") -> Tensor:
    """Causal softmax attention, scaled by 1 / sqrt(d_head), with an optional learnt logit in each head's denominator.

    Args:
        q, k, v: (B, T, D), token-major, channel-major, or slices of channels of either; channel-major is faster. Heads
            are groups of d_head neighbouring channels. Channels of k and v that are exactly zero cost no time on a
            CPU, and there a NaN or an infinity that only meets such zeros is not seen.
        sink: (H,) logits, or None.
        d_head: channels of a head.
        backend: "cpu" (float32, d_head up to 128), "reference" (torch's own attention), or "auto": "cpu" where it
            runs.

    Returns:
        (B, T, D) in the layout of q, differentiable in q, k, v and sink, at their zeros too. Where every key loses
        to the sink, the output tends to zero.

    Raises:
        ValueError: shapes, types or devices do not fit, or the backend cannot run.

    Source: Gao et al. 2025, A.1 (attention sinks).
    """
    _check_attend(q, k, v, sink, d_head)
    chosen = _pick(backend, q, ("auto", "reference", "cpu"), types=(torch.float32,))
    if chosen == "cpu" and d_head > WIDEST_HEAD:
        if backend == "cpu":
            raise ValueError(f"d_head must be at most {WIDEST_HEAD} for backend 'cpu', got {d_head}; use 'auto'")
        chosen = "reference"
    if chosen == "reference" or not q.numel() or not cpu.has_library():
        return reference.attend(q, k, v, sink, d_head)
    rows = (x.mT if reference.tokens_contiguous(x) else _swapped(x) for x in (q, k, v))  # (B, D, T)
    z, _ = _attend(*rows, None if sink is None else sink.to(q.dtype).contiguous(), d_head)
    return z.mT if reference.tokens_contiguous(q) else _swapped(z)


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
    _check_count("k", k, values.numel(), ", the nonzeros of the weight," if is_sparse else ", the size of the weight,")
    for name, floor, size in (
        ("min_per_row", min_per_row, weight.shape[-1]),
        ("min_per_column", min_per_column, weight.shape[0]),
    ):
        if floor:
            most = size if len(weight.shape) == 2 else 0
            _check_count(name, floor, most, f" for a weight of shape {tuple(weight.shape)},")
    longest = max(weight.shape) if min_per_row or min_per_column else 0
    chosen = _pick(backend, values, BACKENDS[:3] if is_sparse else BACKENDS, longest)
    if k == values.numel():
        return weight
    budget = (k, min_per_row, min_per_column)
    if chosen == "cpu":
        (cpu.project_support_ if is_sparse else cpu.project_)(weight, *budget)
    elif is_sparse:
        values.copy_(reference.project_support(weight, *budget))
    else:
        weight.copy_(_module(chosen, "project").project(weight, *budget))
    return weight


def sparse_pays(
    shape: tuple[int, int], n_tokens: int, n_nonzero: int, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether a weight (M, K) is multiplied faster by its nonzeros than as a dense matrix that is at hand."""
    if _forced.backend == "reference":
        return False
    fast = ["cpu"] if device.type == "cpu" else DESIGNS[: 2 if dtype == torch.bfloat16 else 1]
    size = costs.Size(*shape, n_tokens, n_nonzero, token_major=False)
    return costs.dense_at_hand(device.type, dtype, size) > min(
        costs.predict(backend, device.type, dtype, size, training=False) for backend in fast
    )


@contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Have `backend` run wherever "auto" is asked for, in this thread, as long as the context lasts."""
    before, _forced.backend = _forced.backend, backend
    try:
        yield
    finally:
        _forced.backend = before


def designs(x: Tensor, weight: SparseWeight) -> list[str]:
    """The designs of Triton's sparse products that take x and the gradient of the result: backends to ask for."""
    return _designs(x.dtype, weight.shape, _block_tokens(x))


def _designs(dtype: torch.dtype, shape: tuple[int, int], block_tokens: int) -> list[str]:
    slabs = import_module("sparsetrain.kernels.slabs")
    fits = all(slabs.suits(dtype, channels, block_tokens) for channels in shape)
    return list(DESIGNS if fits else DESIGNS[:1])


def _check_count(name: str, count: int, most: int, what: str) -> None:
    if not isinstance(count, Integral):
        raise ValueError(f"{name} must be an integer, got {count!r}")
    if not 0 <= count <= most:
        raise ValueError(f"{name} must be in [0, {most}]{what} got {count}")


def _check_k(x: Tensor, k: int) -> None:
    if x.dim() == 0:
        raise ValueError("x must have a dimension to select along, got a 0-d tensor")
    _check_count("k", k, x.shape[-1], ", the width of x,")


def _check_loss(logits: Tensor, table: Tensor | None, tokens: Tensor, targets: Tensor) -> None:
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


def _check_linear(
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


def _check_attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, d_head: int) -> None:
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


def _pick(
    backend: Backend,
    x: Tensor,
    allowed: tuple[str, ...] = BACKENDS,
    longest: int = 0,
    types: tuple[torch.dtype, ...] = tuple(cpu.NAMES),
) -> str:
    """The backend that runs for x: the one asked for if it can, or under "auto" the fast one if there is one.

    `longest` is the most entries that an op must hold at once to select among them; `types` are those its C takes.
    """
    return _pick_for(backend, x.device.type, x.dtype, allowed, index(longest), types)


# torch.compile calls the two choices below once for each size, and does not trace into the files and modules they read.
# `index` makes it a plain integer where the size is a symbol.
@torch.compiler.assume_constant_result
def _pick_for(
    backend: Backend,
    device: str,
    dtype: torch.dtype,
    allowed: tuple[str, ...],
    longest: int,
    types: tuple[torch.dtype, ...] = tuple(cpu.NAMES),
) -> str:
    if backend not in allowed:
        raise ValueError(f"backend must be one of {', '.join(allowed)}, got {backend!r}")
    if backend == "auto":
        backend = _forced.backend
    if backend == "auto":
        fast = "cpu" if device == "cpu" else "triton"
        return "reference" if fast not in allowed or _obstacle(fast, device, dtype, longest, types) else fast
    if obstacle := _obstacle(backend, device, dtype, longest, types):
        raise ValueError(f"backend {backend!r} cannot run here: {obstacle}; use backend='auto'")
    return backend


def _obstacle(
    backend: str, device: str, dtype: torch.dtype, longest: int, types: tuple[torch.dtype, ...]
) -> str | None:
    """Why a backend cannot take a tensor of a type on a device, or None."""
    if backend == "cpu" and (device != "cpu" or dtype not in types):
        names = " and ".join(cpu.NAMES[dtype] for dtype in types)
        return f"it takes {names} on the CPU, got {dtype} on {device}"
    if backend.startswith("triton"):
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if find_spec("triton") is None:
            return "the package triton is not installed"
        if device != "cuda" and not interpreted:
            return f"it takes CUDA tensors, got one on {device} (TRITON_INTERPRET=1 runs any, very slowly)"
        if dtype not in TRITON_TYPES and not (dtype == torch.float64 and interpreted):
            return f"it takes float32, bfloat16 and float16, got {dtype}"
        if longest > WIDEST:
            return f"it selects among at most {WIDEST} entries, got {longest}"
    return None


def _linear_backend(backend: Backend, x: Tensor, weight: SparseWeight, weigh_dense: bool) -> str:
    """As `_pick`, with the design of Triton's; "auto" can weigh the dense product too, and says once what it took."""
    fast = _pick(backend, x, BACKENDS + DESIGNS)
    backend = fast if not weigh_dense else backend
    if fast not in ("triton", *DESIGNS) and (backend != "auto" or fast == "reference"):
        return fast
    tokens = x.numel() // max(1, x.shape[-1])
    training = torch.is_grad_enabled() and (x.requires_grad or weight.values.requires_grad)
    size = (*weight.shape, index(tokens), index(weight.n_nonzero), not reference.is_channel_major(x))
    return _cheapest(backend, fast, x.dtype, size, training, index(_block_tokens(x)))


@torch.compiler.assume_constant_result
def _cheapest(backend: Backend, fast: str, dtype: torch.dtype, size: tuple, training: bool, block_tokens: int) -> str:
    """What the cost model says is fastest for a product, among what `backend` allows and what can run."""
    size = costs.Size(*size)
    candidates = _designs(dtype, size[:2], block_tokens) if fast.startswith("triton") else [fast]
    if fast in DESIGNS:
        if fast not in candidates:
            raise ValueError(
                f"backend {fast!r} cannot run here: it takes bfloat16 and blocks of whole slabs of tokens, got "
                f"{dtype} and blocks of {block_tokens} tokens; use backend='triton'"
            )
        return fast
    if backend == "auto":
        candidates.append("reference")
    if len(candidates) == 1:
        return candidates[0]
    device = "cpu" if fast == "cpu" else "cuda"
    seconds = {name: costs.predict(name, device, dtype, size, training) for name in candidates}
    chosen = min(candidates, key=seconds.__getitem__)
    case = (size.m, size.k, size.token_major, device, dtype, training)
    if _taken.get(case) != chosen:
        _taken[case] = chosen
        names = {name: "the dense product" if name == costs.DENSE else f"backend {name!r}" for name in seconds}
        predicted = ", ".join(f"{names[name]} {1e3 * s:.3g} ms" for name, s in seconds.items())
        log.info(
            "sparse_linear takes %s for a weight of %d x %d with %d nonzeros and %d %s tokens%s: predicted %s (%s)",
            names[chosen], *size[:2], size.nnz, size.n, "token-major" if size.token_major else "channel-major",
            " with gradients" if training else "", predicted, costs.origin(device),
        )  # fmt: skip
    return chosen


def _module(backend: str, op: str):
    """Where an op of a backend lives. Triton is imported when it is first used: it takes time, and may be absent."""
    if not backend.startswith("triton"):
        return {"cpu": cpu, "reference": reference}[backend]
    return import_module(f"sparsetrain.kernels.{'slabs' if backend == 'triton slabs' else op}")


def _block_tokens(x: Tensor) -> int:
    """T, the tokens of a block: those of a sequence of what is channel-major, else as many as suit the device."""
    if reference.is_channel_major(x):
        return x.shape[-2]
    n = x.numel() // x.shape[-1]
    whole = BLOCK.get(x.device.type, n)
    return whole if n % max(1, whole) == 0 else n


def _to_blocks(x: Tensor) -> Tensor:
    """(..., K) to channel-major blocks (B, K, T): a view of what is channel-major, a transposed copy of the rest."""
    if reference.is_channel_major(x):
        return x.mT.reshape(-1, x.shape[-1], x.shape[-2])
    return _swapped(x.reshape(-1, _block_tokens(x), x.shape[-1]))


def _swapped(x: Tensor) -> Tensor:
    """x.mT, contiguous, for x (B, R, C)."""
    if x.device.type == "cpu" and x.dtype in cpu.NAMES:
        return _transposed(x.contiguous())
    return x.mT.contiguous()


class _SparseLinear(torch.autograd.Function):
    """x (B, K, T) to (B, M, T); the gradient of the weight goes to `learnt`, at the nonzeros of `wanted` or everywhere.

    Less overhead than one op with a registered gradient.
    """

    @staticmethod
    def forward(ctx, x, learnt, values, bias, to_column_major, rows, columns, wanted, backend):
        ctx.types = learnt.dtype, None if bias is None else bias.dtype
        ctx.columns, ctx.wanted, ctx.backend = columns, wanted, backend
        ctx.save_for_backward(x, values, to_column_major)
        return _sparse_matmul(x, values, bias, rows.offsets, rows.indices, rows.by_length, backend)

    @staticmethod
    def backward(ctx, grad):
        x, values, to_column_major = ctx.saved_tensors
        columns, wanted = ctx.columns, ctx.wanted
        grad = grad.contiguous()
        grads: list[Tensor | None] = [None] * 9
        if ctx.needs_input_grad[0]:
            by_column = (columns.offsets, columns.indices, columns.by_length)
            grads[0] = _sparse_matmul(grad, values.index_select(0, to_column_major), None, *by_column, ctx.backend)
        if ctx.needs_input_grad[1]:
            if wanted is None:
                learnt = _dense_gradient(grad, x)
            else:
                learnt = _sampled_matmul(grad, x, wanted.offsets, wanted.indices, wanted.by_length, ctx.backend)
            grads[1] = learnt.to(ctx.types[0])
        if ctx.needs_input_grad[3]:
            grads[3] = _sum_of_tokens(grad).to(ctx.types[1])
        return tuple(grads)


class _DenseLinear(torch.autograd.Function):
    """x (B, K, T) to (B, M, T) by a dense weight."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.bias_type = None if bias is None else bias.dtype
        spread = weight.to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.bmm(spread, x) if bias is None else torch.baddbmm(bias.to(x.dtype)[:, None], spread, x)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        in_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            in_grad = torch.bmm(weight.to(x.dtype).t().expand(x.shape[0], -1, -1), grad)
        if ctx.needs_input_grad[1]:
            weight_grad = _dense_gradient(grad, x).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            bias_grad = _sum_of_tokens(grad).to(ctx.bias_type)
        return in_grad, weight_grad, bias_grad


def _sum_of_tokens(grad: Tensor) -> Tensor:
    return grad.sum((0, 2), dtype=_sum_type(grad.dtype))


def _autocast(x: Tensor) -> Tensor:
    """x in the type of autocast, where it is on; doubles stay, as in a dense layer."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


# Registered as custom ops so that torch.compile keeps them whole instead of tracing into ctypes or a launch.
@torch.library.custom_op("sparsetrain::sparse_matmul", mutates_args=())
def _sparse_matmul(
    x: Tensor, values: Tensor, bias: Tensor | None, offsets: Tensor, indices: Tensor, by_length: Tensor, backend: str
) -> Tensor:
    return _module(backend, "sparse_linear").matmul(x, values, Order(offsets, indices, by_length), bias)


@torch.library.custom_op("sparsetrain::sampled_matmul", mutates_args=())
def _sampled_matmul(y: Tensor, x: Tensor, offsets: Tensor, indices: Tensor, by_length: Tensor, backend: str) -> Tensor:
    return _module(backend, "sparse_linear").sampled_matmul(y, x, Order(offsets, indices, by_length))


@_sparse_matmul.register_fake
def _(x, values, bias, offsets, indices, by_length, backend):
    return x.new_empty(x.shape[0], by_length.shape[0], x.shape[2])


@_sampled_matmul.register_fake
def _(y, x, offsets, indices, by_length, backend):
    return x.new_empty(indices.shape[0], dtype=_sum_type(x.dtype))


@torch.library.custom_op("sparsetrain::dense_gradient", mutates_args=())
def _dense_gradient(y: Tensor, x: Tensor) -> Tensor:
    if y.device.type == "cpu" and y.dtype in cpu.NAMES:
        return cpu.dense_gradient(y, x)
    y, x = (t.transpose(0, 1).flatten(1) for t in (y, x))  # one product over all tokens, as a dense layer has it
    return (y @ x.t()).to(_sum_type(y.dtype))


@_dense_gradient.register_fake
def _(y, x):
    return y.new_empty(y.shape[1], x.shape[1], dtype=_sum_type(y.dtype))


def _sum_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("sparsetrain::transposed", mutates_args=())
def _transposed(x: Tensor) -> Tensor:
    return cpu.transposed(x)


@_transposed.register_fake
def _(x):
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1])


_transposed.register_autograd(lambda ctx, grad: _swapped(grad))


@torch.library.custom_op("sparsetrain::abs_topk", mutates_args=())
def _abs_topk(x: Tensor, k: int, backend: str) -> Tensor:
    return _module(backend, "abs_topk").abs_topk(x, k)


@torch.library.custom_op("sparsetrain::abs_topk_backward", mutates_args=())
def _abs_topk_backward(grad: Tensor, out: Tensor, backend: str) -> Tensor:
    return _module(backend, "abs_topk").abs_topk_backward(grad, out)


@_abs_topk.register_fake
def _(x: Tensor, k: int, backend: str) -> Tensor:
    return _laid_out_as(x)


@_abs_topk_backward.register_fake
def _(grad: Tensor, out: Tensor, backend: str) -> Tensor:
    return _laid_out_as(out)


def _laid_out_as(x: Tensor) -> Tensor:
    """An empty tensor in the layout of x, channel-major or else token-major."""
    if reference.is_channel_major(x):
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_output(ctx, inputs, output) -> None:
    ctx.backend = inputs[-1]
    ctx.save_for_backward(output)


def _topk_backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
    return _abs_topk_backward(grad, ctx.saved_tensors[0], ctx.backend), None, None


_abs_topk.register_autograd(_topk_backward, setup_context=_keep_output)


class _NormAbsTopk(torch.autograd.Function):
    """Keeps x, a number per token, and its output, which what follows keeps anyway: no tensor of its own."""

    @staticmethod
    def forward(ctx, x, gain, eps, k):
        out, scales = _norm_abs_topk(x, gain, eps, k)
        ctx.save_for_backward(x, gain, scales, out if k < x.shape[-1] else None)
        return out

    @staticmethod
    def backward(ctx, grad):
        return *_norm_abs_topk_backward(grad, *ctx.saved_tensors), None, None


class _ActAbsTopk(torch.autograd.Function):
    """Keeps its output, and for gelu x."""

    @staticmethod
    def forward(ctx, x, k, activation):
        out = _act_abs_topk(x, k, activation)
        ctx.save_for_backward(out, x if activation == "gelu" else None)
        return out

    @staticmethod
    def backward(ctx, grad):
        out, x = ctx.saved_tensors
        if x is None:
            return _abs_topk_backward(grad, out, "cpu"), None, None
        return _gelu_abs_topk_backward(grad, x, out), None, None


class _NextTokenLoss(torch.autograd.Function):
    """Keeps the gradient of the logits, written when the loss was computed, and not the logits."""

    @staticmethod
    def forward(ctx, logits, table, tokens, targets):
        loss, gradient = _next_token_loss(logits, table, tokens, targets, True)
        ctx.save_for_backward(gradient, tokens)
        return loss

    @staticmethod
    def backward(ctx, grad):
        gradient, tokens = ctx.saved_tensors
        table_grad = _table_gradient(gradient, tokens) if ctx.needs_input_grad[1] else None
        # Most often the loss is what backward starts from: no pass over the logits then.
        if torch.compiler.is_compiling() or grad != 1:
            gradient, table_grad = gradient * grad, None if table_grad is None else table_grad * grad
        return gradient, table_grad, None, None


@torch.library.custom_op("sparsetrain::norm_abs_topk", mutates_args=())
def _norm_abs_topk(x: Tensor, gain: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor]:
    return cpu.norm_abs_topk(x, gain, eps, k)


@_norm_abs_topk.register_fake
def _(x, gain, eps, k):
    return _laid_out_as(x), x.new_empty(x.shape[:-1])


@torch.library.custom_op("sparsetrain::norm_abs_topk_backward", mutates_args=())
def _norm_abs_topk_backward(
    grad: Tensor, x: Tensor, gain: Tensor, scales: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    return cpu.norm_abs_topk_backward(grad, x, gain, scales, out)


@_norm_abs_topk_backward.register_fake
def _(grad, x, gain, scales, out):
    return _laid_out_as(x), torch.empty_like(gain)


@torch.library.custom_op("sparsetrain::act_abs_topk", mutates_args=())
def _act_abs_topk(x: Tensor, k: int, activation: str) -> Tensor:
    return cpu.act_abs_topk(x, k, activation)


@_act_abs_topk.register_fake
def _(x, k, activation):
    return _laid_out_as(x)


@torch.library.custom_op("sparsetrain::gelu_abs_topk_backward", mutates_args=())
def _gelu_abs_topk_backward(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return cpu.gelu_abs_topk_backward(grad, x, out)


@_gelu_abs_topk_backward.register_fake
def _(grad, x, out):
    return _laid_out_as(out)


@torch.library.custom_op("sparsetrain::next_token_loss", mutates_args=())
def _next_token_loss(
    logits: Tensor, table: Tensor | None, tokens: Tensor, targets: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    return cpu.next_token_loss(logits, table, tokens, targets, with_gradient)


@_next_token_loss.register_fake
def _(logits, table, tokens, targets, with_gradient):
    return logits.new_empty(()), _laid_out_as(logits) if with_gradient else logits.new_empty(0)


@torch.library.custom_op("sparsetrain::table_gradient", mutates_args=())
def _table_gradient(gradient: Tensor, tokens: Tensor) -> Tensor:
    return cpu.table_gradient(gradient, tokens)


@_table_gradient.register_fake
def _(gradient, tokens):
    return gradient.new_empty(gradient.shape[-1], gradient.shape[-1])


@torch.library.custom_op("sparsetrain::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, d_head: int) -> tuple[Tensor, Tensor]:
    return cpu.attend(q, k, v, sink, d_head)


@torch.library.custom_op("sparsetrain::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, z: Tensor, norm: Tensor, d_head: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cpu.attend_backward(grad, q, k, v, sink, z, norm, d_head)


@_attend.register_fake
def _(q, k, v, sink, d_head):
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[1] // d_head, 2, q.shape[2])


@_attend_backward.register_fake
def _(grad, q, k, v, sink, z, norm, d_head):
    return *(q.new_empty(q.shape) for _ in range(3)), q.new_empty(q.shape[0], q.shape[1] // d_head)


def _keep_attended(ctx, inputs, output) -> None:
    *tensors, ctx.d_head = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _attended_backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
    *grads, sink_grad = _attend_backward(grad, *ctx.saved_tensors, ctx.d_head)
    return *grads, sink_grad.sum(0) if ctx.needs_input_grad[3] else None, None


_attend.register_autograd(_attended_backward, setup_context=_keep_attended)
