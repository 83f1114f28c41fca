"""What circuits are cut out of: the nodes of the channel graph, or the edges of either graph.

A set of units has for each group (a site, or a group of targets) a boolean tensor; a unit is an entry of one.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

from sparsetrain.model import Transformer
from sparsetrain.pruning import attribution, component_graph, edges, graph
from sparsetrain.pruning.ablation import Ablation, site_reader
from sparsetrain.pruning.edges import EdgeGraph, EdgeSet
from sparsetrain.pruning.graph import NodeSet
from sparsetrain.pruning.replay import Replay
from sparsetrain.tasks import TaskData

Units = dict[str, Tensor]
Unit = tuple[str, tuple[int, ...]]


class Space(Protocol):
    """All units, and what can be asked of some of them."""

    kind: Literal["channel", "component"]
    units: Literal["nodes", "edges"]
    model: Transformer
    everything: Units

    def read(self, tokens: Tensor) -> dict[str, Tensor]:
        """The activations that are replaced where a unit is ablated, of tokens (B, T); what ablations are built of."""
        ...

    def logits(self, data: TaskData, kept: Units, ablation: Ablation) -> Tensor:
        """Logits (N, V) after each prompt with all but `kept` ablated."""
        ...

    def top(self, ranking: dict[str, Tensor], n: int) -> Units:
        """The n units that a ranking puts first."""
        ...

    def connected(self, kept: Units) -> Units:
        """The units on a path from the embedding to the logits."""
        ...

    def together(self, unit: Unit) -> list[Unit]:
        """The units that are kept if and only if this one is, itself among them."""
        ...

    def nodes(self, kept: Units) -> NodeSet:
        """The nodes of the circuit that these units are, by site or component."""
        ...

    def edges(self, kept: Units) -> EdgeSet:
        """Its edges."""
        ...

    def name(self, unit: Unit) -> str:
        """`site:channel` of a node, `source->target` of an edge."""
        ...


class NodeSpace:
    """Nodes of the channel graph; see Space. Under `tie_qk` a query channel and its key channel go together."""

    kind = "channel"
    units = "nodes"

    def __init__(self, model: Transformer, tie_qk: bool):
        self.model, self.tie_qk = model, tie_qk
        self.replay: Replay | None = None  # of the prompts and the ablation that were last asked for
        self.everything = graph.full(model)
        self.read = site_reader(model, list(self.everything))

    def logits(self, data: TaskData, kept: Units, ablation: Ablation) -> Tensor:
        if self.replay is None or self.replay.data is not data or self.replay.ablation is not ablation:
            self.replay = Replay(self.model, data, ablation)
        return self.replay.logits(kept)

    def top(self, ranking: dict[str, Tensor], n: int) -> Units:
        """Ties of rank go to earlier sites; more than n where only one of a tied pair is among them."""
        flat = torch.cat(list(ranking.values()))
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen[flat.argsort(descending=True, stable=True)[:n]] = True
        nodes = dict(zip(ranking, chosen.split([len(t) for t in ranking.values()]), strict=True))
        if self.tie_qk:
            for site in nodes:
                if site.endswith(".q"):
                    nodes[site] = nodes[site] | nodes[site[:-1] + "k"]
                    nodes[site[:-1] + "k"] = nodes[site].clone()
        return nodes

    def connected(self, kept: Units) -> Units:
        return graph.without_dangling(self.model, kept)

    def together(self, unit: Unit) -> list[Unit]:
        site, channel = unit
        if self.tie_qk and site.rpartition(".")[2] in "qk":
            return [(site[:-1] + "q", channel), (site[:-1] + "k", channel)]
        return [unit]

    def nodes(self, kept: Units) -> NodeSet:
        return kept

    def edges(self, kept: Units) -> EdgeSet:
        return graph.kept_edges(self.model, kept)

    def name(self, unit: Unit) -> str:
        return f"{unit[0]}:{unit[1][0]}"


class EdgeSpace:
    """Edges of a graph; see Space. With `greedy` (component graph alone) they are taken from the logits down."""

    units = "edges"

    def __init__(self, of: EdgeGraph, greedy: bool = False):
        self.greedy = greedy
        self.of, self.kind, self.model = of, of.kind, of.model
        self.everything, self.read, self.connected = of.edges, of.read, of.connected

    def logits(self, data: TaskData, kept: Units, ablation: Ablation) -> Tensor:
        return edges.all_answer_logits(self.of, data, kept, ablation)

    def top(self, ranking: dict[str, Tensor], n: int) -> Units:
        return attribution.grow(self.of, ranking, n) if self.greedy else edges.top_edges(self.of, ranking, n)

    def together(self, unit: Unit) -> list[Unit]:
        return [unit]

    def nodes(self, kept: Units) -> NodeSet:
        if isinstance(self.of, component_graph.ComponentGraph):
            return self.of.end_nodes(kept)
        return graph.end_nodes(self.model, kept)

    def edges(self, kept: Units) -> EdgeSet:
        return kept

    def name(self, unit: Unit) -> str:
        targets, sources = self.of.names(unit[0])
        return f"{sources[unit[1][1]]}->{targets[unit[1][0]]}"


def n_units(kept: Units) -> int:
    """How many units a set holds."""
    return sum(int(mask.sum()) for mask in kept.values())


def units(kept: Units) -> list[Unit]:
    """Every unit of a set, in order."""
    return [(group, tuple(index)) for group, mask in kept.items() for index in mask.nonzero().tolist()]


def without(kept: Units, dropped: list[Unit]) -> Units:
    """A copy of a set that lacks some units."""
    fewer = {group: mask.clone() for group, mask in kept.items()}
    for group, index in dropped:
        fewer[group][index] = False
    return fewer


def complement(everything: Units, kept: Units) -> Units:
    """All units that are not in `kept`."""
    return {group: there & ~kept[group] for group, there in everything.items()}


def random_like(everything: Units, kept: Units, generator: torch.Generator) -> Units:
    """Random units, as many in each group as `kept` has there, none of them in it where there is room."""
    drawn = {}
    for group, there in everything.items():
        n = int(kept[group].sum())
        outside = (there & ~kept[group]).flatten().float() - 2 * (~there).flatten().float()
        order = torch.rand(len(outside), generator=generator).to(outside.device) + outside
        flat = torch.zeros(len(outside), dtype=torch.bool, device=outside.device)
        flat[order.argsort(descending=True)[:n]] = True
        drawn[group] = flat.view_as(there)
    return drawn
