"""The projection of a weight to its k greatest entries on the GPU, in Triton: a radix select that never waits.

The key of an entry is its magnitude with the floors' choice as the top bit. One digit of 8 bits a pass, programs count
the keys that agree with the digits found so far; no atomics, so every run gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrain.kernels.abs_topk import FORMATS, cutoff, kept, locate, planes, ranked, tile_for

BLOCK = 4096
MAX_PROGRAMS = 1024


def project(weight: Tensor, k: int, min_per_row: int = 0, min_per_column: int = 0) -> Tensor:
    """`reference.project` for float32, bfloat16 and float16.

    Args:
        weight: (M, K) or (M,). Rows under a floor, and columns, have at most 32768 entries.
        k: entries kept in all, 0 <= k <= numel.
        min_per_row, min_per_column: entries of each row and column that are kept first, out of the same k.

    Returns:
        The projected weight, contiguous.

    Raises:
        ValueError: a row or column under a floor is too long.
    """
    weight = weight.contiguous()
    if k == 0 or weight.numel() == 0:
        return torch.zeros_like(weight)
    integer, infinity = FORMATS[weight.dtype]
    bits = weight.view(integer)
    with torch.cuda.device_of(weight):
        forced = _forced(bits, infinity, min_per_row, min_per_column)
        return _select(bits, forced, k, infinity).view(weight.dtype)


def _forced(bits: Tensor, infinity: int, min_per_row: int, min_per_column: int) -> Tensor | None:
    """Which entries the floors keep, (M, K) of 0 and 1; None without floors. A vector's floors change nothing."""
    if bits.dim() == 1 or not (min_per_row or min_per_column):
        return None
    forced = torch.zeros_like(bits, dtype=torch.uint8)
    for x, mask, n_least in ((bits, forced, min_per_row), (bits.t(), forced.t(), min_per_column)):
        if n_least:
            _, n_tokens, width, _, *strides = planes(x)
            tile = tile_for(x)
            grid = (triton.cdiv(n_tokens, tile["BT"]),)
            _add_floor[grid](x, mask, n_tokens, min(n_least, width), *strides, INFINITY=infinity, D=width, **tile)
    return forced


def _select(bits: Tensor, forced: Tensor | None, k: int, infinity: int) -> Tensor:
    n, out = bits.numel(), torch.empty_like(bits)
    n_digits = bits.element_size()
    n_blocks = triton.next_power_of_2(triton.cdiv(n, BLOCK * MAX_PROGRAMS))
    n_programs = triton.cdiv(n, BLOCK * n_blocks)
    counts = torch.empty(n_programs, 256, dtype=torch.int32, device=bits.device)
    totals = torch.empty(n_digits, 256, dtype=torch.int64, device=bits.device)
    common = {
        "INFINITY": infinity,
        "HAS_FLOORS": forced is not None,
        "BLOCK": BLOCK,
        "N_BLOCKS": n_blocks,
        "num_warps": 8,
    }
    for i in range(n_digits):
        _count_digits[(n_programs,)](bits, forced, counts, totals, n, k, DIGIT=i, N_DIGITS=n_digits, **common)
        torch.sum(counts, dim=0, out=totals[i])
    _keep_greatest[(n_programs,)](
        bits, forced, counts, totals, out, n, k, N_DIGITS=n_digits, MAX_PROGRAMS=MAX_PROGRAMS, **common
    )
    return out


