"""Encoders and decoders between the residual streams of a sparse and a dense model, and the losses that train them.

Source: Gao et al. 2025, 2.3 and A.3. Differs where they say nothing: residuals are standardised by
constants before and after the linear maps (of which they are a part once trained); errors are divided by the variance
of what is to be met; and each sequence of a batch takes one hybrid pass, so that a step costs the same number of
passes at any depth (its expectation is their sum over all sites).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetrain.bridge_config import BridgeOptions
from sparsetrain.bridging.residuals import Residuals
from sparsetrain.config import ConfigError
from sparsetrain.model import keep

Losses = dict[str, Tensor]

FOLLOW = 0.01  # how far a step moves the sparse model's scales towards those of its batch


@dataclass(frozen=True)
class Pair:
    """A site of the sparse model and the site of the dense one that it is bridged to."""

    sparse: str
    dense: str


class Bridge(nn.Module):
    """An encoder (dense to sparse: linear, then AbsTopK) and a decoder (sparse to dense: linear) for each pair.

    Args:
        pairs: the sites, in forward order.
        n_sparse, n_dense: widths S and D of the two residual streams.
        topk: share of the S channels that an encoder keeps.
    """

    def __init__(self, pairs: Sequence[Pair], n_sparse: int, n_dense: int, topk: float):
        super().__init__()
        self.pairs, self.topk = tuple(pairs), topk
        n = len(self.pairs)
        self.encoders = nn.ModuleList(nn.Linear(n_dense, n_sparse) for _ in range(n))
        self.decoders = nn.ModuleList(nn.Linear(n_sparse, n_dense) for _ in range(n))
        self.register_buffer("mean", torch.zeros(n, n_dense))
        self.register_buffer("scale", torch.ones(n))
        self.register_buffer("sparse_scale", torch.ones(n))

    @torch.no_grad()
    def follow_(self, h_sparse: Mapping[str, Tensor]) -> None:
        """Move the sparse model's scales, which change while it is trained, towards those of residuals (B, T, S)."""
        for i, pair in enumerate(self.pairs):
            rms = h_sparse[pair.sparse].square().mean().sqrt().clamp_min(1e-6)
            self.sparse_scale[i].lerp_(rms, FOLLOW)

    def encode(self, i: int, h: Tensor) -> Tensor:
        """The sparse model's residual (..., S) at pair i, of the dense model's (..., D)."""
        return keep(self.encoders[i]((h - self.mean[i]) / self.scale[i]) * self.sparse_scale[i], self.topk)

    def decode(self, i: int, h: Tensor) -> Tensor:
        """The dense model's residual (..., D) at pair i, of the sparse model's (..., S)."""
        return self.decoders[i](h / self.sparse_scale[i]) * self.scale[i] + self.mean[i]

    def direction(self, i: int, channel: int) -> Tensor:
        """(D,): what one unit of a channel of the sparse residual is in the dense one."""
        return self.decoders[i].weight[:, channel] * (self.scale[i] / self.sparse_scale[i])


def pair_sites(options: BridgeOptions, sparse: Residuals, dense: Residuals) -> list[Pair]:
    """The pairs that the options name, or sites of the same name for models of equal depth.

    Raises:
        ConfigError: a site is unknown or named twice, the pairs are out of order, or no pairs are given and the depths
            differ.
    """
    if not options.sites:
        return _same_names(sparse, dense)
    pairs = [Pair(*(part.strip() for part in item.split("=", 1))) for item in options.sites if "=" in item]
    problems = [f"{item!r} must be SPARSE=DENSE" for item in options.sites if "=" not in item]
    for side, model in (("sparse", sparse), ("dense", dense)):
        named = [getattr(pair, side) for pair in pairs]
        unknown = sorted(set(named) - set(model.sites))
        if unknown:
            problems.append(f"{side} sites must be among {', '.join(model.sites)}, got {', '.join(unknown)}")
        elif [model.sites.index(site) for site in named] != sorted({model.sites.index(site) for site in named}):
            problems.append(f"{side} sites must be named once each and in forward order, got {', '.join(named)}")
    if problems:
        raise ConfigError("bridge.sites cannot be followed:\n  " + "\n  ".join(problems))
    return pairs


