"""A circuit: nodes, edges, what replaces the rest, and measures; saved as JSON and safetensors."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsetrain.checkpoint import whole_folder
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.channel_edges import ChannelGraph
from sparsetrain.pruning.edges import EdgeGraph, EdgeSet
from sparsetrain.pruning.evaluate import Calibration
from sparsetrain.pruning.graph import NodeSet

FORMAT = "sparsetrain-circuit-2"


class CircuitError(ValueError):
    """A circuit file that cannot be read or does not fit a model."""


@dataclass(frozen=True)
class Edge:
    """From node `source` to node `target`.

    In the channel graph a nonzero weight of a matrix, between nodes named "site:channel". In the component graph a path
    along the residual stream, from "a0.h1" to "a1.h0<q>", say, without matrix or weight.
    """

    source: str
    target: str
    matrix: str = ""
    weight: float | None = None
    score: float | None = None

    @property
    def name(self) -> str:
        return f"{self.source}->{self.target}"


@dataclass(frozen=True)
class Circuit:
    """Nodes and edges that carry a task, with the ablation they were found under.

    Attributes:
        task: the task's name.
        method: the file in sparsetrain/pruning that found it.
        graph: `channel` or `component`.
        nodes: for every node site, a boolean mask over its channels; in the component graph for `embed`, the heads and
            the MLP of each block, and `logits`.
        edges: the edges between kept nodes.
        ablation: what replaces everything else.
        calibration: scale and shift of the answers' logits.
        ranking: for each group of units (nodes, or edges by their targets) what they were cut by; greater is kept
            longer. Not there for a circuit that was not cut from a ranking.
        effects: rise of the held-out task loss when one unit is ablated too, by "site:channel" or "source->target".
        measures: numbers on held-out prompts; see sparsetrain/pruning/measures.py.
        settings: the PruneConfig it was found with, and the run and the weights (a hash) it was found in.
    """

    task: str
    method: str
    graph: Literal["channel", "component"]
    nodes: NodeSet
    edges: list[Edge]
    ablation: Ablation
    calibration: Calibration
    ranking: dict[str, Tensor] = field(default_factory=dict)
    effects: dict[str, float] = field(default_factory=dict)
    measures: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def node_names(self) -> list[str]:
        """Every node as "site:channel", or "a0.h1" in the component graph, in forward order."""
        return [
            _node_name(self.graph, site, i, len(mask))
            for site, mask in self.nodes.items()
            for i in mask.nonzero().flatten().tolist()
        ]


def list_edges(graph: EdgeGraph, edges: EdgeSet, scores: EdgeSet | None = None) -> list[Edge]:
    """The edges of a set, in forward order, with their weights in the channel graph and their scores, if any."""
    found = []
    for group, kept in edges.items():
        targets, sources = graph.names(group)
        for i, j in kept.nonzero().tolist():
            score = None if scores is None else scores[group][i, j].item()
            if isinstance(graph, ChannelGraph):
                wire = graph.wires[group]
                found.append(Edge(sources[j], targets[i], wire.matrix, wire.weight[i, j].item(), score))
            else:
                found.append(Edge(sources[j], targets[i], score=score))
    return found


def overlaps(circuits: Mapping[str, Circuit]) -> dict[tuple[str, str], tuple[float, float]]:
    """The intersection over union of each two circuits' nodes, and of their edges; 1 where both are empty.

    Nodes and edges are the same where their names are: see `of_one_model` for when that means something.

    Raises:
        CircuitError: there are fewer than two circuits, or they are of different graphs or of models of other shapes.
    """
    if len(circuits) < 2 or len({circuit.graph for circuit in circuits.values()}) > 1:
        kinds = ", ".join(f"{name}: {circuit.graph}" for name, circuit in circuits.items())
        raise CircuitError(f"circuits must be two or more, of one graph, got {kinds}")
    shapes = {name: {site: len(mask) for site, mask in circuit.nodes.items()} for name, circuit in circuits.items()}
    first, *others = circuits
    if differ := [name for name in others if shapes[name] != shapes[first]]:
        raise CircuitError(
            f"circuits must be of models of one shape, got other numbers of layers, channels, heads or embeddings in "
            f"{', '.join(differ)} than in {first}; compare circuits of one model, or of seeds of one config"
        )
    nodes = {name: set(circuit.node_names()) for name, circuit in circuits.items()}
    edges = {name: {edge.name for edge in circuit.edges} for name, circuit in circuits.items()}
    return {(a, b): (_share(nodes[a], nodes[b]), _share(edges[a], edges[b])) for a, b in combinations(circuits, 2)}


def of_one_model(circuits: Iterable[Circuit]) -> bool:
    """Whether all circuits are known to be of the same weights, so that a node is the same node in each.

    Of models that were trained apart a channel or head has no counterpart in the other that has its name, so their
    overlap is one by chance; between checkpoints of one run it has.
    """
    found = {circuit.settings.get("model") for circuit in circuits}
    return len(found) == 1 and None not in found


def _share(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0


def save_circuit(folder: Path, circuit: Circuit) -> None:
    """Write a circuit into `folder`, whole or not at all.

    `circuit.json` lists nodes, edges, effects, measures and settings; `masks.safetensors` holds `mask.<site>` of the
    nodes, `replacement.<name>` of what is ablated, and `ranking.<group>`.
    """
    written = {
        "format": FORMAT,
        "task": circuit.task,
        "method": circuit.method,
        "graph": circuit.graph,
        "ablation": circuit.ablation.kind,
        "calibration": {"scale": circuit.calibration.scale, "shift": circuit.calibration.shift},
        "sites": list(circuit.nodes),
        "nodes": [{"name": n, "effect": circuit.effects.get(n)} for n in circuit.node_names()],
        "edges": [vars(edge) | {"effect": circuit.effects.get(edge.name)} for edge in circuit.edges],
        "replacements": list(circuit.ablation.values),
        "ranked": list(circuit.ranking),
        "measures": circuit.measures,
        "settings": circuit.settings,
    }
    tensors = {f"mask.{s}": m.cpu().contiguous() for s, m in circuit.nodes.items()}
    tensors |= {f"replacement.{s}": v.cpu().contiguous() for s, v in circuit.ablation.values.items()}
    tensors |= {f"ranking.{s}": v.cpu().clone() for s, v in circuit.ranking.items()}
    with whole_folder(folder) as unfinished:
        (unfinished / "circuit.json").write_text(json.dumps(written, indent=1) + "\n")
        (unfinished / "metrics.json").write_text(json.dumps(circuit.measures, indent=1) + "\n")
        save_file(tensors, unfinished / "masks.safetensors")


def load_circuit(folder: str | Path, device: str | torch.device = "cpu") -> Circuit:
    """Read what `save_circuit` wrote; needs neither the model nor the run.

    Raises:
        CircuitError: a file is missing, damaged or not a circuit.
    """
    read, tensors = read_result(Path(folder), "circuit.json", FORMAT, device)
    try:
        return _circuit(read, tensors)
    except (KeyError, TypeError) as error:
        raise CircuitError(f"{folder} holds a damaged circuit: {type(error).__name__} {error}") from None


def circuit_folder(run: str | Path, task: str, name: str) -> Path:
    """The folder of a run's circuit.

    Args:
        run: a run directory.
        task: the task's name.
        name: the folder's: the method, or what `name` was.

    Raises:
        CircuitError: there is none of this name; says which there are.
    """
    circuits = Path(run) / "circuits" / task
    there = sorted(folder.name for folder in circuits.glob("[!.]*") if (folder / "circuit.json").exists())
    if name not in there:
        found = ", ".join(there) or "none"
        raise CircuitError(f"--circuit must be one of those in {circuits}, which are {found}, got {name!r}")
    return circuits / name


def read_result(
    folder: Path, name: str, form: str, device: str | torch.device
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON of this name and format in a folder of results, and the tensors of its masks.safetensors.

    Raises:
        CircuitError: a file is missing or damaged, or of another format.
    """
    try:
        read = json.loads((folder / name).read_text())
        with safe_open(folder / "masks.safetensors", framework="pt", device=str(device)) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise CircuitError(f"{folder} must hold {name} and masks.safetensors, got: {error}") from None
    if not isinstance(read, dict) or read.get("format") != form:
        raise CircuitError(f"{folder}/{name} must have the format {form}; prune again")
    return read, tensors


