"""The sparse products for bf16 on a slab of tokens that stays in the L1 cache of one multiprocessor, in Triton.

`sparse_linear` reads every nonzero's row of tokens from the L2 cache, whose rate bounds it. Here a program takes a
slab of so few tokens that all K channels of it fit in L1 (about 200 KB), and passes all lines over it. Lines are sorted
by length and cut into slices of R; step j of a slice holds the j-th nonzero of each of its lines, padded to the longest
(the SELL-C-sigma format, Kreutzer et al. 2014). One nonzero is one int32: its channel below, its bf16 value above. Two
bf16 tokens are read as one int32. Letters: B blocks, L lines, K channels, T tokens of a block, R lines of a slice, S
slices, P padded nonzeros.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparsetrain.kernels.sparse_weight import Order

WARPS = 32  # one program fills a multiprocessor, so that its slab has the L1 to itself
WORDS = 4  # int32 of a thread: a load of 16 bytes
# Of a thread, at most: what 32 warps have of a multiprocessor's 65,536. Where nothing is said, the compiler may spill
# some to make do with 32, and a second program would share the L1.
REGISTERS = 64
L1_BYTES = 200 * 1024
CHANNELS = 1 << 16  # a channel is 16 bits
GROUPS = 32  # groups of slabs of `sampled_matmul`, each with its own partial sums


@dataclass(frozen=True)
class Slices:
    """Where each nonzero of an `Order` lies when its lines are cut into slices.

    Attributes:
        lines: (S * R,) int32, the line of each row of a slice; n_lines where there is none.
        starts: (S + 1,) int32, the first slot of each slice; a multiple of R.
        full: (S,) int32, the steps of a slice in which every one of its lines has a nonzero.
        source: (P + R,) int32, the nonzero in each slot, or -1; R empty slots more, which a prefetch may read.
        slots: (E,) int64, the slot of each nonzero.
        height: R, the lines of a slice.
    """

    lines: Tensor
    starts: Tensor
    full: Tensor
    source: Tensor
    slots: Tensor
    height: int


_slices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of an order's offsets: {height: Slices}


def slices(order: Order, slab: int, warps: int = WARPS) -> Slices:
    """The slices of an order for slabs of so many tokens, of as many lines as the warps take; made once for each."""
    height = warps * 32 * WORDS * 2 // slab
    made = _slices.setdefault(order.offsets, {})
    if height not in made:
        made[height] = _cut(order, height)
    return made[height]


def slab_tokens(channels: int) -> int:
    """How many tokens of all channels fit in L1: 64, 32, 16 or 8."""
    return next((n for n in (64, 32, 16) if channels * n * 2 <= L1_BYTES), 8)


def suits(dtype: torch.dtype, channels: int, tokens: int) -> bool:
    """Whether these kernels take activations (B, channels, tokens): bf16, up to 65,536 channels, whole slabs."""
    return dtype == torch.bfloat16 and channels <= CHANNELS and tokens % slab_tokens(channels) == 0


def matmul(
    x: Tensor, values: Tensor, order: Order, bias: Tensor | None = None, slab: int | None = None, warps: int = WARPS
) -> Tensor:
    """As `sparse_linear.matmul`, for bf16. Differs: the values are rounded to bf16, as a dense product's would be.

    Args:
        x, values, order, bias: as there.
        slab: tokens of a slab, a power of two that divides T; None takes what fits in L1.
        warps: of a program.
    """
    blocks, channels, tokens = x.shape
    y = torch.empty(blocks, order.n_lines, tokens, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    slab = slab or slab_tokens(channels)
    cut, pairs = slices(order, slab, warps), slab // 2
    with torch.cuda.device_of(x):
        _matmul[(blocks * tokens // (2 * pairs),)](
            _words(x), y.view(torch.int32), _pack(values, order, cut), cut.lines, cut.starts, cut.full, bias,
            cut.full.numel(), order.n_lines, channels, tokens // 2,
            PAIRS=pairs, R=cut.height, num_warps=warps, maxnreg=REGISTERS,
        )  # fmt: skip
    return y


def sampled_matmul(y: Tensor, x: Tensor, order: Order) -> Tensor:
    """As `sparse_linear.sampled_matmul`, for bf16. Each group of slabs adds to its own partial sums, in order."""
    blocks, channels, tokens = x.shape
    slab = slab_tokens(channels)
    cut, pairs = slices(order, slab), slab // 2
    n_slabs, n_slices = blocks * tokens // (2 * pairs), cut.full.numel()
    per_group = max(1, triton.cdiv(n_slabs, GROUPS))
    groups = max(1, triton.cdiv(n_slabs, per_group))  # none is left without a slab
    partial = torch.empty(groups, cut.source.numel(), dtype=torch.float32, device=x.device)
    if not (order.indices.numel() and n_slabs):
        return partial.new_zeros(order.indices.numel())
    with torch.cuda.device_of(x):
        _sampled_matmul[(groups * n_slices,)](
            _words(y), _words(x), partial, _pack(None, order, cut), cut.lines, cut.starts,
            n_slices, order.n_lines, channels, tokens // 2, cut.source.numel(), n_slabs, per_group,
            PAIRS=pairs, R=cut.height, num_warps=WARPS,
        )  # fmt: skip
    return partial[:, cut.slots].sum(0)


def _words(x: Tensor) -> Tensor:
    """Pairs of tokens as int32; a tensor that begins in the middle of a word is copied."""
    return (x.clone() if x.storage_offset() % 2 else x).view(torch.int32)


def _cut(order: Order, height: int) -> Slices:
    device, n = order.offsets.device, order.n_lines
    n_slices = triton.cdiv(n, height)
    lines = torch.full((n_slices * height,), n, dtype=torch.int64, device=device)
    lines[:n] = order.by_length
    lengths = torch.zeros(n + 1, dtype=torch.int64, device=device)
    lengths[:n] = order.offsets.diff()
    length = lengths[lines].view(n_slices, height)  # falling
    starts = torch.zeros(n_slices + 1, dtype=torch.int64, device=device)
    starts[1:] = (length[:, 0] * height).cumsum(0)
    n_slots = int(starts[-1])
    of_slice = torch.repeat_interleave(torch.arange(n_slices, device=device), starts.diff(), output_size=n_slots)
    within = torch.arange(n_slots, device=device) - starts[of_slice]
    row, step = of_slice * height + within % height, within // height
    exists = step < length.flatten()[row]
    source = torch.full((n_slots + height,), -1, dtype=torch.int64, device=device)
    source[:n_slots] = torch.where(exists, order.offsets[lines[row].clamp(max=n)] + step, -1)
    slots = torch.empty(order.indices.numel(), dtype=torch.int64, device=device)
    taken = exists.nonzero().flatten()
    slots[source[taken]] = taken
    # A slice whose last row is no line at all has no full step.
    return Slices(lines.int(), starts.int(), length[:, -1].int(), source.int(), slots, height)


def _pack(values: Tensor | None, order: Order, cut: Slices) -> Tensor:
    """(P + R,) int32: channel and bf16 value of every slot; an empty slot is 0, and so is any value of None."""
    packed = torch.empty_like(cut.source)
    grid = (triton.cdiv(packed.numel(), 1024),)
    _pack_slots[grid](values, order.indices, cut.source, packed, packed.numel(), BLOCK=1024)
    return packed


@triton.jit
def _pack_slots(values, indices, source, packed, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    e = tl.load(source + at, mask=at < n, other=-1)
    word = tl.load(indices + e, mask=e >= 0, other=0)
    if values is not None:
        value = tl.load(values + e, mask=e >= 0, other=0.0).to(tl.float32)
        word |= _upper_half(value)
    tl.store(packed + at, word, mask=at < n)


@triton.jit
def _upper_half(x):
    """A float32 rounded to bf16 (to nearest even; a NaN stays one), in the upper half of an int32."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, rounded, 0x7FC00000)


