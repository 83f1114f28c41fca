"""Models whose circuits are known: compiled programs, and the set of edges that no circuit can do without.

Which edges those are depends on what replaces an edge that is cut, so a circuit is known under an ablation.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsetrain.bench import made_circuits
from sparsetrain.bench.kernels import BenchError
from sparsetrain.checkpoint import fill, load_sparse, read_notes
from sparsetrain.config import ModelOptions, config_from_dict
from sparsetrain.model import Transformer
from sparsetrain.pruning.ablation import Ablation, AblationKind, build_ablation
from sparsetrain.pruning.channel_edges import ChannelGraph
from sparsetrain.pruning.component_graph import ComponentGraph
from sparsetrain.pruning.edges import Batch, EdgeGraph, EdgeSet, as_gates, batches, edge_names, gated_logits, n_edges
from sparsetrain.tasks import TaskData

PROGRAMS = Path(__file__).parent / "programs"
KINDS: tuple[AblationKind, ...] = ("zero", "corrupted")
TOLERANCE = 1e-3  # greatest change of an output that counts as none
MOST_PROMPTS = 256  # in one forward pass


@dataclass(frozen=True)
class KnownCircuit:
    """A circuit that a method is to find.

    Attributes:
        name: of the program.
        graph, data, ablation: what the method is given.
        edges: the circuit; where there are alternatives, all of them together.
        error: the greatest change of an output when these edges are all that is left. Above TOLERANCE there is no one
            circuit: each of these edges is needed, and some of several others.
        alternatives: sets of edges any of which is enough by itself, where there are several.
    """

    name: str
    graph: EdgeGraph
    data: TaskData
    ablation: Ablation
    edges: EdgeSet
    error: float
    alternatives: tuple[EdgeSet, ...] = ()


def known_circuits(
    programs: Iterable[Path], made: bool = True, device: torch.device | str = "cpu"
) -> Iterator[KnownCircuit]:
    """The circuits of some programs, under each ablation.

    Args:
        programs: files that `compile_programs` wrote.
        made: whether the gates and the sparse transformer that are made by hand are to be among them.
        device: where their models are.
    """
    for path in programs:
        model, data = load_program(path)
        graph, data = ComponentGraph(model.to(device), split_embedding=True), data.to(device)
        yield from (by_removal(graph, data, kind) for kind in KINDS)
    if made:
        yield from (_gate(name, device) for name in made_circuits.GATES)
        graph, data = ChannelGraph(made_circuits.quote_model().to(device)), made_circuits.quote_data().to(device)
        yield from (by_removal(graph, data, kind) for kind in KINDS)


def load_program(path: Path) -> tuple[Transformer, TaskData]:
    """Read a program that `compile_programs` wrote.

    Returns:
        The transformer and its sequences: BOS and P tokens, read at all P (so `last` is (N, P)), each with another one
        as its corrupted partner. Its outputs are the first of the logits; no logit is a right answer.

    Raises:
        CheckpointError: the file is missing or damaged.
        BenchError: it is no program.
    """
    notes, tensors = read_notes(path), load_sparse(path)
    if missing := {"program", "model", "vocabulary", "outputs"} - notes.keys():
        raise BenchError(f"{path} must be written by compile_programs, got a file without {', '.join(sorted(missing))}")
    weights = {name.removeprefix("model."): w for name, w in tensors.items() if name.startswith("model.")}
    options = config_from_dict(ModelOptions, json.loads(notes["model"]))
    model = Transformer(options, len(weights["embed.weight"])).requires_grad_(False)
    fill(model, weights, path)
    return model, _sequences(notes["program"], tensors["tokens"].long(), json.loads(notes["vocabulary"]))


def expected_outputs(path: Path) -> tuple[Tensor, Tensor]:
    """Rows (n,) of a program's sequences, and what Tracr's own transformer gives for them, (n, P, outputs)."""
    tensors = load_sparse(path)
    n, expected = len(tensors["tokens"]), tensors["expected"]
    return torch.arange(0, n, -(-n // len(expected)))[: len(expected)], expected


def by_removal(graph: EdgeGraph, data: TaskData, kind: AblationKind) -> KnownCircuit:
    """The circuit as it is defined: the edges whose removal, one at a time, changes an output."""
    ablation = build_ablation(graph.read, kind, [], data)
    prompts = list(batches(graph, data, ablation, MOST_PROMPTS))
    edges = necessary_edges(graph, prompts)
    return KnownCircuit(data.name, graph, data, ablation, edges, change(graph, prompts, edges))


def necessary_edges(graph: EdgeGraph, prompts: Sequence[Batch]) -> EdgeSet:
    """The edges that change an output when they alone are cut from the whole graph."""
    found = {group: torch.zeros_like(there) for group, there in graph.edges.items()}
    for group, there in graph.edges.items():
        for i, j in there.nonzero().tolist():
            fewer = {**graph.edges, group: there.clone()}
            fewer[group][i, j] = False
            found[group][i, j] = change(graph, prompts, fewer) > TOLERANCE
    return found


@torch.no_grad()
def change(graph: EdgeGraph, prompts: Sequence[Batch], edges: EdgeSet) -> float:
    """The greatest change of an output of the model when only these edges are left."""
    gates = as_gates(edges)
    outputs = (gated_logits(graph, b.data, gates, b.replacements) - b.extremes.full for b in prompts)
    return max(difference.abs().max().item() for difference in outputs)


def named_edges(graph: EdgeGraph, pairs: Sequence[tuple[str, str]]) -> EdgeSet:
    """The set of the edges with these (source, target), as `edge_names` gives them."""
    if unknown := set(pairs) - set(edge_names(graph, graph.edges)):
        raise ValueError(f"edges must be among those of the graph, got {sorted(unknown)}")
    found = {}
    for group, there in graph.edges.items():
        targets, sources = graph.names(group)
        found[group] = torch.tensor([[(s, t) in pairs for s in sources] for t in targets]).to(there.device) & there
    return found


def _sequences(name: str, tokens: Tensor, vocabulary: list[str]) -> TaskData:
    n, length = tokens.shape
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    corrupted = torch.empty_like(tokens)
    corrupted[order] = tokens[order.roll(1)]
    none = torch.zeros(n, dtype=torch.int64)
    prompts = tuple(" ".join(vocabulary[token] for token in row) for row in tokens.tolist())
    return TaskData(name, tokens, torch.arange(1, length).expand(n, -1), none, none, none, prompts, corrupted)


def _gate(name: str, device: torch.device | str) -> KnownCircuit:
    """A gate's circuit by construction: of OR, either branch is enough, and no edge of a branch is needed."""
    graph = ComponentGraph(made_circuits.gate(name).to(device), split_embedding=True)
    data = made_circuits.gate_data(name).to(device)
    ablation = build_ablation(graph.read, "corrupted", [], data)
    branches = [[("tokens", f"a0.h{h}<v>"), (f"a0.h{h}", "m0"), ("m0", "logits")] for h in range(2)]
    both = named_edges(graph, branches[0] + branches[1])
    assert n_edges(both) == 5
    alternatives = tuple(named_edges(graph, branch) for branch in branches) if name == "or" else ()
    error = change(graph, list(batches(graph, data, ablation)), both)
    return KnownCircuit(name, graph, data, ablation, both, error, alternatives)