def _same_names(sparse: Residuals, dense: Residuals) -> list[Pair]:
    depths = [sum(site.endswith("resid_pre") for site in model.sites) for model in (sparse, dense)]
    if depths[0] != depths[1]:
        raise ConfigError(
            f"bridge.sites must map sites where depths differ, got none for a sparse model of {depths[0]} blocks and a "
            f"dense one of {depths[1]}; name pairs such as blocks.0.resid_pre=blocks.0.resid_pre, the last of them "
            "final_resid=final_resid"
        )
    return [Pair(site, site) for site in sparse.sites if site in dense.sites]


def normalised_error(found: Tensor, target: Tensor) -> Tensor:
    """Mean squared error (0-d) over the variance of the target (..., C): 1 minus the variance explained.

    Both are sums over channels, of errors and of deviations from each channel's mean over all tokens. The gradient
    flows to both, so that the sparse model's residual can come to meet the bridge.
    """
    spread = (target - target.flatten(0, -2).mean(0)).square().sum()
    return (found - target).square().sum() / spread.clamp_min(1e-12)


def kl(wanted: Tensor, logits: Tensor) -> Tensor:
    """KL (B, T), in nats, of what `logits` (B, T, V or more) predict from log-probabilities `wanted` (B, T, V).

    Logits beyond V, which a model may have for rows that stand for no token, are left out.
    """
    found = _log_softmax(logits[..., : wanted.shape[-1]])
    return F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)


def log_probabilities(logits: Tensor, *models: Residuals) -> Tensor:
    """Log-probabilities (B, T, V) over the V logits that all these models have."""
    return _log_softmax(logits[..., : min(model.vocab_size for model in models)])


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32 at least: in bfloat16 probabilities would not add up to one."""
    return F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def spread_rows(n_rows: int, n_sites: int, shift: int, device: torch.device) -> list[Tensor]:
    """The rows that enter at each site: as evenly as can be, and others with each shift."""
    firsts = [(i - shift) % n_sites for i in range(n_sites)]
    return [torch.arange(min(first, n_rows), n_rows, n_sites, device=device) for first in firsts]


def hybrid_kl(
    model: Residuals, tokens: Tensor, entering: Mapping[str, tuple[Tensor, Tensor]], wanted: Tensor
) -> Tensor:
    """Sum over sites (0-d) of the mean KL of passes that enter a model at a site, estimated with one site a row.

    Args:
        entering: for a site, rows of the batch and their residual there.
        wanted: (B, T, V): the dense model's log-probabilities.
    """
    return len(entering) * kl(wanted, model.enter(tokens, entering)).mean()


def bridge_losses(
    bridge: Bridge,
    sparse: Residuals,
    dense: Residuals,
    tokens: Tensor,
    h_sparse: Mapping[str, Tensor],
    shift: int,
) -> Losses:
    """The four losses of the bridge on a batch, each summed over sites.

    Args:
        bridge, sparse, dense: what is trained, and the models.
        tokens: (B, T).
        h_sparse: residuals (B, T, S) of the sparse model on them, through which gradients reach it.
        shift: which row takes which hybrid pass; the step's number.

    Returns:
        `nmse_to_sparse`, `nmse_to_dense`, `kl_to_sparse` and `kl_to_dense`, 0-d.
    """
    with torch.no_grad():
        h_dense, logits = dense.run(tokens)
        wanted = log_probabilities(logits, sparse, dense)
    rows = spread_rows(len(tokens), len(bridge.pairs), shift, tokens.device)
    nmse = {"to_sparse": [], "to_dense": []}
    to_sparse, to_dense = {}, {}
    for i, pair in enumerate(bridge.pairs):
        s, d = h_sparse[pair.sparse], h_dense[pair.dense]
        encoded, decoded = bridge.encode(i, d), bridge.decode(i, s)
        nmse["to_sparse"].append(normalised_error(encoded, s))
        nmse["to_dense"].append(normalised_error(decoded, d))
        to_sparse[pair.sparse] = rows[i], encoded[rows[i]]
        to_dense[pair.dense] = rows[i], decoded[rows[i]]
    return {
        **{f"nmse_{way}": torch.stack(parts).sum() for way, parts in nmse.items()},
        "kl_to_sparse": hybrid_kl(sparse, tokens, to_sparse, wanted),
        "kl_to_dense": hybrid_kl(dense, tokens, to_dense, wanted),
    }


def weigh(losses: Losses, options: BridgeOptions) -> Tensor:
    """Their weighted sum, 0-d; `losses` by the names of their weights."""
    return torch.stack([getattr(options, name) * value for name, value in losses.items()]).sum()