@triton.jit
def _low(word):
    """The even token of a pair."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(word):
    """The odd token of a pair, or the value of a packed nonzero."""
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _matmul(
    x, y, packed, lines, starts, full, bias, n_slices, n_lines, n_channels, n_pairs,
    PAIRS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """All lines over one slab. Words of x and y are pairs of tokens."""
    per_block = n_pairs // PAIRS
    slab = tl.program_id(0)
    block = (slab // per_block).to(tl.int64)
    pair = slab % per_block * PAIRS + tl.arange(0, PAIRS)  # (PAIRS,)
    row = tl.arange(0, R)  # (R,)
    x += block * n_channels * n_pairs
    for s in range(n_slices):
        start, steps = tl.load(starts + s), (tl.load(starts + s + 1) - tl.load(starts + s)) // R
        n_full = tl.load(full + s)
        line = tl.load(lines + s * R + row).to(tl.int64)
        even = tl.zeros([R, PAIRS], tl.float32)
        if bias is not None:
            even += tl.load(bias + line, mask=line < n_lines, other=0.0).to(tl.float32)[:, None]
        odd = even
        ahead = packed + start + R  # the words of the step after
        word = tl.load(ahead - R + row)
        for _ in range(n_full):
            after = tl.load(ahead + row)
            read = tl.load(x + (word & 0xFFFF).to(tl.int64)[:, None] * n_pairs + pair[None, :])  # (R, PAIRS)
            value = _high(word)[:, None]
            even = tl.fma(_low(read), value, even)
            odd = tl.fma(_high(read), value, odd)
            word = after
            ahead += R
        word = tl.load(ahead - R + row)  # again: `word` of two loops would change its layout through shared memory
        for _ in range(n_full, steps):  # some lines have ended: what they would read might be a NaN
            after = tl.load(ahead + row)
            source = x + (word & 0xFFFF).to(tl.int64)[:, None] * n_pairs + pair[None, :]
            read = tl.load(source, mask=(word != 0)[:, None], other=0)
            value = _high(word)[:, None]
            even = tl.fma(_low(read), value, even)
            odd = tl.fma(_high(read), value, odd)
            word = after
            ahead += R
        both = ((_upper_half(even) >> 16) & 0xFFFF) | _upper_half(odd)
        target = y + (block * n_lines + line)[:, None] * n_pairs + pair[None, :]
        tl.store(target, both, mask=(line < n_lines)[:, None])


@triton.jit
def _sampled_matmul(
    y, x, partial, packed, lines, starts, n_slices, n_lines, n_channels, n_pairs, n_slots, n_slabs, slabs_per_group,
    PAIRS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """One slice over one group of slabs, whose sums it keeps in `partial`, a row of n_slots for each group."""
    group, s = tl.program_id(0) // n_slices, tl.program_id(0) % n_slices
    per_block = n_pairs // PAIRS
    row = tl.arange(0, R)  # (R,)
    line = tl.load(lines + s * R + row).to(tl.int64)
    start, end = tl.load(starts + s), tl.load(starts + s + 1)
    first = group * slabs_per_group
    for slab in range(first, tl.minimum(first + slabs_per_group, n_slabs)):
        tl.debug_barrier()  # a sum may be read by another thread than wrote it for the slab before
        block = (slab // per_block).to(tl.int64)
        pair = slab % per_block * PAIRS + tl.arange(0, PAIRS)  # (PAIRS,)
        out = y + (block * n_lines + line)[:, None] * n_pairs + pair[None, :]  # (R, PAIRS)
        mine = tl.load(out, mask=(line < n_lines)[:, None], other=0)
        for at in range(start, end, R):
            word = tl.load(packed + at + row)
            source = x + (block * n_channels + (word & 0xFFFF).to(tl.int64))[:, None] * n_pairs + pair[None, :]
            read = tl.load(source)
            products = tl.fma(_low(read), _low(mine), _high(read) * _high(mine))
            sums = partial + group.to(tl.int64) * n_slots + at + row[:, None]  # (R, 1): stays where the sum is made
            before = tl.load(sums, mask=row[:, None] < R * (slab > first), other=0.0)
            tl.store(sums, before + tl.sum(products, 1, keep_dims=True))
