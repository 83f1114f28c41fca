"""The edges of the channel graph, gated one by one: nonzero weights between two channels.

A weight that is cut carries the replacement of its source: y = (M W) x + ((1 - M) W) replacement + b. The embedding,
the residual stream, norms, the unembedding and the bigram table are not gated. A weight from v to attn_out multiplies
the heads' mix of values, so what is replaced there is z.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.kernels.ops import act_abs_topk, attend
from sparsetrain.linear import Linear
from sparsetrain.model import Transformer, keep, n_kept
from sparsetrain.pruning import graph
from sparsetrain.pruning.ablation import site_reader
from sparsetrain.pruning.edges import EdgeSet

SOURCES = ("attn_in", "z", "mlp_in", "mlp_act")


class ChannelGraph:
    """See EdgeGraph. Groups are the sites of the targets: q, k, v, attn_out, mlp_act, mlp_out of a block."""

    kind = "channel"

    def __init__(self, model: Transformer):
        self.model = model
        self.wires = {wire.target: wire for wire in graph.wires(model)}
        self.edges: EdgeSet = {target: wire.weight != 0 for target, wire in self.wires.items()}

    def names(self, group: str) -> tuple[list[str], list[str]]:
        """Nodes are named `site:channel`."""
        wire = self.wires[group]
        n_targets, n_sources = wire.weight.shape
        return [f"{group}:{i}" for i in range(n_targets)], [f"{wire.source}:{j}" for j in range(n_sources)]

    def read(self, tokens: Tensor) -> dict[str, Tensor]:
        """What the sources of edges are, by site, and `embed`: (B, T, width)."""
        sites = [f"blocks.{l}.{site}" for l in range(len(self.model.blocks)) for site in SOURCES]
        return site_reader(self.model, ["embed", *sites])(tokens)

    def read_sites(self, tokens: Tensor) -> dict[str, Tensor]:
        """The same."""
        return self.read(tokens)

    def expand(self, sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same."""
        return dict(sites)

    def final_resid(
        self, tokens: Tensor, gates: EdgeSet, replacements: Mapping[str, Tensor], inputs_at: float = 1.0
    ) -> Tensor:
        """See EdgeGraph."""
        x = self.model.embed(tokens)
        p = None
        if self.model.options.positions != "none":
            p = self.model.positions.weight[: tokens.shape[1]]
            if self.model.options.positions == "learned":
                x, p = x + p, None
        if inputs_at != 1:
            x = replacements["embed"] + inputs_at * (x - replacements["embed"])
        for l, block in enumerate(self.model.blocks):
            at = f"blocks.{l}."
            read = block.attn.norm(x, p, block.attn.topk.attn_in)
            shares = block.attn.topk.q, block.attn.topk.k, block.attn.topk.v
            gate = torch.cat([gates[at + name] for name in "qkv"])
            qkv = _gated(block.attn.qkv, read, gate, replacements[at + "attn_in"]).chunk(3, dim=-1)
            q, k, v = (keep(part, share) for part, share in zip(qkv, shares, strict=True))
            z = attend(q, k, v, block.attn.sink, block.attn.d_head, block.attn.causal)
            out = _gated(block.attn.out, z, gates[at + "attn_out"], replacements[at + "z"])
            x = x + keep(out, block.attn.topk.attn_out)
            read = block.mlp.norm(x, p, block.mlp.topk.mlp_in)
            n = _gated(block.mlp.up, read, gates[at + "mlp_act"], replacements[at + "mlp_in"])
            neurons = act_abs_topk(n, n_kept(block.mlp.topk.mlp_act, n.shape[-1]), block.mlp.activation)
            out = _gated(block.mlp.out, neurons, gates[at + "mlp_out"], replacements[at + "mlp_act"])
            x = x + keep(out, block.mlp.topk.mlp_out)
        return x

    def connected(self, edges: EdgeSet) -> EdgeSet:
        """Drop the edges that lie on no path from the embedding to the logits, until none is left."""
        return graph.connected_edges(self.model, edges)


def _gated(linear: Linear, x: Tensor, gate: Tensor, replacement: Tensor) -> Tensor:
    kept = linear.weight * gate
    return F.linear(x, kept, linear.bias) + F.linear(replacement, linear.weight - kept)
