"""Edge Pruning: hard concrete masks over edges, which close under a rising demand for sparsity."""

import math
from pathlib import Path

import torch
from torch import Tensor

from sparsetrain.prune_config import EdgeMaskOptions
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.edges import EdgeGraph, EdgeSet, like, n_edges, unflat
from sparsetrain.pruning.mask_training import Objective, State, about_edges, adam_, build_objective, new_state, train
from sparsetrain.pruning.objective import Metric
from sparsetrain.tasks import TaskData

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # of the hard concrete distribution


def rank(
    graph: EdgeGraph,
    data: TaskData,
    ablation: Ablation,
    metric: Metric,
    options: EdgeMaskOptions,
    seed: int = 0,
    state: Path | None = None,
) -> EdgeSet:
    """Learn a mask over all edges while ever fewer may stay; how long each stays open ranks them.

    Each step draws the gates z of all edges, runs some prompts, and lowers -metric + price x (sum of z). The price is
    the multiplier of the constraint that no more than a number of edges is open, which falls over the steps from all
    edges to one, by the same factor at each step.

    Args:
        graph: of the model; its weights get no gradient.
        data: the prompts to learn on.
        ablation: what replaces the activation that an edge carries when it is cut.
        metric: what the circuit is to preserve; greater is better.
        options: see EdgeMaskOptions.
        seed: of initial masks, gates and prompts.
        state: a file to go on from after a kill; see `mask_training.train`.

    Returns:
        The share of the steps, weighted by probability, that each edge was open; all zeros where no edge matters.

    Raises:
        StateError: `state` is damaged, or of a training with other settings.

    Source: Bhaskar et al. 2024, sections 3 and 4, and their released l0.py; Louizos et al. 2018 for the distribution.
    Differs: made to be exact without tuning for each model.
        The metric is divided by what cutting every edge costs, so that one price suits every task.
        One positive multiplier, whose logarithm ascends in proportion to how many edges too many are open, also on
        a logarithmic scale, in the place of lam1 (s - t) + lam2 (s - t)^2 with a sparsity t that rises linearly.
        Theirs swings far above what it takes to close the edges that are not needed, the circuit breaks, and a
        broken circuit has no gradient to mend it; and a sparse circuit would be decided in the last few steps.
        Gates start at log alpha 5, and stay within +-5, in the place of 10, where a gate moves by one rare draw.
        The number goes on to one, and edges are ranked by how long they stay open, in the place of a threshold at
        one sparsity that has to be known before.
    """
    objective = build_objective(graph, data, ablation, metric)
    if objective is None:
        return like(graph, 0.0)
    n, device = n_edges(graph.edges), graph.model.unembed.weight.device
    noise = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    start = new_state((options.init_mean + options.init_std * noise).to(device))
    start |= {"opened": torch.zeros(n, device=device), "log_price": torch.tensor(math.log(options.price))}
    end = train(
        start, lambda s, k, generator: _step(objective, s, k, generator, options), options.steps,
        torch.Generator().manual_seed(seed), state,
        about_edges(graph, data, ablation, metric, options, seed),
    )  # fmt: skip
    return unflat(graph, end["opened"] / options.steps)


def _step(objective: Objective, state: State, k: int, generator: torch.Generator, options: EdgeMaskOptions) -> None:
    log_alpha = state["values"].detach().requires_grad_()
    n = len(log_alpha)
    gates = hard_concrete(log_alpha, generator)
    # In units of an average edge: the task counts n, so that an edge's share of it is of order 1.
    loss = n * objective.loss(gates, options.batch, generator) + state["log_price"].exp() * gates.sum()
    (gradient,) = torch.autograd.grad(loss, log_alpha)
    adam_(state["values"], gradient, state, k, options.lr)
    state["values"].clamp_(-options.bound, options.bound)
    state["opened"] += open_probability(state["values"])
    still_open = math.log(max(gates.detach().sum().item(), 1)) / math.log(n + 1)
    lag = still_open - (1 - (k + 1) / options.steps)
    low, high = math.log(options.price), math.log(2 * n)  # above `high` nothing is worth its price
    state["log_price"].add_(options.gain * lag / options.steps).clamp_(low, max(low, high))


def hard_concrete(log_alpha: Tensor, generator: torch.Generator) -> Tensor:
    """Draw gates in [0, 1], many of them exactly 0 or 1; gradients flow through (Louizos et al. 2018)."""
    u = torch.rand(log_alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(log_alpha.device)
    s = torch.sigmoid((u.logit() + log_alpha) / TEMPERATURE)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """The probability that a gate is not exactly 0."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))
