"""Edges as things to be cut one by one: what both graphs of a transformer give to the methods that rank edges.

An edge set has for each group of targets a tensor (n_targets, n_sources): boolean, or a float gate for each edge that
gradients flow to, or a score. Where `graph.edges` is false there is no edge, whatever a set holds there.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sparsetrain.model import Transformer
from sparsetrain.pruning.ablation import BATCH, Ablation
from sparsetrain.pruning.evaluate import in_batches, logits_at_answers, parts
from sparsetrain.pruning.objective import Extremes, Metric
from sparsetrain.tasks import TaskData

EdgeSet = dict[str, Tensor]


class EdgeGraph(Protocol):
    """A graph of a transformer whose edges can be gated.

    Attributes:
        kind: `channel` (channels of sites and nonzero weights) or `component` (heads, MLPs and the residual stream).
        model: the transformer; its weights get no gradient.
        edges: where there is an edge.
    """

    kind: Literal["channel", "component"]
    model: Transformer
    edges: EdgeSet

    def read(self, tokens: Tensor) -> dict[str, Tensor]:
        """The activations of every source in a run of the full model on tokens (B, T), for ablations."""
        ...

    def read_sites(self, tokens: Tensor) -> dict[str, Tensor]:
        """What is worth keeping of a run to have `read` of it later: tensors (..., B, T, width)."""
        ...

    def expand(self, sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `read` gives, of what `read_sites` gave, or of some of its prompts and first tokens."""
        ...

    def final_resid(
        self, tokens: Tensor, gates: EdgeSet, replacements: Mapping[str, Tensor], inputs_at: float = 1.0
    ) -> Tensor:
        """The final residual (B, T, D) when each edge carries gate x activation + (1 - gate) x replacement.

        Args:
            tokens: (B, T).
            gates: for each group (n_targets, n_sources) floats in [0, 1].
            replacements: for each source what replaces it, as an `Ablation` of what `read` gives has them; `shared`
                positions, if they are named, may be left as they are there.
            inputs_at: where the embedding is on the way from its replacement (0) to itself (1).
        """
        ...

    def names(self, group: str) -> tuple[list[str], list[str]]:
        """The names of a group's targets and sources."""
        ...

    def connected(self, edges: EdgeSet) -> EdgeSet:
        """The edges that lie on a path from the embedding to the logits within `edges`."""
        ...


@dataclass(frozen=True)
class Batch:
    """Prompts of similar length, ready to be run with other gates again and again."""

    data: TaskData  # trimmed
    replacements: Mapping[str, Tensor]
    extremes: Extremes


def like(graph: EdgeGraph, value: float) -> EdgeSet:
    """One gate for each edge, all of this value."""
    return {group: torch.full(there.shape, value, device=there.device) for group, there in graph.edges.items()}


def as_gates(edges: EdgeSet) -> EdgeSet:
    """Gates that are 1 at these edges and 0 at all others."""
    return {group: kept.float() for group, kept in edges.items()}


def n_edges(edges: EdgeSet) -> int:
    """How many edges a set holds."""
    return sum(int(kept.sum()) for kept in edges.values())


def flat(graph: EdgeGraph, values: EdgeSet) -> Tensor:
    """The values at the graph's edges, one after another: (n_edges,)."""
    return torch.cat([values[group][there] for group, there in graph.edges.items()])


def unflat(graph: EdgeGraph, values: Tensor) -> EdgeSet:
    """The opposite of `flat`: groups that hold `values` at the graph's edges and zero elsewhere; differentiable."""
    parts = values.split([int(there.sum()) for there in graph.edges.values()])
    return {
        group: torch.zeros(there.shape, dtype=values.dtype, device=values.device).masked_scatter(there, part)
        for (group, there), part in zip(graph.edges.items(), parts, strict=True)
    }


def top_edges(graph: EdgeGraph, scores: EdgeSet, n: int) -> EdgeSet:
    """The n edges of greatest score; ties go to the first."""
    values = flat(graph, scores)
    chosen = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    chosen[values.argsort(descending=True, stable=True)[:n]] = True
    return unflat(graph, chosen)


def fingerprint(model: Transformer, data: TaskData) -> str:
    """A hash of a model's weights and of the prompts, answers and partners that it is asked for."""
    answers = (data.last, data.correct, data.wrong, data.corrupted, data.correct_set, data.wrong_set)
    return _hash([*model.state_dict().values(), data.tokens, *answers])


def weights_hash(model: Transformer) -> str:
    """What tells the weights of a model from others."""
    return _hash(model.state_dict().values())[:16]


def _hash(tensors: Iterable[Tensor | None]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(b"" if tensor is None else tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def edge_names(graph: EdgeGraph, edges: EdgeSet) -> list[tuple[str, str]]:
    """(source, target) of every edge of a set, in forward order."""
    found = []
    for group, kept in edges.items():
        targets, sources = graph.names(group)
        found += [(sources[j], targets[i]) for i, j in kept.nonzero().tolist()]
    return found


def answer_logits(
    graph: EdgeGraph, data: TaskData, gates: EdgeSet, ablation: Ablation, places: Tensor, inputs_at: float = 1.0
) -> Tensor:
    """Logits (N, V) after each prompt (N, P, V where it is read at P positions) with gated edges; differentiable."""
    data = data.trimmed()
    return gated_logits(graph, data, gates, ablation.replacements(graph.read, data, places), inputs_at)


@torch.no_grad()
def all_answer_logits(graph: EdgeGraph, data: TaskData, edges: EdgeSet, ablation: Ablation, seed: int = 0) -> Tensor:
    """Logits after each prompt of the circuit that these edges are, a batch of similar lengths at a time."""
    gates = as_gates(edges)
    return in_batches(lambda part, places: answer_logits(graph, part, gates, ablation, places), data, ablation, seed)


def batches(graph: EdgeGraph, data: TaskData, ablation: Ablation, size: int = BATCH, seed: int = 0) -> Iterator[Batch]:
    """The prompts, `size` of similar lengths at a time, with what replaces their activations and their extremes."""
    for _, part, places in parts(data, ablation, seed, size):
        part = part.trimmed()
        with torch.no_grad():
            replacements = ablation.replacements(graph.read, part, places)
            ends = Extremes(
                *(gated_logits(graph, part, like(graph, gate), replacements) for gate in (1.0, 0.0)),
            )
        yield Batch(part, replacements, ends)


def gated_logits(
    graph: EdgeGraph, data: TaskData, gates: EdgeSet, replacements: Mapping[str, Tensor], inputs_at: float = 1.0
) -> Tensor:
    """`answer_logits` of trimmed prompts whose replacements are known."""
    return logits_at_answers(graph.model, graph.final_resid(data.tokens, gates, replacements, inputs_at), data)


@torch.no_grad()
def mean_metric(graph: EdgeGraph, prompts: Sequence[Batch], edges: EdgeSet, metric: Metric) -> float:
    """The metric of the circuit that these edges are, a mean over prompts."""
    gates = as_gates(edges)
    values = [metric(gated_logits(graph, b.data, gates, b.replacements), b.data, b.extremes) for b in prompts]
    return torch.cat(values).double().mean().item()
