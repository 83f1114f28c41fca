"""AbsTopK on the GPU, in Triton: each token's threshold by bisection, in registers, in either memory layout.

The magnitudes of IEEE floats order like their bits without the sign, so the k-th greatest is found bit by bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrain.kernels.reference import is_channel_major

MAX_WIDTH = 32768
MAX_STRIDED = 16384  # channels; above, one token's would not fit in registers beside their addresses
# The integer as wide as each float, and the bits of infinity: those of every NaN are greater.
FORMATS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}


def abs_topk(x: Tensor, k: int) -> Tensor:
    """`reference.abs_topk` without its gradient.

    Args:
        x: (..., D), D <= 32768; float32, bfloat16 or float16. Token-major (x is contiguous) or channel-major (x.mT
            is); a tensor of other strides is copied first. A channel-major one of over 16384 channels is copied to
            token-major, and the result back.
        k: entries kept, 0 <= k <= D.

    Returns:
        (..., D), with the strides of x, or contiguous where x was copied.

    Raises:
        ValueError: D is above 32768.
    """
    x = dense(x)
    if k == 0 or x.numel() == 0:
        return torch.zeros_like(x)
    if x.shape[-1] > MAX_STRIDED and not x.is_contiguous():
        return abs_topk(x.contiguous(), k).mT.contiguous().mT
    out = torch.empty_like(x)
    integer, infinity = FORMATS[x.dtype]
    n_planes, n_tokens, width, *strides = planes(x)
    tile = tile_for(x)
    grid = (n_planes * triton.cdiv(n_tokens, tile["BT"]),)
    with torch.cuda.device_of(x):
        _abs_topk[grid](x.view(integer), out.view(integer), n_tokens, k, *strides, INFINITY=infinity, D=width, **tile)
    return out


def abs_topk_backward(grad: Tensor, out: Tensor) -> Tensor:
    """The gradient of `abs_topk` at its input.

    Args:
        grad: (..., D), any strides.
        out: (..., D), what `abs_topk` returned, of the same dtype.

    Returns:
        (..., D), `grad` where `out` is not zero (NaN is not), with the strides of `out`.
    """
    out = dense(out)
    in_grad = torch.empty_like(out)
    if grad.stride() != out.stride():
        grad = torch.empty_like(out).copy_(grad)
    integer, _ = FORMATS[out.dtype]
    n, block = out.numel(), 4096
    if n:
        with torch.cuda.device_of(out):
            _abs_topk_backward[(triton.cdiv(n, block),)](
                grad.view(integer), out.view(integer), in_grad.view(integer), n, torch.iinfo(integer).max, BLOCK=block
            )
    return in_grad


def dense(x: Tensor) -> Tensor:
    """x itself if it is token-major or channel-major, else a token-major copy."""
    return x if is_channel_major(x) else x.contiguous()


def planes(x: Tensor) -> tuple[int, int, int, int, int, int]:
    """How many planes, tokens and channels a dense x has, then the stride of each in entries."""
    width = x.shape[-1]
    if x.is_contiguous():
        return 1, x.numel() // width, width, 0, width, 1
    n_tokens = x.shape[-2]
    return x.numel() // (n_tokens * width), n_tokens, width, n_tokens * width, 1, n_tokens


def tile_for(x: Tensor) -> dict[str, int]:
    """The tokens by channels that one program holds in registers, and its warps: 64 entries a thread, or 32.

    The largest that spill no register when compiled for sm_90, but for channel-major tensors of over 16384 channels,
    which come from the projection's floors for columns alone.
    A thread of a channel-major tile has two tokens: to add up the counts of more than that across threads costs more
    than wider loads save. Eight tokens make runs of 16 bytes or more.

    Raises:
        ValueError: x has more than 32768 channels.
    """
    width = x.shape[-1]
    if width > MAX_WIDTH:
        raise ValueError(f"x must have at most {MAX_WIDTH} channels for the Triton kernels, got {width}")
    padded = max(16, triton.next_power_of_2(width))
    if x.is_contiguous():
        return {"BT": max(1, 2048 // padded), "DP": padded, "VECTOR": 1, "num_warps": max(1, padded // 2048)}
    a_warp = 32 * (64 if x.element_size() == 2 else 32)
    n_tokens = max(1, min(8, 16 * a_warp // padded))
    n_warps = max(1, n_tokens * padded // a_warp)
    return {"BT": n_tokens, "DP": padded, "VECTOR": min(2, n_tokens), "num_warps": n_warps}


@triton.jit
def signless(bits, INFINITY: tl.constexpr):
    """The magnitudes of floats as int32, from their bits."""
    return bits.to(tl.int32) & (0x7FFFFFFF if INFINITY > 0xFFFF else 0x7FFF)


@triton.jit
def ranked(bits, INFINITY: tl.constexpr):
    """Magnitudes in the order of the reference: any NaN above infinity."""
    return tl.minimum(signless(bits, INFINITY), INFINITY + 1)


@triton.jit
def unranked(rank, INFINITY: tl.constexpr):
    """The least magnitude of at least this rank; one that is never reached where there is none."""
    return tl.where(rank <= INFINITY + 1, rank, 0x7FFFFFFF)


@triton.jit
def _bisect(key, k, active, RANGE: tl.constexpr):
    """The k-th greatest key of each token, or any bound that exactly k reach.

    Args:
        key: (BT, DP) float32 of integers below RANGE, a power of 2. Keys below 1 are not counted.
        k: (BT,) float32, at least 1.
        active: (BT,) whether to search; the bound stays 0 where not.

    Returns:
        (BT,) each: the bound, how many keys equal to it belong to the greatest k, and whether more than those are.
    """
    bound = tl.zeros_like(k)
    above = tl.zeros_like(k)
    surplus = active
    step = RANGE / 2.0
    while (step > 0.75) & (tl.max(surplus.to(tl.int32), axis=0) > 0):
        candidate = bound + step
        # The difference of two integers saturates to whether it is positive: one FADD.SAT, twice as fast as a compare.
        count = tl.sum(tl.clamp(key - (candidate - 1.0)[:, None], 0.0, 1.0), axis=1)
        reached = active & (count >= k)
        bound = tl.where(reached, candidate, bound)
        above = tl.where(reached, above, count)
        surplus = tl.where(reached, count > k, surplus)
        step *= 0.5
    return bound, k - above, surplus


@triton.jit
def cutoff(x, mask, channel, k, INFINITY: tl.constexpr, BT: tl.constexpr, DP: tl.constexpr):
    """What tells the k greatest of each token's entries from the others.

    Args:
        x: (BT, DP) pointers to the entries' bits.
        mask: (BT, DP), which of them exist.
        channel: (DP,) int32, 0, 1, 2, ...
        k: entries kept, at least 1.

    Returns:
        (BT,) int32 each, for `kept`: the least magnitude that is kept, above 0; the least that is kept in channels
        beyond the last one with room for ties; and that channel.
    """
    size = ranked(tl.load(x, mask=mask, other=0, eviction_policy="evict_last"), INFINITY)
    room = tl.zeros([BT], tl.float32) + k
    surplus = room > 0
    if INFINITY > 0xFFFF:
        high, room, surplus = _bisect((size >> 15).to(tl.float32), room, surplus, 65536)
        high = high.to(tl.int32)
        # Read again: entries held beside their keys would not leave registers for enough of them.
        size = ranked(tl.load(x, mask=mask, other=0), INFINITY)
        key = tl.where((size >> 15) == high[:, None], (size & 0x7FFF).to(tl.float32), -1.0)
    else:
        high = tl.zeros([BT], tl.int32)
        key = size.to(tl.float32)
    low, room, surplus = _bisect(key, room, surplus, 32768)
    bound = high * 32768 + low.to(tl.int32)
    surplus &= bound > 0  # which zeros are kept makes no difference
    from_last = tl.where(key == low[:, None], (DP - 1 - channel).to(tl.float32)[None, :], -1.0)
    left, _, _ = _bisect(from_last, room, surplus, DP)
    bound = tl.maximum(bound, 1)
    beyond = unranked(bound + surplus.to(tl.int32), INFINITY)
    return unranked(bound, INFINITY), beyond, DP - 1 - left.to(tl.int32)


@triton.jit
def kept(bits, channel, bound, beyond, last, INFINITY: tl.constexpr):
    """Which entries of a tile are kept; (BT, channels), of what `cutoff` returned."""
    least = tl.where(channel[None, :] <= last[:, None], bound[:, None], beyond[:, None])
    return signless(bits, INFINITY) >= least


@triton.jit
def locate(token, channel, n_tokens, stride_token, stride_channel, D: tl.constexpr, VECTOR: tl.constexpr):
    """The int64 offsets of a tile in its plane, and which of its entries exist; (BT, channels) both."""
    offsets = token.to(tl.int64)[:, None] * stride_token + channel.to(tl.int64)[None, :] * stride_channel
    if VECTOR > 1:
        offsets = tl.max_contiguous(offsets, [VECTOR, 1])
    return offsets, (token < n_tokens)[:, None] & (channel < D)[None, :]


@triton.jit(do_not_specialize=["k"])
def _abs_topk(
    x, out, n_tokens, k, stride_plane, stride_token, stride_channel,
    INFINITY: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, DP: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(n_tokens, BT)
    plane = (tl.program_id(0) // n_blocks).to(tl.int64)
    x += plane * stride_plane
    out += plane * stride_plane
    token = tl.program_id(0) % n_blocks * BT + tl.arange(0, BT)
    channels = tl.arange(0, DP)
    offsets, mask = locate(token, channels, n_tokens, stride_token, stride_channel, D, VECTOR)
    bound, beyond, last = cutoff(x + offsets, mask, channels, k, INFINITY, BT, DP)
    # In two halves, read again, so that no address is held in a register during the search.
    for half in range(2):
        channel = half * (DP // 2) + tl.arange(0, DP // 2)
        there, exists = locate(token, channel, n_tokens, stride_token, stride_channel, D, VECTOR)
        bits = tl.load(x + there, mask=exists, other=0, eviction_policy="evict_first")
        tl.store(out + there, tl.where(kept(bits, channel, bound, beyond, last, INFINITY), bits, 0), mask=exists)


@triton.jit
def _abs_topk_backward(grad, out, in_grad, n, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    passes = (tl.load(out + offsets, mask=mask, other=0) & MAGNITUDE) != 0
    tl.store(in_grad + offsets, tl.where(passes, tl.load(grad + offsets, mask=mask, other=0), 0), mask=mask)
