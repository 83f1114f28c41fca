"""Scores for every edge of a graph, from gradients: how much the metric owes to it.

A score is signed, in the metric's units for one prompt: (activation - replacement) . gradient, which is the gradient of
the metric with respect to the edge's gate, so a positive edge supports the metric.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sparsetrain.config import ConfigError
from sparsetrain.prune_config import AttributionOptions
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.component_graph import ComponentGraph
from sparsetrain.pruning.eap import activations_on_the_way, component_scores, inputs_on_the_way
from sparsetrain.pruning.edges import (
    Batch,
    EdgeGraph,
    EdgeSet,
    batches,
    flat,
    gated_logits,
    like,
    mean_metric,
    unflat,
)  # fmt: skip
from sparsetrain.pruning.evaluate import parts
from sparsetrain.pruning.objective import Metric, refuse_if_flat
from sparsetrain.tasks import TaskData

FEWEST_PROMPTS = 4  # that an edge is patched on in `checked`
PATH_SHARE = 0.01  # of the integrated score in that of a patched edge


def rank(
    graph: EdgeGraph,
    data: TaskData,
    ablation: Ablation,
    metric: Metric,
    options: AttributionOptions,
    seed: int = 0,
) -> EdgeSet:
    """Score every edge of the graph.

    Args:
        graph: either graph.
        data: the prompts; scores are means over them.
        ablation: what an edge that is cut carries.
        metric: what the edges are scored by; see METRICS.
        options: the estimator and its points.
        seed: of resampled replacements, and of the prompts that edges are patched on.

    Returns:
        A score for each edge, in the metric's units: positive where the edge supports the metric. Publications that
        rank by magnitude take the absolute value.

    Raises:
        ValueError: the estimator takes its only gradient where the metric is flat, or is not defined on this graph.

    Source: `eap` Syed et al. 2023; `eap_ig_inputs`, `eap_ig_activations` Hanna et al. 2024.
    Differs: on the channel graph `eap_ig_inputs` takes the activations, too, from the runs with interpolated inputs.
    """
    if options.estimator == "eap_ig_activations" and graph.kind != "component":
        raise ConfigError(
            "eap_ig_activations must be asked for on the component graph, got the channel graph, which has no "
            "components to interpolate; take gates, or eap_ig_inputs"
        )
    if isinstance(graph, ComponentGraph) and options.estimator.startswith("eap"):
        return _compact(graph, data, ablation, metric, options, seed)
    if options.estimator == "exact":
        return exact(graph, list(batches(graph, data, ablation, options.batch_prompts, seed)), metric)
    if options.estimator == "gates_checked":
        return checked(graph, data, ablation, metric, options, seed)
    n_parts = -(-len(data) // options.batch_prompts)
    prompts = batches(graph, data, ablation, options.batch_prompts, seed)
    prompts = tqdm(prompts, desc=options.estimator, unit=" batches", total=n_parts, disable=None)
    return _mean((_gate_scores(graph, batch, metric, options) for batch in prompts), len(data))


def _compact(
    graph: ComponentGraph, data: TaskData, ablation: Ablation, metric: Metric, options: AttributionOptions, seed: int
) -> EdgeSet:
    path = {
        "eap": None,
        "eap_ig_inputs": inputs_on_the_way(options.ig_steps),
        "eap_ig_activations": activations_on_the_way(options.ig_steps),
    }[options.estimator]
    n_parts = -(-len(data) // options.batch_prompts)
    split = parts(data, ablation, seed, options.batch_prompts)
    split = tqdm(split, desc=options.estimator, unit=" batches", total=n_parts, disable=None)
    return _mean(
        (component_scores(graph, part.trimmed(), ablation, places, metric, path) for _, part, places in split),
        len(data),
    )


def _gate_scores(graph: EdgeGraph, batch: Batch, metric: Metric, options: AttributionOptions) -> EdgeSet:
    """Scores of one batch, summed over its prompts, from gradients at the gates."""
    if options.estimator == "eap":
        refuse_if_flat(metric, batch.data, batch.extremes)
        return gate_gradients(graph, batch, metric, 1.0)
    if options.estimator == "eap_ig_inputs":
        steps = options.ig_steps
        return _mean((gate_gradients(graph, batch, metric, 1.0, k / steps) for k in range(steps)), steps)
    return integrated(graph, batch, metric, options.gate_points)


def integrated(graph: EdgeGraph, batch: Batch, metric: Metric, n_points: int) -> EdgeSet:
    """The gradient at the gates integrated as all of them open together, summed over a batch's prompts.

    The scores sum to the metric's difference between the full model and none of its edges, to quadrature error.

    Source: the "mask gradient" of Miller et al. 2024, integrated.
    Differs: Gauss-Legendre points. Theirs are 0, 1/n ... 1 with equal weights, whose sum is off by (f(0) + f(1)) / 2n
    even for a straight line, and which look at the full model, where KL has no slope; Gauss-Legendre is exact for
    polynomials of degree 2n - 1, has points near both ends and none at them.
    """
    points, weights = np.polynomial.legendre.leggauss(n_points)
    total = like(graph, 0.0)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        gradients = gate_gradients(graph, batch, metric, float(point))
        total = {group: total[group] + float(weight) * g for group, g in gradients.items()}
    return total


def gate_gradients(graph: EdgeGraph, batch: Batch, metric: Metric, gate: float, inputs_at: float = 1.0) -> EdgeSet:
    """The gradient of the metric's sum over a batch with respect to each gate, where all gates have one value."""
    leaves = {group: g.requires_grad_() for group, g in like(graph, gate).items()}
    with torch.enable_grad():
        logits = gated_logits(graph, batch.data, leaves, batch.replacements, inputs_at)
        value = metric(logits, batch.data, batch.extremes).sum()
        gradients = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return {group: g * graph.edges[group] for group, g in zip(leaves, gradients, strict=True)}