def _circuit(read: dict[str, Any], tensors: NodeSet) -> Circuit:
    effects = {n["name"]: n["effect"] for n in read["nodes"]}
    edges = [Edge(**{key: value for key, value in edge.items() if key != "effect"}) for edge in read["edges"]]
    effects |= {e.name: edge["effect"] for e, edge in zip(edges, read["edges"], strict=True)}
    return Circuit(
        task=read["task"],
        method=read["method"],
        graph=read["graph"],
        nodes={s: tensors[f"mask.{s}"] for s in read["sites"]},
        edges=edges,
        ablation=Ablation(read["ablation"], {s: tensors[f"replacement.{s}"] for s in read["replacements"]}),
        calibration=Calibration(**read["calibration"]),
        ranking={s: tensors[f"ranking.{s}"] for s in read["ranked"]},
        effects={name: effect for name, effect in effects.items() if effect is not None},
        measures=read["measures"],
        settings=read["settings"],
    )


def _node_name(graph: str, site: str, i: int, n: int) -> str:
    if graph == "channel":
        return f"{site}:{i}"
    if site == "embed":
        return ("tokens", "positions")[i] if n == 2 else "input"
    if site == "logits":
        return "logits"
    _, l, kind = site.split(".")
    return f"m{l}" if kind == "mlp" else f"a{l}.h{i}"


