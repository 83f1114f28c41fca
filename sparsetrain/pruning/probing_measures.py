"""What is said of neurons that circuit probing found: on held-out prompts, each measure beside its control."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsetrain.model import Transformer
from sparsetrain.prune_config import ProbingOptions
from sparsetrain.pruning.ablation import BATCH, Ablation
from sparsetrain.pruning.evaluate import Calibration, all_answer_logits
from sparsetrain.pruning.graph import NodeSet, n_nodes
from sparsetrain.pruning.probing import Found, Sublayer
from sparsetrain.pruning.probing_data import ProbeData
from sparsetrain.pruning.space import random_like

EXEMPLAR_DRAWS = 10  # one draw of exemplars is a noisy judge


def measure_probing(
    model: Transformer, found: Found, data: tuple[ProbeData, ProbeData], ablation: Ablation, options: ProbingOptions
) -> dict[str, Any]:
    """The measures of found neurons on held-out prompts.

    Args:
        model: the full model.
        found: what `probe` gave.
        data: training prompts, which exemplars are drawn from, and held-out ones.
        ablation, options: as `probe` had them.

    Returns:
        n_neurons, n_all: found, and in the sublayer; n_prompts held out.
        knn, knn_full, knn_random, knn_random_std: 1-nearest-neighbour accuracy (`exemplar_accuracy`) of the update of
            the found neurons alone, of the whole sublayer, and of random ones; chance is `knn_chance`.
        accuracy, accuracy_without: share of held-out prompts whose right answer is the model's first choice of all
            tokens: of the model as it is, and without the found neurons.
        accuracy_without_others, accuracy_without_random, and their _std: without as many random neurons of those not
            found (where there are fewer, with some of those found), and of all.
        preference...: the same five, for the share whose right answer is above the wrong one.
        answer: what this comes to, in a sentence, where no neuron or every neuron was found; else empty.
    """
    train, heldout = data
    sublayer = Sublayer(model, options.sublayer)
    generator = torch.Generator().manual_seed(options.seed)
    neurons = found.neurons
    everything = {site: torch.ones_like(mask) for site, mask in neurons.items()}
    others = [random_like(everything, neurons, generator) for _ in range(options.random_sets)]
    any_ = [_random_of_all(neurons, generator) for _ in range(options.random_sets)]
    judge = _judge(sublayer, data, ablation, options)
    knn_random = [judge(nodes) for nodes in any_]
    measures: dict[str, Any] = {
        "n_neurons": n_nodes(neurons),
        "n_all": n_nodes(everything),
        "n_prompts": len(heldout),
        "knn": judge(neurons),
        "knn_full": judge(everything),
        "knn_random": statistics.fmean(knn_random),
        "knn_random_std": statistics.pstdev(knn_random),
        "knn_chance": 1 / len(train.label.unique()),
    }
    sets = {"": [None], "_without": [neurons], "_without_others": others, "_without_random": any_}
    for name, group in sets.items():
        scores = [behaviour(model, heldout, nodes, ablation) for nodes in group]
        for kind, values in zip(("accuracy", "preference"), zip(*scores, strict=True), strict=True):
            measures[kind + name] = statistics.fmean(values)
            if len(group) > 1:
                measures[f"{kind}{name}_std"] = statistics.pstdev(values)
    return {**measures, "answer": _in_words(measures, train.variable, options)}


def exemplar_accuracy(exemplars: Tensor, classes: Tensor, updates: Tensor, label: Tensor) -> float:
    """Share of vectors (N, D) whose nearest exemplar (C, D) by cosine is of their own class; ties go to the first."""
    unit, to = (torch.nn.functional.normalize(x, dim=-1) for x in (updates, exemplars))
    return (classes[(unit @ to.T).argmax(1)] == label).float().mean().item()


def behaviour(model: Transformer, data: ProbeData, nodes: NodeSet | None, ablation: Ablation) -> tuple[float, float]:
    """How often a model without some neurons puts the right answer first, and how often above the wrong one."""
    kept = {} if nodes is None else {site: ~mask for site, mask in nodes.items()}
    logits = all_answer_logits(model, data.prompts, kept, ablation)
    first = (logits.argmax(-1) == data.prompts.correct).float().mean().item()
    return first, (Calibration()(logits, data.prompts) > 0).float().mean().item()


def _judge(
    sublayer: Sublayer, data: tuple[ProbeData, ProbeData], ablation: Ablation, options: ProbingOptions
) -> Callable[[NodeSet], float]:
    """The 1-nearest-neighbour accuracy of a set of neurons, all others masked; the same exemplars for every set."""
    inputs = [sublayer.inputs(part) for part in data]
    replacements = {site: ablation.values[site] for site in sublayer.widths}
    draws = _exemplars(data[0].label.cpu(), options.seed)

    @torch.no_grad()
    def accuracy(nodes: NodeSet) -> float:
        train, heldout = (
            torch.cat([sublayer.updates(x[rows], part.position[rows], nodes, replacements)
                       for rows in torch.arange(len(part), device=x.device).split(BATCH)])
            for x, part in zip(inputs, data, strict=True)
        )  # fmt: skip
        labels = data[0].label
        return statistics.fmean(exemplar_accuracy(train[rows], labels[rows], heldout, data[1].label) for rows in draws)

    return accuracy


def _exemplars(label: Tensor, seed: int) -> list[Tensor]:
    """Rows of one random prompt for each class, EXEMPLAR_DRAWS times."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(EXEMPLAR_DRAWS):
        order = torch.randperm(len(label), generator=generator)
        drawn.append(torch.stack([order[label[order] == c][0] for c in label.unique()]))
    return drawn


def _random_of_all(nodes: NodeSet, generator: torch.Generator) -> NodeSet:
    """As many random neurons at each site as `nodes` has, whether they are in it or not."""
    drawn = {}
    for site, mask in nodes.items():
        order = torch.randperm(len(mask), generator=generator)[: int(mask.sum())]
        drawn[site] = torch.zeros_like(mask)
        drawn[site][order.to(mask.device)] = True
    return drawn


def _in_words(measures: dict[str, Any], variable: str, options: ProbingOptions) -> str:
    where = f"of {options.sublayer} under {options.ablation} ablation"
    if not measures["n_neurons"]:
        return f"no neuron {where} brings prompts of the same {variable} together: it does not compute it by itself"
    if measures["n_neurons"] == measures["n_all"]:
        return f"every neuron {where} was kept: the search told none apart; raise count_penalty or epochs"
    return ""
