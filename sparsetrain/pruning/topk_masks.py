"""One score per edge, learnt with masks of every size at once: a ranking that can be cut anywhere."""

from pathlib import Path

import torch
from torch import Tensor

from sparsetrain.prune_config import TopkMaskOptions
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.edges import EdgeGraph, EdgeSet, like, n_edges, unflat
from sparsetrain.pruning.mask_training import Objective, State, about_edges, adam_, build_objective, new_state, train
from sparsetrain.pruning.objective import Metric
from sparsetrain.tasks import TaskData

N_CUTS = 21  # at which rankings are compared, from all edges to one
APART = 1_000_003  # between the seeds of two starts
EVEN = 1e-6  # no smaller deviation of scores tells edges apart


def rank(
    graph: EdgeGraph,
    data: TaskData,
    ablation: Ablation,
    metric: Metric,
    options: TopkMaskOptions,
    seed: int = 0,
    state: Path | None = None,
) -> EdgeSet:
    """Learn one score per edge; each step asks for the best circuit of another size.

    Args:
        graph: of the model; its weights get no gradient.
        data: the prompts to learn on.
        ablation: what replaces the activation that an edge carries when it is cut.
        metric: what the circuit is to preserve; greater is better.
        options: see TopkMaskOptions.
        seed: of sizes and prompts.
        state: a file to go on from after a kill; see `mask_training.train`.

    Returns:
        The mean of each edge's score over the steps; all zeros where no edge matters.

    Raises:
        StateError: `state` is damaged, or of a training with other settings.

    Source: matryoshka attribution (arXiv 2609.25518) and its released trainer.py.
    Differs: of several starts the one is kept whose circuits, cut at sizes from all edges to one, lose least. Some
    starts close edges of one path together early on, and opening one of them alone then gains nothing; so each start
    after the first begins with the ranking of the one before upside down, in which just those edges are open.
    Sizes are drawn log-uniformly between all edges and a smallest size, which falls to one over the steps.
    From the start on, small sizes break the model, and a broken one tells nothing of what its edges are for.
    Edges are ranked by the mean over the steps in the place of the last scores: sizes below the circuit's own go on
    to trade one edge that it needs for another, until one of them sinks among those that it does not need.
    """
    objective = build_objective(graph, data, ablation, metric)
    if objective is None:
        return like(graph, 0.0)
    values = torch.zeros(n_edges(graph.edges), device=graph.model.unembed.weight.device)
    rankings: list[Tensor] = []
    for i in range(options.starts):
        own = seed + i * APART
        end = train(
            {**new_state(values), "total": torch.zeros_like(values)},
            lambda s, k, generator: _step(objective, s, k, generator, options), options.steps,
            torch.Generator().manual_seed(own), state and state.with_stem(f"{state.stem}-{i}"),
            about_edges(graph, data, ablation, metric, options, own),
        )  # fmt: skip
        rankings.append(end["total"] / options.steps)
        values = -rankings[-1] / rankings[-1].std(correction=0).clamp_min(EVEN)
    return unflat(graph, min(rankings, key=lambda scores: _loss_of_cuts(objective, scores, options.batch, seed)))


@torch.no_grad()
def _loss_of_cuts(objective: Objective, scores: Tensor, batch: int, seed: int) -> float:
    """The mean loss of a ranking's beginnings of all sizes, evenly spaced by their logarithm; on the same prompts."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for i in range(N_CUTS):
        best = scores.topk(round(len(scores) ** (i / (N_CUTS - 1)))).indices
        masks = torch.zeros_like(scores).index_fill(0, best, 1.0)
        total += objective.loss(masks, batch, generator).item()
    return total / N_CUTS


def _step(objective: Objective, state: State, k: int, generator: torch.Generator, options: TopkMaskOptions) -> None:
    scores = state["values"].detach().requires_grad_()
    smallest = 1 - (k + 1) / options.steps  # as a power of the number of edges
    power = smallest + (1 - smallest) * torch.rand((), generator=generator).item()
    size = len(scores) ** power
    loss = objective.loss(masks_of_size(scores, size, options.temperature), options.batch, generator)
    (gradient,) = torch.autograd.grad(loss, scores)
    adam_(state["values"], gradient, state, k, options.lr)
    state["total"] += state["values"]


def masks_of_size(scores: Tensor, size: float, temperature: float) -> Tensor:
    """Masks sigmoid((score - tau) / temperature) that sum to `size`, in (0, n); gradients flow through tau too."""
    values = scores.detach().double() / temperature
    low, high = values.min() - 40, values.max() + 40
    for _ in range(60):
        middle = (low + high) / 2
        over = torch.sigmoid(values - middle).sum() > size
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    m = torch.sigmoid(values - low)
    share = (m * (1 - m) / (m * (1 - m)).sum()).to(scores.dtype)  # d tau / d score, since the sum stays what it is
    tau = temperature * low.to(scores.dtype) + share @ (scores - scores.detach())
    return torch.sigmoid((scores - tau) / temperature)
