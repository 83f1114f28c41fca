"""The transformer, sparse or dense, with named sites.

Dimension letters, here and in the whole package: B sequences, T tokens, D d_model, H heads, K d_head, M neurons,
V vocabulary. A site is a named place in the forward pass: `embed`, `final_resid`, and in block l
`blocks.{l}.` + one of BLOCK_SITES. Sites are read and changed through the arguments of `run`.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsetrain.config import ModelOptions
from sparsetrain.kernels.ops import abs_topk, act_abs_topk, attend, channel_major, next_token_loss, norm_abs_topk
from sparsetrain.kernels.reference import is_channel_major
from sparsetrain.linear import Linear

Edit = Callable[[Tensor], Tensor]
Visit = Callable[[str, Tensor], Tensor]

BLOCK_SITES = (
    "resid_pre", "attn_in", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_in", "mlp_act", "mlp_out", "resid_post",
)  # fmt: skip


class Transformer(nn.Module):
    """A pre-norm decoder-only transformer with AbsTopK at eight places (Gao et al. 2025, A.1).

    Args:
        options: the `model` section of a run's config.
        vocab_size: V.
        generator: source of the initial weights; None takes torch's global one.
    """

    def __init__(self, options: ModelOptions, vocab_size: int, generator: torch.Generator | None = None):
        super().__init__()
        self.options = options
        self.vocab_size = vocab_size
        d = options.d_model
        self.embed = nn.Embedding(vocab_size, d)
        if options.positions != "none":
            self.positions = nn.Embedding(options.n_ctx, options.d_pos if options.positions == "concat" else d)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.n_layers))
        self.norm = make_norm(options, d)
        self.unembed = Linear(d, vocab_size, bias=False)
        if options.bigram:
            self.bigram = nn.Parameter(torch.zeros(vocab_size, vocab_size))
        self.checkpoint_activations = False
        self._initialise(generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of the tokens (B, T) that follow `tokens` (B, T)."""
        return self.logits(self.final_resid(tokens), tokens)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in nats, of the tokens (B, T) that follow `tokens` (B, T); what training lowers."""
        logits = self.unembed(norm_and_keep(self.norm, self.final_resid(tokens), 1))
        return next_token_loss(logits, self.bigram if self.options.bigram else None, tokens, targets)

    def run(
        self, tokens: Tensor, read: Collection[str] = (), edits: Mapping[str, Edit] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the model while reading and changing activations at named sites.

        Args:
            tokens: (B, T).
            read: sites whose activations are returned, as they are after any edit.
            edits: for a site, a function from its activation to what replaces it (same shape).

        Returns:
            Logits (B, T, V) and the activations read, by site; with gradients, unless run under `torch.no_grad()`.

        Raises:
            ValueError: a name is not a site of this model.
            IndexError: a token is not in its vocabulary.
        """
        seen: dict[str, Tensor] = {}
        resid = self.final_resid(tokens, self.visitor(seen, read, edits))
        return self.logits(resid, tokens), seen

    def visitor(
        self, seen: dict[str, Tensor], read: Collection[str] = (), edits: Mapping[str, Edit] | None = None
    ) -> Visit:
        """The function that `final_resid` calls at each site: applies the edits, stores what is read in `seen`."""
        edits = edits or {}
        widths = site_widths(self.options)
        if unknown := sorted({*read, *edits} - widths.keys()):
            raise ValueError(f"sites must be among {', '.join(widths)}; got {', '.join(unknown)}")

        def visit(site: str, value: Tensor) -> Tensor:
            if site in edits:
                value = edits[site](value)
            if site in read:
                seen[site] = value
            return value

        return visit

    def final_resid(self, tokens: Tensor, visit: Visit | None = None, at: Tensor | None = None) -> Tensor:
        """The residual stream (B, T, D) before the last norm.

        Args:
            tokens: (B, T).
            visit: called at each site with its activation, for which it gives another.
            at: (B, P) positions: the last block computes what comes after its keys and values at these alone, and so
                are its later sites and what is returned, (B, P, D). None: all positions.
        """
        visit = visit or _pass
        x, p = self.embedded(tokens)
        x = visit("embed", x)
        for l, block in enumerate(self.blocks):
            prefix = "" if visit is _pass else f"blocks.{l}."  # one for all, lest each block be compiled for its own
            positions = at if l == self.options.n_layers - 1 else None
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, p, prefix, visit, positions, use_reentrant=False)
            else:
                x = block(x, p, prefix, visit, positions)
        return visit("final_resid", x)

    def embedded(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """The residual stream (B, T, D) before the first block, and the positions (T, d_pos) read beside it."""
        x = self.embed(tokens)
        p = None
        if self.options.positions != "none":
            p = self.positions.weight[: tokens.shape[1]]
            if self.options.positions == "learned":
                x, p = x + p, None
        if any(m.active is not None for m in self.modules() if isinstance(m, Linear)):
            x = channel_major(x)
        return x, p

    def logits(self, resid: Tensor, tokens: Tensor) -> Tensor:
        """Logits (..., V) from the final residual (..., D) and the current tokens (...)."""
        out = self.unembed(self.norm(resid))
        if self.options.bigram:
            out = out + F.embedding(tokens, self.bigram)
        return out

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None) -> None:
        """N(0, 0.02), and N(0, 0.02 / sqrt(2 n_layers)) for what writes to the residual; biases 0 (GPT-2's rule)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0, 0.02, generator=generator)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
        for block in self.blocks:
            for out in (block.attn.out, block.mlp.out):
                out.weight.normal_(0, 0.02 / math.sqrt(2 * self.options.n_layers), generator=generator)


class Block(nn.Module):
    """Attention, then MLP, each reading through a norm and adding to the residual stream."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.attn = Attention(options)
        self.mlp = Mlp(options)

    def forward(self, x: Tensor, p: Tensor | None, prefix: str, visit: Visit, at: Tensor | None = None) -> Tensor:
        return self.think(*self.look(x, p, prefix, visit, at), prefix, visit)

    def look(
        self, x: Tensor, p: Tensor | None, prefix: str, visit: Visit, at: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The half that attends: the residual stream after it and the positions beside it, of `at` alone if given."""
        x = visit(prefix + "resid_pre", x)
        written = self.attn(x, p, prefix, visit, at)
        if at is not None:
            x, p = taken(x, at), None if p is None else p[at]
        return visit(prefix + "resid_mid", x + written), p

    def think(self, x: Tensor, p: Tensor | None, prefix: str, visit: Visit) -> Tensor:
        """The half of the MLP."""
        return visit(prefix + "resid_post", x + self.mlp(x, p, prefix, visit))


class Attention(nn.Module):
    """Causal attention; AbsTopK on what it reads, on q, k, v over all heads together, and on what it writes."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        d = options.d_model
        self.d_head = options.d_head
        self.causal = options.causal
        self.topk = options.abs_topk
        self.norm = Norm(options)
        self.qkv = Linear(self.norm.width, 3 * d, bias=options.bias)
        self.out = Linear(d, d, bias=options.bias)
        self.sink = nn.Parameter(torch.zeros(d // options.d_head)) if options.sink else None

    def forward(self, x: Tensor, p: Tensor | None, prefix: str, visit: Visit, at: Tensor | None = None) -> Tensor:
        read = visit(prefix + "attn_in", self.norm(x, p, self.topk.attn_in))
        shares = self.topk.q, self.topk.k, self.topk.v
        q, k, v = (visit(prefix + name, part) for name, part in zip("qkv", thirds(self.qkv(read), shares), strict=True))
        if at is None:
            z = attend(q, k, v, self.sink, self.d_head, self.causal)
        else:
            z = attend_at(taken(q, at), k, v, self.sink, self.d_head, at if self.causal else None)
        z = visit(prefix + "z", z)
        return visit(prefix + "attn_out", keep(self.out(z), self.topk.attn_out))


class Mlp(nn.Module):
    """Two linear maps; AbsTopK on what it reads, on its neurons, and on what it writes."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.topk = options.abs_topk
        self.norm = Norm(options)
        self.activation = options.activation
        n_neurons = options.mlp_ratio * options.d_model
        self.up = Linear(self.norm.width, n_neurons, bias=options.bias)
        self.out = Linear(n_neurons, options.d_model, bias=options.bias)

    def forward(self, x: Tensor, p: Tensor | None, prefix: str, visit: Visit) -> Tensor:
        read = visit(prefix + "mlp_in", self.norm(x, p, self.topk.mlp_in))
        n = self.up(read)
        neurons = visit(prefix + "mlp_act", act_abs_topk(n, n_kept(self.topk.mlp_act, n.shape[-1]), self.activation))
        return visit(prefix + "mlp_out", keep(self.out(neurons), self.topk.mlp_out))


class Norm(nn.Module):
    """The norm of the residual stream, with the normed position vector beside it where positions are concatenated, and
    AbsTopK of both together."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.resid = make_norm(options, options.d_model)
        self.pos = make_norm(options, options.d_pos) if options.positions == "concat" else None
        self.width = options.d_model + (options.d_pos if self.pos else 0)

    def forward(self, x: Tensor, p: Tensor | None, fraction: float) -> Tensor:
        if self.pos is None:
            return norm_and_keep(self.resid, x, fraction)
        x = norm_and_keep(self.resid, x, 1)
        p = self.pos(p).expand(x.shape[0], -1, -1)
        x = torch.cat([x.mT, p.mT], dim=-2).mT if is_channel_major(x) else torch.cat([x, p], dim=-1)
        return keep(x, fraction)


def taken(x: Tensor, at: Tensor) -> Tensor:
    """(B, P, D): of x (B, T, D) the positions `at` (B, P)."""
    return x[torch.arange(len(x), device=x.device)[:, None], at]


def attend_at(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, d_head: int, at: Tensor | None) -> Tensor:
    """`attend` of a few queries (B, P, D) to keys and values (B, T, D): (B, P, D).

    Args:
        q, k, v, sink, d_head: as `attend` takes them.
        at: (B, P) the queries' positions, after which no key is seen; None: all keys are.
    """
    q, k, v = (x.unflatten(-1, (-1, d_head)).transpose(1, 2) for x in (q, k, v))  # (B, H, P or T, K)
    scores = q @ k.mT / math.sqrt(d_head)
    if at is not None:
        later = torch.arange(k.shape[2], device=k.device) > at[:, None, :, None]
        scores = scores.masked_fill(later, -math.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2).flatten(2)


def make_norm(options: ModelOptions, width: int) -> nn.Module:
    """The norm that `model.norm` names, over `width` channels."""
    if options.norm == "none":
        return nn.Identity()
    return {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[options.norm](width, eps=options.norm_eps)


def norm_and_keep(norm: nn.Module, x: Tensor, fraction: float) -> Tensor:
    """A norm, then AbsTopK that keeps a fraction of the channels; at once where they are fused."""
    if isinstance(norm, nn.RMSNorm):
        return norm_abs_topk(x, norm.weight, norm.eps, n_kept(fraction, x.shape[-1]))
    return keep(norm(x), fraction)


def keep(x: Tensor, fraction: float) -> Tensor:
    """AbsTopK that keeps a fraction of the entries along the last dimension; 1 is x itself, gradients at zeros too."""
    return x if fraction == 1 else abs_topk(x, n_kept(fraction, x.shape[-1]))


def n_kept(fraction: float, width: int) -> int:
    """How many entries a share of them is, rounded down."""
    return int(fraction * width)


def thirds(x: Tensor, shares: tuple[float, float, float]) -> list[Tensor]:
    """The thirds of x (B, T, 3D), each with its share of entries kept, in the layout of x: three (B, T, D)."""
    parts = x.unflatten(-1, (3, -1)).movedim(-2, 1)  # (B, 3, T, D)
    at_once = len(set(shares)) == 1
    parts = keep(parts, shares[0]) if at_once else parts
    as_blocks = is_channel_major(parts)
    split = [t.mT for t in parts.mT.unbind(1)] if as_blocks else list(parts.unbind(1))
    if at_once:
        return split
    return [keep(t.mT.contiguous().mT if as_blocks else t, share) for t, share in zip(split, shares, strict=True)]


def site_widths(options: ModelOptions) -> dict[str, int]:
    """Every site of a model in forward order, with the width of its last dimension."""
    d = options.d_model
    read = d + (options.d_pos if options.positions == "concat" else 0)
    widths = {"embed": d}
    for l in range(options.n_layers):
        for site in BLOCK_SITES:
            wide = {"attn_in": read, "mlp_in": read, "mlp_act": options.mlp_ratio * d}
            widths[f"blocks.{l}.{site}"] = wide.get(site, d)
    return {**widths, "final_resid": d}


def _pass(site: str, value: Any) -> Any:
    return value
