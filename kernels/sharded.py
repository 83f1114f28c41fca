"""The projection of weights whose rows lie on several processes: exactly that of the whole, and no weight is sent.

The least magnitude that is kept is found by bisection, some bits at a time: each process counts its own entries that
reach the next guesses, and the counts are added up over all of them. Magnitudes order like the bits of their floats.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sparsetrain.kernels.ops import abs_topk

INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
BITS = 2  # found at once, by 2^BITS - 1 guesses: fewer messages, more counting
Budget = tuple[int, int, int]  # k, min_per_row, min_per_column: see `reference.project`


@torch.no_grad()
def project_(shards: Sequence[Tensor], budgets: Sequence[Budget]) -> None:
    """`reference.project` of several weights at once, in place; a collective of the default process group.

    Args:
        shards: of each weight (M, K) or (M,) this process' rows, (m, K) or (m,), float32 or float64, the same type.
            Those of a process come before those of the next; m may be 0.
        budgets: of each weight k, min_per_row and min_per_column. A vector has no floors.
    """
    if not shards:
        return
    forced = [abs_topk(x, row) != 0 if row else None for x, (_, row, _) in zip(shards, budgets, strict=True)]
    under = [i for i, (_, _, column) in enumerate(budgets) if column]
    floors = _greatest([_ranked(shards[i]) for i in under], [budgets[i][2] for i in under]) if under else []
    for i, greatest in zip(under, floors, strict=True):
        greatest &= shards[i] != 0
        forced[i] = greatest if forced[i] is None else forced[i] | greatest
    keys = [_with_forced(_ranked(x), mask).view(-1, 1) for x, mask in zip(shards, forced, strict=True)]
    for x, kept in zip(shards, _greatest(keys, [k for k, _, _ in budgets]), strict=True):
        x.masked_fill_(~kept.view(x.shape), 0)


def _ranked(x: Tensor) -> Tensor:
    """Integers that order as magnitudes do, from 0 on, any NaN above infinity; shaped as x."""
    integer = INTEGERS[x.dtype]
    infinity = torch.tensor(math.inf, dtype=x.dtype).view(integer).item()
    return (x.view(integer) & torch.iinfo(integer).max).clamp_(max=infinity + 1)


def _with_forced(rank: Tensor, forced: Tensor | None) -> Tensor:
    """Keys that order by rank, those that are forced above all others."""
    others = rank + torch.iinfo(rank.dtype).min
    return others if forced is None else torch.where(forced, rank, others)


def _greatest(keys: list[Tensor], ks: list[int]) -> list[Tensor]:
    """Which entries are among the k greatest of their columns on all processes; ties go to the first rows.

    Args:
        keys: integers (m, C) each: this process' rows of C columns, which are searched apart from each other.
        ks: how many of each column, at most its length on all processes.
    """
    sizes = [key.shape[1] for key in keys]
    k = torch.tensor(ks).repeat_interleave(torch.tensor(sizes)).to(keys[0].device)
    bound = torch.full_like(k, torch.iinfo(keys[0].dtype).min)
    for shift in reversed(range(0, 8 * keys[0].itemsize, BITS)):
        guesses = bound + (torch.arange(1, 1 << BITS, device=k.device)[:, None] << shift)
        counts = torch.stack([_counts(torch.ge, keys, guess) for guess in guesses])
        bound += (_added_up(counts) >= k).sum(0) << shift
    n_tied = k.new_zeros(dist.get_world_size(), k.numel())
    n_tied[dist.get_rank()] = _counts(torch.eq, keys, bound)
    n_greater, *n_tied = _added_up(torch.cat([_counts(torch.gt, keys, bound)[None], n_tied]))
    room = k - n_greater - sum(n_tied[: dist.get_rank()])
    parts = zip(keys, bound.split(sizes), room.split(sizes), strict=True)
    return [_kept(key, least.to(key.dtype), fits) for key, least, fits in parts]


def _kept(key: Tensor, least: Tensor, room: Tensor) -> Tensor:
    """(m, C): what is above `least` (C,), and of what equals it the first `room` (C,) rows."""
    tied = key == least
    return (key > least) | (tied & (tied.cumsum(0, dtype=torch.int32) <= room))


def _counts(compare: Callable[[Tensor, Tensor], Tensor], keys: list[Tensor], bounds: Tensor) -> Tensor:
    """How many entries of each column compare so with its bound, int64, column after column of all keys."""
    parts = bounds.to(keys[0].dtype).split([key.shape[1] for key in keys])
    return torch.cat([compare(key, bound).sum(0) for key, bound in zip(keys, parts, strict=True)])


def _added_up(counts: Tensor) -> Tensor:
    dist.all_reduce(counts)
    return counts
