"""Training at candidates: each matrix holds weights, gradients and moments at a few times its nonzeros alone.

Source: Top-KAST (Jayakumar et al. 2020) trains the top-k and a superset of it; RigL (Evci et al. 2020) looks at the
dense gradient once in a while. Differs from both: the k nonzeros are chosen among the candidates after every step, as
Gao et al. 2025 (A.2) choose them among all entries, so that all candidates for every matrix is their rule.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsetrain import parallel
from sparsetrain.config import SparsityOptions
from sparsetrain.sparsity import Projected


@dataclass
class Refill:
    """Dense gradients that one step collects, to choose new candidates by: none while no refill is due."""

    due: list[Projected] = field(default_factory=list)
    chosen: dict[str, Tensor] = field(default_factory=dict)


def n_candidates(t: Projected, options: SparsityOptions, progress: float) -> int:
    """How many candidates a matrix has at `progress`; as many as it has entries where it holds them all."""
    return min(t.size, int(options.candidates * t.l0(options, progress)))


def start_refill(tensors: list[Projected], options: SparsityOptions, step: int, steps: int, n_sequences: int) -> Refill:
    """Before step `step`: find the matrices whose candidates it shall choose anew, and have them explored.

    Those are all that are held at candidates, every `refill_every` steps, and any that is still held whole and has
    fewer candidates than entries by now.

    Args:
        n_sequences: in a part of the batch, over all processes; a share of the first part decides.
    """
    if options.gradient == "dense":
        return Refill()
    progress, again = step / steps, step % options.refill_every == 0
    linear = [t for t in tensors if t.linear is not None and (again or t.linear.candidates is None)]
    refill = Refill([t for t in linear if n_candidates(t, options, progress) < t.size])
    for t in refill.due:
        if t.linear.candidates is not None:
            t.linear.explore_blocks = parallel.n_mine(max(1, round(options.refill_share * n_sequences)))
            t.linear.explore = lambda gradient, t=t: _choose(refill, t, gradient, n_candidates(t, options, progress))
    return refill


@torch.no_grad()
def _choose(refill: Refill, t: Projected, gradient: Tensor, n: int) -> None:
    """Keep the entries where the dense gradient is greatest, and drop it: one matrix is whole at a time."""
    refill.chosen[t.name] = parallel.sum_(gradient).abs_().flatten().topk(n).indices


@torch.no_grad()
def finish_refill_(refill: Refill, optimizer: torch.optim.Optimizer, options: SparsityOptions, progress: float) -> None:
    """After the step and its projection: nonzeros stay candidates, and the greatest gradients fill the other places.

    A matrix that was held whole is held at candidates from now on, those with the greatest first moments. Moments
    follow their entries; those of new ones are zero.
    """
    for t in refill.due:
        linear, state = t.linear, optimizer.state[t.parameter]
        held = t.parameter.detach().flatten().nonzero().squeeze(-1)
        alive = held if linear.candidates is None else linear.indices()[held]
        n = max(n_candidates(t, options, progress), alive.numel())
        if linear.candidates is None:
            by_rank = state["exp_avg"].flatten().abs().topk(n).indices
        else:
            by_rank = refill.chosen[t.name]
        new = by_rank[~torch.isin(by_rank, alive)][: n - alive.numel()]
        former = linear.hold_(torch.cat([alive, new]).sort().values)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.where(former >= 0, state[moment].flatten()[former], 0)
