"""The projection of weights whose rows lie on several processes: exactly that of the whole, and no weight is sent.

The least magnitude that is kept is found by bisection, a bit at a time: each process counts its own entries that reach
the next guess, and the counts are added up over all of them. Magnitudes order like the bits of their floats.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sparsetrain.kernels.ops import abs_topk

INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
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
    device, lowest = keys[0].device, torch.iinfo(keys[0].dtype).min
    k = torch.tensor(ks).repeat_interleave(torch.tensor(sizes)).to(device)
    bound = torch.full_like(k, lowest, dtype=keys[0].dtype)
    for bit in (lowest, *(1 << i for i in reversed(range(keys[0].itemsize * 8 - 1)))):
        guess = bound ^ bit  # from the sign on, whose absence is the greater half
        bound = torch.where(_added_up(_counts(torch.ge, keys, guess)) >= k, guess, bound)
    room = k - _added_up(_counts(torch.gt, keys, bound)) - _before(_counts(torch.eq, keys, bound))
    parts = zip(keys, bound.split(sizes), room.split(sizes), strict=True)
    return [_kept(key, least, fits) for key, least, fits in parts]


def _kept(key: Tensor, least: Tensor, room: Tensor) -> Tensor:
    """(m, C): what is above `least` (C,), and of what equals it the first `room` (C,) rows."""
    tied = key == least
    return (key > least) | (tied & (tied.cumsum(0, dtype=torch.int32) <= room))


def _counts(compare: Callable[[Tensor, Tensor], Tensor], keys: list[Tensor], bounds: Tensor) -> Tensor:
    """How many entries of each column compare so with its bound, int64, column after column of all keys."""
    parts = bounds.split([key.shape[1] for key in keys])
    return torch.cat([compare(key, bound).sum(0) for key, bound in zip(keys, parts, strict=True)])


def _added_up(counts: Tensor) -> Tensor:
    dist.all_reduce(counts)
    return counts


def _before(counts: Tensor) -> Tensor:
    """The sum of these counts over the processes whose rows come before."""
    of_each = counts.new_zeros(dist.get_world_size(), *counts.shape)
    of_each[dist.get_rank()] = counts
    return _added_up(of_each)[: dist.get_rank()].sum(0)