@triton.jit(do_not_specialize=["k"])
def _add_floor(
    bits, forced, n_tokens, k, stride_token, stride_channel,
    INFINITY: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, DP: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Add the k greatest nonzero entries of each token (row, or column) to those forced."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    channels = tl.arange(0, DP)
    offsets, mask = locate(token, channels, n_tokens, stride_token, stride_channel, D, VECTOR)
    bound, beyond, last = cutoff(bits + offsets, mask, channels, k, INFINITY, BT, DP)
    for half in range(2):
        channel = half * (DP // 2) + tl.arange(0, DP // 2)
        there, exists = locate(token, channel, n_tokens, stride_token, stride_channel, D, VECTOR)
        tile = tl.load(bits + there, mask=exists, other=0, eviction_policy="evict_first")
        before = tl.load(forced + there, mask=exists, other=0)
        tl.store(forced + there, before | kept(tile, channel, bound, beyond, last, INFINITY).to(tl.uint8), mask=exists)


@triton.jit
def _block(program, i, BLOCK: tl.constexpr, N_BLOCKS: tl.constexpr):
    """The int64 offsets of a program's i-th block of entries."""
    return (program.to(tl.int64) * N_BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _keys(bits, forced, offsets, mask, N_DIGITS: tl.constexpr, INFINITY: tl.constexpr, HAS_FLOORS: tl.constexpr):
    """The keys of a block, uint32 below 256 ** N_DIGITS."""
    key = ranked(tl.load(bits + offsets, mask=mask, other=0), INFINITY).to(tl.uint32)
    if HAS_FLOORS:
        key |= tl.load(forced + offsets, mask=mask, other=0).to(tl.uint32) << (8 * N_DIGITS - 1)
    return key


@triton.jit
def _found(totals, k, N_FOUND: tl.constexpr):
    """The first digits of the k-th greatest key, and how many of the keys that begin so belong to the greatest k."""
    digits = tl.arange(0, 256)
    prefix = tl.full([], 0, tl.uint32)
    room = k.to(tl.int64)
    for i in tl.static_range(N_FOUND):
        total = tl.load(totals + i * 256 + digits)
        digit = tl.max(tl.where(tl.cumsum(total, axis=0, reverse=True) >= room, digits, 0), axis=0)
        room -= tl.sum(tl.where(digits > digit, total, 0), axis=0)
        prefix = prefix * 256 + digit.to(tl.uint32)
    return prefix, room


@triton.jit(do_not_specialize=["k"])
def _count_digits(
    bits, forced, counts, totals, n, k, DIGIT: tl.constexpr, N_DIGITS: tl.constexpr,
    INFINITY: tl.constexpr, HAS_FLOORS: tl.constexpr, BLOCK: tl.constexpr, N_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Count each value of the next digit among the keys that begin with the digits found; a program counts its own."""
    prefix, _ = _found(totals, k, DIGIT)
    digits = tl.arange(0, 256)
    count = tl.zeros([256], tl.int32)
    for i in range(N_BLOCKS):
        offsets = _block(tl.program_id(0), i, BLOCK, N_BLOCKS)
        mask = offsets < n
        rest = _keys(bits, forced, offsets, mask, N_DIGITS, INFINITY, HAS_FLOORS) >> (8 * (N_DIGITS - 1 - DIGIT))
        count += tl.histogram((rest & 255).to(tl.int32), 256, mask=mask & ((rest >> 8) == prefix))
    tl.store(counts + tl.program_id(0) * 256 + digits, count)


@triton.jit(do_not_specialize=["k"])
def _keep_greatest(
    bits, forced, counts, totals, out, n, k, N_DIGITS: tl.constexpr, MAX_PROGRAMS: tl.constexpr,
    INFINITY: tl.constexpr, HAS_FLOORS: tl.constexpr, BLOCK: tl.constexpr, N_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write the entries above the k-th greatest key, and of those equal to it the first that there is room for."""
    key_k, room = _found(totals, k, N_DIGITS)
    # The last counts were of whole keys: those of the programs before this one say how many equal ones they have.
    program = tl.arange(0, MAX_PROGRAMS)
    before = tl.load(counts + program * 256 + (key_k & 255), mask=program < tl.program_id(0), other=0)
    room -= tl.sum(before.to(tl.int64), axis=0)
    for i in range(N_BLOCKS):
        offsets = _block(tl.program_id(0), i, BLOCK, N_BLOCKS)
        mask = offsets < n
        key = _keys(bits, forced, offsets, mask, N_DIGITS, INFINITY, HAS_FLOORS)
        tied = (mask & (key == key_k)).to(tl.int32)
        fits = tl.cumsum(tied, axis=0) <= tl.maximum(tl.minimum(room, BLOCK), 0).to(tl.int32)
        keep = (key > key_k) | ((key == key_k) & fits)
        tl.store(out + offsets, tl.where(keep, tl.load(bits + offsets, mask=mask, other=0), 0), mask=mask)
        room -= tl.sum(tied, axis=0)