def exact(graph: EdgeGraph, prompts: Sequence[Batch], metric: Metric, among: Tensor | None = None) -> EdgeSet:
    """How much the metric falls when one edge is cut: a run of all prompts for each edge.

    Args:
        graph: either graph.
        prompts: see `batches`.
        metric: what is measured.
        among: numbers of the edges to measure, as `flat` has them; None: all. The others score zero.
    """
    n = sum(int(there.sum()) for there in graph.edges.values())
    whole = mean_metric(graph, prompts, graph.edges, metric)
    scores = torch.zeros(n)
    for edge in tqdm((range(n) if among is None else among.tolist()), desc="patching", unit=" edges", disable=None):
        kept = torch.ones(n, dtype=torch.bool, device=graph.model.unembed.weight.device)
        kept[edge] = False
        scores[edge] = whole - mean_metric(graph, prompts, unflat(graph, kept), metric)
    return unflat(graph, scores.to(graph.model.unembed.weight.device))


def checked(
    graph: EdgeGraph, data: TaskData, ablation: Ablation, metric: Metric, options: AttributionOptions, seed: int
) -> EdgeSet:
    """Integrated gradients, then a fixed number of patching runs for the edges they put first.

    A gradient misses a change that happens within a narrow window of the gates, such as a sharp softmax makes, and
    sees ones that only happen when other edges are half cut. Patching has neither fault, but costs a run for each edge;
    so as many edges as `check_runs` pays for are patched, each on a part of the prompts where there are many edges.
    Integrated scores are scaled to the effects that patching found, on the whole, and left to the edges that were not
    patched. A patched edge keeps a hundredth of its own, which orders the edges that patching cannot tell apart: of two
    alternatives, cutting either changes nothing.

    Source: verification of the top candidates, Kramar et al. 2024.
    """
    estimate = flat(graph, rank(graph, data, ablation, metric, replace(options, estimator="gates"), seed))
    n_prompts = min(len(data), max(FEWEST_PROMPTS, options.check_runs * len(data) // len(estimate)))
    n_edges = options.check_runs * len(data) // n_prompts
    first = estimate.abs().argsort(descending=True, stable=True)[:n_edges]
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:n_prompts]
    some = list(batches(graph, data.take(rows.tolist()), ablation, options.batch_prompts, seed))
    measured = flat(graph, exact(graph, some, metric, first))[first].to(estimate)
    scale = measured.abs().sum() / estimate[first].abs().sum()
    scores = estimate * (scale if scale > 0 and scale.isfinite() else 1)
    scores[first] = (1 - PATH_SHARE) * measured + PATH_SHARE * scores[first]
    return unflat(graph, scores)


def grow(graph: ComponentGraph, scores: EdgeSet, n: int) -> EdgeSet:
    """The greedy choice of n edges: from the logits down, always the edge of greatest score into what is reached.

    Args:
        graph: the component graph.
        scores: greater is better; take the absolute value where sign shall not count.
        n: how many edges.

    Source: Hanna et al. 2024, section 3.
    """
    values = {group: score.tolist() for group, score in scores.items()}
    entering: dict[str, list[tuple[float, str, int, int]]] = {}  # by component: minus the score, and which edge it is
    for group in graph.edges:
        for i, target in enumerate(graph.names(group)[0]):
            edges = [(-value, group, i, j) for j, value in enumerate(values[group][i])]
            entering.setdefault(target.split("<")[0], []).extend(edges)
    chosen = {group: torch.zeros_like(there) for group, there in graph.edges.items()}
    queue = sorted(entering.pop("logits"))
    while queue and n:
        _, group, i, j = heapq.heappop(queue)
        chosen[group][i, j] = True
        n -= 1
        for edge in entering.pop(graph.sources[j], ()):
            heapq.heappush(queue, edge)
    return chosen


def _mean(parts: Iterable[EdgeSet], n: int) -> EdgeSet:
    total: EdgeSet = {}
    for part in parts:
        total = {group: x + total[group] if total else x for group, x in part.items()}
    return {group: x / n for group, x in total.items()}
