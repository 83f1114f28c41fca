"""The one door to the kernels: checks arguments, picks the backend, and holds the gradients.

Activations may be token-major, (..., T, K) as torch lays them out, or channel-major: the same shape with the tokens
contiguous, x.mT.is_contiguous(). Every op returns the layout it was given. Sparse products read channel-major
activations and convert others, so a model that keeps them channel-major pays for no transposes.
"""

import logging
import os
from importlib import import_module
from importlib.util import find_spec
from operator import index
from typing import Literal

import torch
from torch import Tensor

from sparsetrain.kernels import costs, cpu, reference
from sparsetrain.kernels.sparse_weight import Order, SparseWeight

Backend = Literal["auto", "reference", "cpu", "triton", "triton rows", "triton slabs"]
BACKENDS = ("auto", "reference", "cpu", "triton")
DESIGNS = ("triton rows", "triton slabs")  # of sparse products; "triton" takes the one that should be faster
BLOCK = {"cpu": 128, "cuda": 1024}  # tokens of a block that token-major activations are converted to
WIDEST = 32768  # entries of a row that Triton's selection holds in registers
TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)

log = logging.getLogger(__name__)
_taken: dict[tuple, str] = {}


def sparse_linear(x: Tensor, weight: SparseWeight, bias: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """y = x W^T + bias for a weight that keeps its nonzeros alone.

    Args:
        x: (..., K), finite or not: a NaN reaches the outputs that read it. Channel-major is faster.
        weight: (M, K), on the device of x.
        bias: (M,) or None.
        backend: "cpu" (float32, bfloat16), "triton" (CUDA; float32, bfloat16, float16), "reference" (a dense
            product, any type), or "auto": whichever of the fast one and the dense one the cost model says is
            faster, which is logged once. "triton rows" and "triton slabs" are its two designs, see `slabs`.

    Returns:
        (..., M) in the type of x (of autocast, where it is on) and the layout of x, differentiable in x,
        `weight.values` and bias. Sums are fp32; the gradient of the values is summed in fp32 too.

    Raises:
        TypeError: `weight` is not a SparseWeight.
        ValueError: shapes or devices do not fit, or the backend cannot run.

    Source: the products of Gao et al. 2025, A.2, which its authors ran dense.
    """
    _check_linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # doubles stay, as in a dense layer
        x = x.to(torch.get_autocast_dtype(x.device.type))
    chosen = _linear_backend(backend, x, weight) if x.numel() else "reference"
    if chosen == "reference":
        return reference.sparse_linear(x, weight, bias)
    blocks = _to_blocks(x)
    rows, columns = weight.rows, weight.columns
    bias = None if bias is None else bias.contiguous()
    y = _SparseLinear.apply(
        blocks, weight.values.contiguous(), bias, weight.to_column_major, rows.offsets, rows.indices, rows.by_length,
        columns.offsets, columns.indices, columns.by_length, chosen,
    )  # fmt: skip
    y = y.mT if reference.is_channel_major(x) else _swapped(y)
    return y.reshape(*x.shape[:-1], weight.shape[0])


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
    if not 0 <= k <= x.shape[-1]:
        raise ValueError(f"k must be in [0, {x.shape[-1]}], the width of x, got {k}")
    chosen = _pick(backend, x, longest=x.shape[-1])
    if k == x.shape[-1]:
        return x
    return reference.abs_topk(x, k) if chosen == "reference" else _abs_topk(x, k, chosen)


@torch.no_grad()
def project_(
    weight: Tensor, k: int, min_per_row: int = 0, min_per_column: int = 0, backend: Backend = "auto"
) -> Tensor:
    """Set all but the k entries greatest in magnitude to zero, in place; see `reference.project`.

    Args:
        weight: (M, K) or (M,).
        k: entries kept in all, 0 <= k <= numel.
        min_per_row, min_per_column: entries of each row and column that are kept first, out of the same k.
        backend: as in `abs_topk`.

    Returns:
        `weight` itself.

    Raises:
        ValueError: k or a floor is out of range, or the backend cannot run.

    Source: Gao et al. 2025, A.2.
    """
    if not 0 <= k <= weight.numel():
        raise ValueError(f"k must be in [0, {weight.numel()}], the size of the weight, got {k}")
    if weight.dim() not in (1, 2):
        raise ValueError(f"weight must be a matrix or a vector, got shape {tuple(weight.shape)}")
    for name, floor, size in (("row", min_per_row, weight.shape[-1]), ("column", min_per_column, weight.shape[0])):
        if not 0 <= floor <= size or (floor and weight.dim() == 1):
            raise ValueError(
                f"min_per_{name} must be in [0, {size if weight.dim() == 2 else 0}] for a weight of shape "
                f"{tuple(weight.shape)}, got {floor}"
            )
    chosen = _pick(backend, weight, longest=max(weight.shape) if min_per_row or min_per_column else 0)
    if k == weight.numel():
        return weight
    return weight.copy_(_module(chosen, "project").project(weight, k, min_per_row, min_per_column))


def designs(x: Tensor, weight: SparseWeight) -> list[str]:
    """The designs of Triton's sparse products that take x and the gradient of the result: backends to ask for."""
    return _designs(x.dtype, weight.shape, _block_tokens(x))


def _designs(dtype: torch.dtype, shape: tuple[int, int], block_tokens: int) -> list[str]:
    slabs = import_module("sparsetrain.kernels.slabs")
    fits = all(slabs.suits(dtype, channels, block_tokens) for channels in shape)
    return list(DESIGNS if fits else DESIGNS[:1])


def _check_linear(x: Tensor, weight: SparseWeight, bias: Tensor | None) -> None:
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
    if problems:
        raise ValueError("; ".join(problems))


def _pick(backend: Backend, x: Tensor, allowed: tuple[str, ...] = BACKENDS, longest: int = 0) -> str:
    """The backend that runs for x: the one asked for if it can, or under "auto" the fast one if there is one.

    `longest` is the most entries that an op must hold at once to select among them.
    """
    return _pick_for(backend, x.device.type, x.dtype, allowed, index(longest))


# torch.compile calls the two choices below once for each size, and does not trace into the files and modules they read.
# `index` makes it a plain integer where the size is a symbol.
@torch.compiler.assume_constant_result
def _pick_for(backend: Backend, device: str, dtype: torch.dtype, allowed: tuple[str, ...], longest: int) -> str:
    if backend not in allowed:
        raise ValueError(f"backend must be one of {', '.join(allowed)}, got {backend!r}")
    if backend == "auto":
        fast = "cpu" if device == "cpu" else "triton"
        return "reference" if _obstacle(fast, device, dtype, longest) else fast
    if obstacle := _obstacle(backend, device, dtype, longest):
        raise ValueError(f"backend {backend!r} cannot run here: {obstacle}; use backend='auto'")
    return backend


def _obstacle(backend: str, device: str, dtype: torch.dtype, longest: int) -> str | None:
    """Why a backend cannot take a tensor of a type on a device, or None."""
    if backend == "cpu" and (device != "cpu" or dtype not in cpu.NAMES):
        return f"it takes float32 and bfloat16 on the CPU, got {dtype} on {device}"
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


def _linear_backend(backend: Backend, x: Tensor, weight: SparseWeight) -> str:
    """As `_pick`, with the design of Triton's; "auto" weighs the dense product too, and says once what it took."""
    fast = _pick(backend, x, BACKENDS + DESIGNS)
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
    """x (B, K, T) to (B, M, T). Less overhead than one op with a registered gradient."""

    @staticmethod
    def forward(ctx, x, values, bias, to_column_major, row_offsets, columns, by_length, *rest):
        *by_column, ctx.backend = rest
        ctx.bias_type = None if bias is None else bias.dtype
        by_row = (row_offsets, columns, by_length)
        ctx.save_for_backward(x, values, to_column_major, *by_row, *by_column)
        return _sparse_matmul(x, values, bias, *by_row, ctx.backend)

    @staticmethod
    def backward(ctx, grad):
        x, values, to_column_major, *orders = ctx.saved_tensors
        by_row, by_column = orders[:3], orders[3:]
        grad = grad.contiguous()
        grads: list[Tensor | None] = [None] * 11
        if ctx.needs_input_grad[0]:
            grads[0] = _sparse_matmul(grad, values.index_select(0, to_column_major), None, *by_column, ctx.backend)
        if ctx.needs_input_grad[1]:
            grads[1] = _sampled_matmul(grad, x, *by_row, ctx.backend).to(values.dtype)
        if ctx.needs_input_grad[2]:
            grads[2] = grad.sum((0, 2), dtype=_sum_type(grad.dtype)).to(ctx.bias_type)
        return tuple(grads)


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
