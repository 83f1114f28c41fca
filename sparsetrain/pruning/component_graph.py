"""The component graph of a transformer: what each head and MLP reads of the residual stream, and who wrote it.

Sources are the embedding, the heads and the MLPs; targets are the query, key and value input of each head, the MLPs and
the logits. An edge runs from every source to every later target. Each target reads its own residual stream, the sum of
what all earlier sources wrote, each through its gate; the norm comes after that sum (Bhaskar et al. 2024, section 3).
Biases of attention's output belong to no head and are never ablated.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from sparsetrain.kernels.ops import act_abs_topk, attend
from sparsetrain.model import Attention, Mlp, Transformer, keep, n_kept, thirds
from sparsetrain.pruning.ablation import site_reader
from sparsetrain.pruning.edges import EdgeSet, edge_names
from sparsetrain.pruning.stream import Places, Stream


class ComponentGraph:
    """See EdgeGraph. Groups of targets are `blocks.{l}.q`, `.k`, `.v` (H targets each), `blocks.{l}.mlp` and `logits`.

    Args:
        model: any transformer. Where AbsTopK follows attention's output, a head's write is what it adds to the channels
            that are kept.
        split_embedding: let tokens and learned positions be sources of their own.

    Raises:
        ValueError: the embedding shall be split and the model has no learned positions to split off.
    """

    kind = "component"

    def __init__(self, model: Transformer, split_embedding: bool = False):
        options = model.options
        if split_embedding and options.positions != "learned":
            raise ValueError(
                f"split_embedding needs model.positions=learned, got {options.positions}; leave the embedding whole"
            )
        self.model = model
        self.split_embedding = split_embedding
        self.n_heads = options.d_model // options.d_head
        self.sources = ["tokens", "positions"] if split_embedding else ["input"]
        self.edges: EdgeSet = {}
        device = model.unembed.weight.device
        for l in range(options.n_layers):
            for name in "qkv":
                self.edges[f"blocks.{l}.{name}"] = torch.ones(self.n_heads, len(self.sources), dtype=torch.bool)
            self.sources += [f"a{l}.h{h}" for h in range(self.n_heads)]
            self.edges[f"blocks.{l}.mlp"] = torch.ones(1, len(self.sources), dtype=torch.bool)
            self.sources.append(f"m{l}")
        self.edges["logits"] = torch.ones(1, len(self.sources), dtype=torch.bool)
        self.edges = {group: there.to(device) for group, there in self.edges.items()}

    def names(self, group: str) -> tuple[list[str], list[str]]:
        """Targets are named `a0.h1<q>`, `m0`, `logits`; sources `input` (or `tokens`, `positions`), `a0.h1`, `m0`."""
        sources = self.sources[: self.edges[group].shape[1]]
        if group == "logits":
            return ["logits"], sources
        _, l, kind = group.split(".")
        return ([f"m{l}"] if kind == "mlp" else [f"a{l}.h{h}<{kind}>" for h in range(self.n_heads)]), sources

    def read(self, tokens: Tensor) -> dict[str, Tensor]:
        """What each source writes, (n, B, T, D): `embed`, and for each block `blocks.{l}.heads`, `blocks.{l}.mlp`."""
        return self.expand(self.read_sites(tokens))

    @property
    def source_names(self) -> list[str]:
        """The names of `read`, in the order of the sources."""
        return ["embed", *(f"blocks.{l}.{part}" for l in range(len(self.model.blocks)) for part in ("heads", "mlp"))]

    def read_sites(self, tokens: Tensor) -> dict[str, Tensor]:
        """What `expand` needs of a run on tokens (B, T), each (..., B, T, width); far less than what it gives."""
        seen = site_reader(self.model, self.write_sites)(tokens)
        return {**seen, "embed": self.embeddings(tokens)}

    def expand(self, sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `read` gives, of what `read_sites` gave."""
        return {name: self.writes(name, sites) for name in self.source_names}

    @property
    def write_sites(self) -> list[str]:
        """The sites that `writes` reads; what attention wrote only where AbsTopK has chosen of it."""
        at = ("z", "mlp_out", "attn_out") if self.model.options.abs_topk.attn_out < 1 else ("z", "mlp_out")
        return [f"blocks.{l}.{site}" for l in range(len(self.model.blocks)) for site in at]

    def writes(self, name: str, seen: Mapping[str, Tensor]) -> Tensor:
        """What the sources of one name of `read` write, (n, B, T, D), from what `read_sites` gave."""
        if name == "embed":
            return seen["embed"]
        at, part = name.rsplit(".", 1)
        if part == "mlp":
            return seen[f"{at}.mlp_out"][None]
        return head_writes(self.model.get_submodule(f"{at}.attn"), seen[f"{at}.z"], seen.get(f"{at}.attn_out"))

    def final_resid(
        self, tokens: Tensor, gates: EdgeSet, replacements: Mapping[str, Tensor], inputs_at: float = 1.0
    ) -> Tensor:
        """See EdgeGraph."""
        places = Places(tokens, self._shared(replacements))
        written, replaced = places.pick(self.embeddings(tokens)), places.pick(replacements["embed"])
        stream = Stream(places, len(self.sources), written)
        stream.write(replaced + inputs_at * (written - replaced), replacements["embed"])
        p = self.position_vectors(tokens.shape[1])
        for l, block in enumerate(self.model.blocks):
            streams = stream.read(*(gates[f"blocks.{l}.{name}"] for name in "qkv"))
            parts = [read_heads(block.attn, i, x, places.positions(p)) for i, x in enumerate(streams)]
            q, k, v = places.fill(parts, partial(_plain_heads, block.attn), stream.fixed, p)
            z = places.pick(attend(q, k, v, block.attn.sink, block.attn.d_head, block.attn.causal))
            out = keep(block.attn.out(z), block.attn.topk.attn_out) if block.attn.topk.attn_out < 1 else None
            stream.write(head_writes(block.attn, z, out), replacements[f"blocks.{l}.heads"])
            stream.add(attention_bias(block.attn, out))
            mlp = _run_mlp(block.mlp, stream.read(gates[f"blocks.{l}.mlp"])[0][0], places.positions(p))
            stream.write(mlp[None], replacements[f"blocks.{l}.mlp"])
        (resid,) = places.fill(stream.read(gates["logits"])[0], lambda x, _: [x], stream.fixed, p)
        return resid

    def _shared(self, replacements: Mapping[str, Tensor]) -> Tensor | None:
        """(B, T) where all sources are what replaces them, as far as that is known."""
        options = self.model.options
        if not options.causal or options.abs_topk.attn_out < 1:  # whose choice at a replacement is not known
            return None
        return replacements.get("shared")

    def connected(self, edges: EdgeSet) -> EdgeSet:
        """Drop the edges of heads and MLPs that nothing is read by, or that read nothing, until none is left."""
        edges = {group: kept.clone() for group, kept in edges.items()}
        while True:
            before = sum(int(kept.sum()) for kept in edges.values())
            alive = self._alive(edges)
            for group, kept in edges.items():
                targets, sources = self.names(group)
                kept &= torch.tensor([t.split("<")[0] in alive for t in targets], device=kept.device)[:, None]
                kept &= torch.tensor([s in alive for s in sources], device=kept.device)
            if sum(int(kept.sum()) for kept in edges.values()) == before:
                return edges

    def end_nodes(self, edges: EdgeSet) -> EdgeSet:
        """The components that edges begin or end at: for `embed`, each block's `heads` and `mlp`, and `logits`."""
        ends = {end.split("<")[0] for pair in edge_names(self, edges) for end in pair}
        names = {"embed": self.sources[: 1 + self.split_embedding]}
        for l in range(len(self.model.blocks)):
            names |= {f"blocks.{l}.heads": [f"a{l}.h{h}" for h in range(self.n_heads)], f"blocks.{l}.mlp": [f"m{l}"]}
        names["logits"] = ["logits"]
        return {group: torch.tensor([name in ends for name in members]) for group, members in names.items()}

    def _alive(self, edges: EdgeSet) -> set[str]:
        """The components that read something and are read."""
        fed, used = {*self.sources[: 1 + self.split_embedding]}, {"logits"}
        for group, kept in edges.items():
            targets, sources = self.names(group)
            fed |= {t.split("<")[0] for t, some in zip(targets, kept.any(1).tolist(), strict=True) if some}
            used |= {s for s, some in zip(sources, kept.any(0).tolist(), strict=True) if some}
        return fed & used

    def position_vectors(self, n_tokens: int) -> Tensor | None:
        """What stands beside the residual stream where positions are concatenated: (T, d_pos)."""
        return self.model.positions.weight[:n_tokens] if self.model.options.positions == "concat" else None

    def embeddings(self, tokens: Tensor) -> Tensor:
        """What the embedding writes: (1, B, T, D), or (2, B, T, D) of tokens and positions."""
        x = self.model.embed(tokens)
        if self.model.options.positions != "learned":
            return x[None]
        p = self.model.positions.weight[: tokens.shape[1]]
        return torch.stack([x, p.expand_as(x)]) if self.split_embedding else (x + p)[None]


