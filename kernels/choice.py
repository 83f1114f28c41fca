"""Which backend runs an op: what is asked for if it can, or what should be fastest."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from operator import index
from typing import Literal

import torch
from torch import Tensor

from sparsetrain.kernels import costs, cpu, reference
from sparsetrain.kernels.graphs import constant_in_graphs
from sparsetrain.kernels.layout import block_tokens
from sparsetrain.kernels.sparse_weight import SparseWeight

Backend = Literal["auto", "reference", "cpu", "triton", "triton rows", "triton slabs"]
BACKENDS = ("auto", "reference", "cpu", "triton")
DESIGNS = ("triton rows", "triton slabs")  # of sparse products; "triton" takes the one that should be faster
WIDEST = 32768  # entries of a row that Triton's selection holds in registers
TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)
log = logging.getLogger(__name__)


_forced: list[Backend] = []  # by `using`, the innermost last; for all threads, since autograd has its own
_taken: dict[tuple, str] = {}


def sparse_pays(
    shape: tuple[int, int], n_tokens: int, n_nonzero: int, device: torch.device, dtype: torch.dtype, factor: float = 1
) -> bool:
    """Whether a weight (M, K) is multiplied `factor` times faster by its nonzeros than as a dense matrix at hand."""
    fast = _pick_for("auto", device.type, dtype, BACKENDS, 0)
    if fast == "reference" or n_nonzero >= shape[0] * shape[1]:
        return False
    fast = [fast] if fast == "cpu" else DESIGNS[: 2 if dtype == torch.bfloat16 else 1]
    size = costs.Size(*shape, n_tokens, n_nonzero, token_major=False)
    return costs.dense_at_hand(device.type, dtype, size) > factor * min(
        costs.predict(backend, device.type, dtype, size, training=False) for backend in fast
    )


@contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Have `backend` run wherever "auto" is asked for, as long as the context lasts."""
    _forced.append(backend)
    try:
        yield
    finally:
        _forced.pop()


def designs(x: Tensor, weight: SparseWeight) -> list[str]:
    """The designs of Triton's sparse products that take x and the gradient of the result: backends to ask for."""
    return _designs(x.dtype, weight.shape, block_tokens(x))


def _designs(dtype: torch.dtype, shape: tuple[int, int], block_tokens: int) -> list[str]:
    slabs = import_module("sparsetrain.kernels.slabs")
    fits = all(slabs.suits(dtype, channels, block_tokens) for channels in shape)
    return list(DESIGNS if fits else DESIGNS[:1])


def pick(
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
@constant_in_graphs
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
    if backend == "auto" and _forced:
        backend = _forced[-1]
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


def pick_product(backend: Backend, x: Tensor, weight: SparseWeight, weigh_dense: bool) -> str:
    """As `pick`, with the design of Triton's; "auto" can weigh the dense product too, and says once what it took."""
    fast = pick(backend, x, BACKENDS + DESIGNS)
    backend = fast if not weigh_dense else backend
    if fast not in ("triton", *DESIGNS) and (backend != "auto" or fast == "reference"):
        return fast
    tokens = x.numel() // max(1, x.shape[-1])
    training = torch.is_grad_enabled() and (x.requires_grad or weight.values.requires_grad)
    size = (*weight.shape, index(tokens), index(weight.n_nonzero), not reference.is_channel_major(x))
    return _cheapest(backend, fast, x.dtype, size, training, index(block_tokens(x)))


@constant_in_graphs
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


def module(backend: str, op: str):
    """Where an op of a backend lives. Triton is imported when it is first used: it takes time, and may be absent."""
    if not backend.startswith("triton"):
        return {"cpu": cpu, "reference": reference}[backend]
    return import_module(f"sparsetrain.kernels.{'slabs' if backend == 'triton slabs' else op}")
