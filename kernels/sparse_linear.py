"""The products of a sparse matrix with channel-major activations, in Triton: y = A x, and y x^T at A's nonzeros.

Forward, gradient of the activations (A = W^T, from the column-major order) and gradient of the values use these two.
Every nonzero is an axpy, or a dot, of contiguous rows of tokens. Nothing is added atomically: two runs agree bitwise.
Letters: B blocks, L lines of A, K channels, T tokens of a block, E nonzeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrain.kernels.sparse_weight import Order

PER_THREAD = 8  # tokens of a thread: 16 bytes of bf16, one load
TILE = 1024  # tokens of a program of `matmul`
SAMPLED_TILE = 512  # tokens that a program of `sampled_matmul` reads at once
NONZEROS_AT_ONCE = 8  # nonzeros of a line that share one read of y
PROGRAMS = 8192  # programs that fill the largest GPU several times over; fewer lines are split by tokens


def matmul(x: Tensor, values: Tensor, order: Order, bias: Tensor | None = None, tile: int = TILE) -> Tensor:
    """A x + bias for a sparse A (L, K).

    Args:
        x: (B, K, T), contiguous; float16, bfloat16, float32 or float64.
        values: (E,) in the order of `order`; read in their own type.
        order: the L lines of A.
        bias: (L,) or None.
        tile: tokens of a program, a power of two.

    Returns:
        (B, L, T) in the type of x. Sums are fp32 (fp64 for fp64), in the order of the nonzeros.
    """
    blocks, channels, tokens = x.shape
    y = torch.empty(blocks, order.n_lines, tokens, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    tile = min(tile, triton.next_power_of_2(tokens))
    grid = (order.n_lines * blocks * triton.cdiv(tokens, tile),)
    with torch.cuda.device_of(x):
        _matmul[grid](
            x, y, values, order.indices, order.offsets, order.by_length, bias, order.n_lines, channels, tokens,
            EVEN=tokens % tile == 0, ACC=_sum_type(x), TILE=tile, num_warps=max(1, tile // (32 * PER_THREAD)),
        )  # fmt: skip
    return y


def sampled_matmul(y: Tensor, x: Tensor, order: Order) -> Tensor:
    """The entries of sum over b of y[b] x[b]^T at the nonzeros of a sparse (L, K): the gradient of its values.

    Args:
        y: (B, L, T). x: (B, K, T), the same type. Both contiguous.
        order: where the nonzeros are.

    Returns:
        (E,) float32 (float64 for float64), in the order of `order`. Tokens are split over programs whose partial sums
        are added in a fixed order.
    """
    blocks, channels, tokens = x.shape
    tile = min(SAMPLED_TILE, triton.next_power_of_2(max(1, tokens)))
    n_tiles = blocks * triton.cdiv(tokens, tile)
    splits = max(1, min(n_tiles, triton.cdiv(PROGRAMS, max(1, order.n_lines))))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty(splits, order.indices.numel(), dtype=dtype, device=x.device)
    if partial.numel() and n_tiles:
        with torch.cuda.device_of(x):
            _sampled_matmul[(order.n_lines * splits,)](
                y, x, partial, order.indices, order.offsets, order.by_length, order.n_lines, channels, tokens,
                order.indices.numel(), n_tiles, triton.cdiv(n_tiles, splits),
                EVEN=tokens % tile == 0, ACC=_sum_type(x), TILE=tile, AT_ONCE=NONZEROS_AT_ONCE,
                num_warps=max(1, tile // (16 * PER_THREAD)),
            )  # fmt: skip
    else:
        partial.zero_()
    return partial.sum(0) if splits > 1 else partial[0]


@triton.jit
def _matmul(
    x, y, values, indices, offsets, by_length, bias, n_lines, n_channels, n_tokens,
    EVEN: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One line times one tile of tokens. Lines run fastest, so that programs that run together share the tile of x."""
    program = tl.program_id(0)
    line = tl.load(by_length + program % n_lines).to(tl.int64)
    n_tiles = tl.cdiv(n_tokens, TILE)
    block = (program // n_lines // n_tiles).to(tl.int64)
    t = program // n_lines % n_tiles * TILE + tl.arange(0, TILE)  # (TILE,)
    inside = t < n_tokens
    x += block * n_channels * n_tokens
    sums = tl.zeros([TILE], ACC)
    if bias is not None:
        sums += tl.load(bias + line).to(ACC)
    for e in range(tl.load(offsets + line), tl.load(offsets + line + 1)):
        source = x + tl.load(indices + e).to(tl.int64) * n_tokens + t
        read = tl.load(source) if EVEN else tl.load(source, mask=inside, other=0.0)
        sums = tl.fma(read.to(ACC), tl.load(values + e).to(ACC), sums)
    target = y + (block * n_lines + line) * n_tokens + t
    if EVEN:
        tl.store(target, sums.to(y.dtype.element_ty))
    else:
        tl.store(target, sums.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _sampled_matmul(
    y, x, partial, indices, offsets, by_length, n_lines, n_channels, n_tokens, n_nonzero, n_tiles, tiles_per_split,
    EVEN: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The nonzeros of one line, AT_ONCE of them at a time, over one share of the tiles of tokens."""
    program = tl.program_id(0)
    line = tl.load(by_length + program % n_lines).to(tl.int64)
    split = program // n_lines
    first = split * tiles_per_split
    end = tl.minimum(first + tiles_per_split, n_tiles)
    tiles_per_block = tl.cdiv(n_tokens, TILE)
    last = tl.load(offsets + line + 1)
    for start in range(tl.load(offsets + line), last, AT_ONCE):
        e = start + tl.arange(0, AT_ONCE)  # (AT_ONCE,)
        channel = tl.load(indices + e, mask=e < last, other=0).to(tl.int64)
        sums = tl.zeros([AT_ONCE, TILE], ACC)
        for tile in range(first, end):
            block = (tile // tiles_per_block).to(tl.int64)
            t = tile % tiles_per_block * TILE + tl.arange(0, TILE)  # (TILE,)
            out = y + (block * n_lines + line) * n_tokens + t
            source = x + (block * n_channels + channel[:, None]) * n_tokens + t[None, :]  # (AT_ONCE, TILE)
            if EVEN:
                sums = tl.fma(tl.load(source).to(ACC), tl.load(out).to(ACC)[None, :], sums)
            else:
                inside = t < n_tokens
                read = tl.load(source, mask=inside[None, :], other=0.0).to(ACC)
                sums = tl.fma(read, tl.load(out, mask=inside, other=0.0).to(ACC)[None, :], sums)
        tl.store(partial + split.to(tl.int64) * n_nonzero + e, tl.sum(sums, 1), mask=e < last)


def _sum_type(x: Tensor) -> tl.constexpr:
    return tl.float64 if x.dtype == torch.float64 else tl.float32