def head_writes(attn: Attention, z: Tensor, out: Tensor | None) -> Tensor:
    """What each head adds to the residual stream: (H, B, T, D).

    Args:
        attn: the attention.
        z: (B, T, D) its heads' outputs.
        out: (B, T, D) what it wrote in all; channels that AbsTopK set to zero are no head's. None without AbsTopK.
    """
    weight = attn.out.weight.unflatten(1, (-1, attn.d_head))  # (D, H, K)
    writes = torch.einsum("bthk,dhk->hbtd", z.unflatten(-1, (-1, attn.d_head)), weight)
    return writes if out is None else torch.where(out != 0, writes, 0)


def attention_bias(attn: Attention, out: Tensor | None) -> Tensor:
    """The part of what attention wrote (B, T, D) that is no head's."""
    if attn.out.bias is None:
        return torch.zeros((), device=attn.out.weight.device)
    return attn.out.bias if out is None else torch.where(out != 0, attn.out.bias, 0)


def read_heads(attn: Attention, which: int, x: Tensor, p: Tensor | None) -> Tensor:
    """Queries, keys or values (B, T, D) of heads that each read a residual stream of their own, x (H, B, T, D)."""
    fraction = (attn.topk.q, attn.topk.k, attn.topk.v)[which]
    normed = attn.norm(x.flatten(0, 1), p, attn.topk.attn_in).unflatten(0, x.shape[:2])
    weight = attn.qkv.weight.chunk(3)[which].unflatten(0, (-1, attn.d_head))  # (H, K, C)
    out = torch.einsum("hbtc,hkc->bthk", normed, weight).flatten(2)
    if attn.qkv.bias is not None:
        out = out + attn.qkv.bias.chunk(3)[which]
    return keep(out, fraction)


def _plain_heads(attn: Attention, x: Tensor, p: Tensor | None) -> list[Tensor]:
    """Queries, keys and values (1, P, D) of heads that all read one residual stream, x (1, P, D)."""
    return thirds(attn.qkv(attn.norm(x, p, attn.topk.attn_in)), (attn.topk.q, attn.topk.k, attn.topk.v))


def _run_mlp(mlp: Mlp, x: Tensor, p: Tensor | None) -> Tensor:
    """What an MLP writes, (B, T, D), when it reads x."""
    n = mlp.up(mlp.norm(x, p, mlp.topk.mlp_in))
    neurons = act_abs_topk(n, n_kept(mlp.topk.mlp_act, n.shape[-1]), mlp.activation)
    return keep(mlp.out(neurons), mlp.topk.mlp_out)
