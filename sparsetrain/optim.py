"""The optimiser of the paper: normalised gradients, Adam with a large epsilon, sharkfin rate, decay afterwards."""

import torch
from torch import Tensor, nn

from sparsetrain import parallel
from sparsetrain.config import OptimOptions, SparsityOptions
from sparsetrain.linear import Linear
from sparsetrain.model import Transformer
from sparsetrain.sparsity import density

PART = 4096  # gradients that are summed in one piece


def build_adam(model: nn.Module, options: OptimOptions) -> torch.optim.Adam:
    """Adam without weight decay over all parameters (decay comes after the projection, see `decay_`)."""
    return torch.optim.Adam(
        model.parameters(), lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps, fused=True
    )


def learning_rate(options: OptimOptions, sparsity: SparsityOptions, progress: float) -> float:
    """The learning rate at `progress` in [0, 1): warm-up, linear decay to 0, times sqrt(final L0 / L0 now).

    Source: Gao et al. 2025, A.2 ("sharkfin"), normalised to the final L0 as in the released train.py, so that the
    factor is at most 1 and equals 1 once the density has reached its target.
    """
    warm = min(1.0, progress / options.warmup) if options.warmup else 1.0
    fin = (sparsity.density / density(sparsity, progress)) ** 0.5 if options.sharkfin else 1.0
    return options.lr * warm * (1 - progress) * fin


@torch.no_grad()
def scale_gradients_(model: Transformer, rule: str) -> Tensor:
    """Scale all gradients by one factor, in place; returns their RMS before (a 0-d tensor).

    `normalise` makes the RMS over all parameters 1 (the released train.py), `clip` does so only where it is above 1
    (the paper's text, A.2), `none` changes nothing. Entries that are not held (sparsity.gradient=candidates) count as
    entries whose gradient is zero.
    """
    whole = [p.grad for p in model.parameters() if p.grad is not None]
    gradients = [parallel.local(g) for g in whole]
    squares = torch.stack([_sum_of_squares(g) for g in gradients]).sum()
    if parallel.is_sharded(whole[0]):
        parallel.sum_(squares)
    size = sum(m.shape[0] * m.shape[1] - m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    rms = (squares / (size + sum(g.numel() for g in whole))).sqrt()
    if rule != "none":
        torch._foreach_div_(gradients, rms + 1e-5 if rule == "normalise" else rms.clamp_min(1.0))
    return rms


def _sum_of_squares(x: Tensor) -> Tensor:
    """In parts, since torch splits a sum over a whole tensor by thread, and its bits would follow their number."""
    whole = x.numel() // PART * PART
    parts = torch.linalg.vector_norm(x.view(-1)[:whole].view(-1, PART), dim=-1)
    return parts.square().sum() + torch.linalg.vector_norm(x.view(-1)[whole:]).square()


@torch.no_grad()
def decay_(model: Transformer, options: OptimOptions, lr: float) -> None:
    """Decay every matrix but the bigram table towards zero, in place; called after the projection.

    Source: the released train.py; the paper states the coefficient 0.1 (A.2).
    """
    matrices = [parallel.local(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.Linear))]
    torch._foreach_mul_(matrices, 1 - lr * options.weight_decay)