def describe(circuit: Circuit) -> str:
    """A circuit's measures as a table."""
    m = circuit.measures
    cost = circuit.settings["cost"]
    time = "a search that was stopped and went on" if cost["seconds"] is None else f"{cost['seconds']:.0f} s"
    memory = "memory not known" if cost["peak_bytes"] is None else f"{cost['peak_bytes'] / 2**30:.1f} GiB at most"
    rows = [
        ("circuit", f"{m['n_nodes']} nodes, {m['n_edges']} edges"),
        ("found in", f"{time}, {memory}, model and Python with it"),
        (
            "its held-out task loss",
            f"{m['task_loss']:.3f} +- {m['task_loss_se']:.3f}   (target {m['target_loss']}, chance 0.693)",
        ),
        ("its accuracy", f"{m['task_accuracy']:.1%} of {m['n_prompts']} prompts"),
        (
            "full model's task loss",
            f"{m['full_model_loss']:.3f}   (calibrated alike {m['full_model_loss_calibrated']:.3f})",
        ),
        ("KL to the full model", f"{m['kl']:.3f} nats"),
        (
            "its logit difference",
            f"{m['logit_difference']:.3f}   (full model {m['full_model_logit_difference']:.3f}; faithfulness "
            f"{'not defined' if m['faithfulness'] is None else format(m['faithfulness'], '.2f')})",
        ),
        ("loss with the circuit ablated", f"{m['completeness_loss']:.3f}"),
        (
            f"loss with random {m['units']} ablated",
            f"{m['random_ablation_loss']:.3f} +- {m['random_ablation_loss_std']:.3f}   (as many in each place)",
        ),
    ]
    if control := m.get("nonsense"):
        loss = f"loss {control['task_loss']:.3f}" if control["reached"] else "target not reached"
        rows.append(("nonsense control", f"{control['n_nodes']} nodes, {control['n_edges']} edges, {loss}"))
    if found := m.get("alternatives"):
        more = "" if found["complete"] else " at least"
        told = f"{found['n']}{more}, with {found['n_needed']} edges in all of them"
        rows.append(("minimal circuits near it", told if found["n"] else "not known; raise alternative_runs"))
    if m.get("curve"):
        rows.append(("areas of its ranking (MIB)", f"CPR {m['curve']['cpr']:.3f}, CMD {m['curve']['cmd']:.3f}"))
    return "\n".join([f"circuit of {circuit.task}", *(f"  {name:32} {value}" for name, value in rows)])
