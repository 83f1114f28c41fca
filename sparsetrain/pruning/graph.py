"""The channel graph of a transformer: nodes are channels of sites, edges are nonzero weights between them.

A node set is a dict from site to a boolean mask over its channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrain.config import ModelOptions
from sparsetrain.model import Transformer, site_widths

READS = ("attn_in", "mlp_in")
WRITES = ("attn_out", "mlp_out")
NODE_SITES = ("attn_in", "q", "k", "v", "attn_out", "mlp_in", "mlp_act", "mlp_out")

NodeSet = dict[str, Tensor]


@dataclass(frozen=True)
class Wire:
    """The weights between two sites: `weight[i, j]` carries channel j of `source` to channel i of `target`."""

    matrix: str
    source: str
    target: str
    weight: Tensor


def node_sites(options: ModelOptions) -> dict[str, int]:
    """The sites whose channels are nodes, in forward order, with their widths.

    Source: Gao et al. 2025, A.5; with `final_resid`, which their released circuits mask too.
    """
    widths = site_widths(options)
    return {s: n for s, n in widths.items() if s == "final_resid" or s.rpartition(".")[2] in NODE_SITES}


def wires(model: Transformer) -> list[Wire]:
    """Every weight matrix of the graph, in forward order. Attention carries v's channel to z's of the same index."""
    found = []
    for l, block in enumerate(model.blocks):
        at = f"blocks.{l}."
        for name, weight in zip("qkv", block.attn.qkv.weight.detach().chunk(3), strict=True):
            found.append(Wire(at + "attn.qkv.weight", at + "attn_in", at + name, weight))
        found += [
            Wire(at + "attn.out.weight", at + "v", at + "attn_out", block.attn.out.weight.detach()),
            Wire(at + "mlp.up.weight", at + "mlp_in", at + "mlp_act", block.mlp.up.weight.detach()),
            Wire(at + "mlp.out.weight", at + "mlp_act", at + "mlp_out", block.mlp.out.weight.detach()),
        ]
    return found


def full(model: Transformer) -> NodeSet:
    """The node set that holds every node."""
    device = model.unembed.weight.device
    return {s: torch.ones(n, dtype=torch.bool, device=device) for s, n in node_sites(model.options).items()}


def n_nodes(nodes: NodeSet) -> int:
    """How many nodes a set holds."""
    return sum(int(mask.sum()) for mask in nodes.values())


def kept_weights(wire: Wire, nodes: NodeSet) -> Tensor:
    """Where a wire has an edge of the circuit: a nonzero weight between two kept nodes; the weight's shape."""
    return (wire.weight != 0) & nodes[wire.target][:, None] & nodes[wire.source][None, :]


def kept_edges(model: Transformer, nodes: NodeSet) -> dict[str, Tensor]:
    """`kept_weights` of every wire, by its target site."""
    return {wire.target: kept_weights(wire, nodes) for wire in wires(model)}


def n_edges(model: Transformer, nodes: NodeSet) -> int:
    """How many edges lie between the nodes of a set (Gao et al. 2025, footnote 3)."""
    return sum(int(kept.sum()) for kept in kept_edges(model, nodes).values())


def without_dangling(model: Transformer, nodes: NodeSet) -> NodeSet:
    """Drop the nodes that lie on no path from the embedding to the logits, until none is left.

    Paths run along edges, along the residual stream (a write to channel c reaches later reads of c), and through
    attention (a query and key channel act together, and only through a value channel of their head). Dropping a node
    may still change the logits a little, since the norms read the whole residual stream and a node without inputs
    is a constant that need not be its mean; so the caller measures again.
    """
    nodes = {site: mask.clone() for site, mask in nodes.items()}
    while True:
        before = n_nodes(nodes)
        edges = kept_edges(model, nodes)
        fed, used = _fed(model, nodes, edges), _used(model, nodes, edges)
        for site in nodes:
            nodes[site] &= fed[site] & used[site]
        if n_nodes(nodes) == before:
            return nodes


def connected_edges(model: Transformer, edges: dict[str, Tensor]) -> dict[str, Tensor]:
    """The edges that lie on a path from the embedding to the logits within `edges` (by target site; see `wires`)."""
    edges = {target: kept.clone() for target, kept in edges.items()}
    nodes = full(model)
    while True:
        before = sum(int(kept.sum()) for kept in edges.values())
        fed, used = _fed(model, nodes, edges), _used(model, nodes, edges)
        for site in nodes:
            nodes[site] &= fed[site] & used[site]
        for wire in wires(model):
            edges[wire.target] &= kept_weights(wire, nodes)
        if sum(int(kept.sum()) for kept in edges.values()) == before:
            return edges


def end_nodes(model: Transformer, edges: dict[str, Tensor]) -> NodeSet:
    """The nodes that edges begin or end at, and of `final_resid` the channels that they write."""
    nodes = {site: torch.zeros_like(mask) for site, mask in full(model).items()}
    for wire in wires(model):
        nodes[wire.source] |= edges[wire.target].any(0)
        nodes[wire.target] |= edges[wire.target].any(1)
    for site, mask in nodes.items():
        if site.rpartition(".")[2] in WRITES:
            nodes["final_resid"] |= mask
    return nodes


def _fed(model: Transformer, nodes: NodeSet, edges: dict[str, Tensor]) -> NodeSet:
    """Which nodes have an input: an edge, or something written to the residual channel they read."""
    fed = {site: torch.zeros_like(mask) for site, mask in nodes.items()}
    for target, kept in edges.items():
        fed[target] |= kept.any(1)
    d = model.options.d_model
    written = (model.embed.weight.detach() != 0).any(0)
    if model.options.positions == "learned":
        written = written | (model.positions.weight.detach() != 0).any(0)
    for site in nodes:
        kind = site.rpartition(".")[2]
        if kind in READS or site == "final_resid":
            fed[site][:d], fed[site][d:] = written, True  # channels past d are positions
        elif kind in WRITES:
            written = written | nodes[site]
    for l in range(model.options.n_layers):
        q, k = f"blocks.{l}.q", f"blocks.{l}.k"
        fed[q] = fed[k] = fed[q] | fed[k]
    return fed


def _used(model: Transformer, nodes: NodeSet, edges: dict[str, Tensor]) -> NodeSet:
    """Which nodes have an output: an edge, a later read of the residual channel they write, or the logits."""
    used = {site: torch.zeros_like(mask) for site, mask in nodes.items()}
    for wire in wires(model):
        used[wire.source] |= edges[wire.target].any(0)
    d = model.options.d_model
    read = torch.zeros_like(nodes["final_resid"])
    for site in reversed(nodes):
        kind = site.rpartition(".")[2]
        if site == "final_resid":
            used[site] = (model.unembed.weight.detach() != 0).any(0)
            read = read | nodes[site]
        elif kind in WRITES:
            used[site] = read
        elif kind in READS:
            read = read | nodes[site][:d]
    for l in range(model.options.n_layers):
        heads = nodes[f"blocks.{l}.v"].view(-1, model.options.d_head).any(1)
        used[f"blocks.{l}.q"] = used[f"blocks.{l}.k"] = heads.repeat_interleave(model.options.d_head)
    return used
