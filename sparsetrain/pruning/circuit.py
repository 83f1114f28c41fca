"""A circuit: nodes, edges, what replaces the rest, and measures; saved as JSON and safetensors."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparsetrain.checkpoint import whole_folder
from sparsetrain.model import Transformer
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.evaluate import Calibration
from sparsetrain.pruning.graph import NodeSet, kept_weights, wires

FORMAT = "sparsetrain-circuit-1"


class CircuitError(ValueError):
    """A circuit file that cannot be read or does not fit a model."""


@dataclass(frozen=True)
class Edge:
    """A nonzero weight from node `source` to node `target` (both "site:channel")."""

    source: str
    target: str
    matrix: str
    weight: float


@dataclass(frozen=True)
class Circuit:
    """Nodes and edges that carry a task, with the ablation they were found under.

    Attributes:
        task: the task's name.
        method: the file in sparsetrain/pruning that found it.
        nodes: for every node site, a boolean mask over its channels.
        edges: the nonzero weights between kept nodes.
        ablation: what replaces every other node.
        calibration: scale and shift of the answers' logits.
        effects: rise of the held-out task loss when one node is ablated too, by "site:channel".
        measures: numbers on held-out prompts; see sparsetrain/pruning/prune.py.
        settings: the PruneConfig it was found with, and the run it was found in.
    """

    task: str
    method: str
    nodes: NodeSet
    edges: list[Edge]
    ablation: Ablation
    calibration: Calibration
    effects: dict[str, float] = field(default_factory=dict)
    measures: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def node_names(self) -> list[str]:
        """Every node as "site:channel", in forward order."""
        return [f"{s}:{c}" for s, mask in self.nodes.items() for c in mask.nonzero().flatten().tolist()]


def edges_between(model: Transformer, nodes: NodeSet) -> list[Edge]:
    """The edges of a node set: every nonzero weight between two of its nodes, in forward order."""
    return [
        Edge(f"{wire.source}:{j}", f"{wire.target}:{i}", wire.matrix, wire.weight[i, j].item())
        for wire in wires(model)
        for i, j in kept_weights(wire, nodes).nonzero().tolist()
    ]


def save_circuit(folder: Path, circuit: Circuit) -> None:
    """Write a circuit into `folder`, whole or not at all.

    `circuit.json` lists nodes, edges, effects, measures and settings; `masks.safetensors` holds for each site
    `mask.<site>` and what replaces the rest, `replacement.<site>`.
    """
    written = {
        "format": FORMAT,
        "task": circuit.task,
        "method": circuit.method,
        "ablation": circuit.ablation.kind,
        "calibration": {"scale": circuit.calibration.scale, "shift": circuit.calibration.shift},
        "sites": list(circuit.nodes),
        "nodes": [{"name": n, "effect": circuit.effects.get(n)} for n in circuit.node_names()],
        "edges": [vars(edge) for edge in circuit.edges],
        "measures": circuit.measures,
        "settings": circuit.settings,
    }
    tensors = {f"mask.{s}": m.cpu().contiguous() for s, m in circuit.nodes.items()}
    tensors |= {f"replacement.{s}": v.cpu().contiguous() for s, v in circuit.ablation.values.items()}
    with whole_folder(folder) as unfinished:
        (unfinished / "circuit.json").write_text(json.dumps(written, indent=1) + "\n")
        (unfinished / "metrics.json").write_text(json.dumps(circuit.measures, indent=1) + "\n")
        save_file(tensors, unfinished / "masks.safetensors")


def load_circuit(folder: str | Path, device: str | torch.device = "cpu") -> Circuit:
    """Read what `save_circuit` wrote; needs neither the model nor the run.

    Raises:
        CircuitError: a file is missing, damaged or not a circuit.
    """
    folder = Path(folder)
    try:
        read = json.loads((folder / "circuit.json").read_text())
        with safe_open(folder / "masks.safetensors", framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise CircuitError(f"{folder} must hold circuit.json and masks.safetensors, got: {error}") from None
    if not isinstance(read, dict) or read.get("format") != FORMAT:
        raise CircuitError(f"{folder}/circuit.json must have the format {FORMAT}")
    try:
        return _circuit(read, tensors)
    except (KeyError, TypeError) as error:
        raise CircuitError(f"{folder} holds a damaged circuit: {type(error).__name__} {error}") from None


def _circuit(read: dict[str, Any], tensors: NodeSet) -> Circuit:
    sites = read["sites"]
    return Circuit(
        task=read["task"],
        method=read["method"],
        nodes={s: tensors[f"mask.{s}"] for s in sites},
        edges=[Edge(**edge) for edge in read["edges"]],
        ablation=Ablation(read["ablation"], {s: tensors[f"replacement.{s}"] for s in sites}),
        calibration=Calibration(**read["calibration"]),
        effects={n["name"]: n["effect"] for n in read["nodes"] if n["effect"] is not None},
        measures=read["measures"],
        settings=read["settings"],
    )
