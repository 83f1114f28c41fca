"""Pruning by learnt node masks: the paper's own method (Gao et al. 2025, A.5)."""

from pathlib import Path

import torch
from torch import Tensor

from sparsetrain.model import Transformer
from sparsetrain.prune_config import NodeMaskOptions
from sparsetrain.pruning.ablation import Ablation, draw_places
from sparsetrain.pruning.evaluate import Calibration, answer_logits, task_losses
from sparsetrain.pruning.graph import node_sites
from sparsetrain.pruning.mask_training import State, about, train
from sparsetrain.tasks import TaskData


class StepFunction(torch.autograd.Function):
    """Heaviside's step forward; backward the derivative of a sigmoid: H'(t) := s'(t / T) / T (A.5)."""

    @staticmethod
    def forward(ctx, tau: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(tau)
        ctx.temperature = temperature
        return (tau >= 0).to(tau.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        s = torch.sigmoid(ctx.saved_tensors[0] / ctx.temperature)
        return grad * s * (1 - s) / ctx.temperature, None


def rank_nodes(
    model: Transformer,
    data: TaskData,
    ablation: Ablation,
    options: NodeMaskOptions,
    tie_qk: bool,
    seed: int,
    state: Path | None = None,
) -> dict[str, Tensor]:
    """Learn a mask over all nodes; its parameters rank them.

    The loss is the task's, over the answers' logits alone, plus `count_penalty` for each node kept. The model is
    frozen. One mask serves all prompts and positions.

    Args:
        model: any model; its parameters get no gradient.
        data: the prompts to learn on.
        ablation: what replaces a node that is masked.
        options: see NodeMaskOptions.
        tie_qk: one mask for a query channel and its key channel.
        seed: of initial masks and batches.
        state: a file to go on from after a kill; see `mask_training.train`.

    Returns:
        For each node site the mask parameters tau (width,), in [-1, 1]; a node is in the learnt circuit where
        tau >= 0. Under `tie_qk` a query channel and its key channel have one parameter.

    Raises:
        StateError: `state` is damaged, or of a search with other settings.
    """
    generator = torch.Generator().manual_seed(seed)
    free = _initial(model, options, tie_qk, generator)
    tau = {site: free[_owner(site, free)] for site in node_sites(model.options)}
    optimizer = torch.optim.AdamW(
        free.values(), lr=options.lr, betas=(0.9, options.beta2), eps=1e-8, weight_decay=options.weight_decay
    )
    frozen = [p for p in model.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)

    def step(_: State, k: int, generator: torch.Generator) -> None:
        for group in optimizer.param_groups:
            group["lr"] = options.lr * (1 - k / options.steps)
        part = data.take(_pairs(len(data) // 2, options.batch_pairs, generator))
        gates = {site: StepFunction.apply(t, options.temperature) for site, t in tau.items()}
        logits = answer_logits(model, part, gates, ablation, draw_places(ablation, part.tokens, generator))
        kept = sum(gate.sum() for gate in gates.values())
        loss = task_losses(Calibration()(logits, part)).mean() + options.count_penalty * kept
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(free.values(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for t in free.values():
                t.clamp_(-1, 1)

    asked = {"options": repr(options), "tie_qk": tie_qk, "seed": seed}
    note = about("nodes", model, data, ablation, asked)
    try:
        train(_state(free, optimizer), step, options.steps, generator, state, note)
    finally:
        for p in frozen:
            p.requires_grad_(True)
    return {site: t.detach() for site, t in tau.items()}


def _initial(
    model: Transformer, options: NodeMaskOptions, tie_qk: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    """The mask parameters of each site at the start; of tied ones those of the queries."""
    return {
        site: torch.empty(width)
        .normal_(options.init_mean, options.init_std, generator=generator)
        .clamp_(-1, 1)
        .to(model.unembed.weight.device)
        .requires_grad_()
        for site, width in node_sites(model.options).items()
        if not (tie_qk and site.endswith(".k"))
    }


def _state(free: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> State:
    """The tensors that a step changes in place: mask parameters, and what the optimizer holds of each."""
    state: State = {}
    for site, t in free.items():
        optimizer.state[t] = {
            "step": torch.zeros(()), "exp_avg": torch.zeros_like(t), "exp_avg_sq": torch.zeros_like(t)
        }  # fmt: skip
        state |= {site: t.detach(), **{f"{site} {name}": x for name, x in optimizer.state[t].items()}}
    return state


def _owner(site: str, free: dict[str, Tensor]) -> str:
    return site if site in free else site[:-1] + "q"


def _pairs(n_pairs: int, n: int, generator: torch.Generator) -> list[int]:
    """Rows of n random pairs, both prompts of each."""
    chosen = torch.randperm(n_pairs, generator=generator)[:n]
    return (2 * chosen[:, None] + torch.arange(2)).flatten().tolist()
