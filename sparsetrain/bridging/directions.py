"""The nodes of a sparse circuit that read the residual stream, as directions at the reads of a dense model.

Source: Gao et al. 2025, A.4. Differs: they multiply a channel's row of the bridge by the ratio of the two models'
residual norms; here the gains of both norms, and a norm's subtraction of the mean, are in it too, so that the direction
is exact to first order where those are not one. "To first order": the scale that a norm divides by stays as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrain.bridging.bridge import Bridge
from sparsetrain.bridging.residuals import BridgeError, Residuals
from sparsetrain.pruning.graph import NodeSet

TOLERANCE = 1e-3  # of what a norm gives, for the description of it


@dataclass(frozen=True)
class ReadNorm:
    """The norm before a read at a fixed scale: x, less its mean where it is centred, times gain / scale, and a shift.

    Attributes:
        gain: (D,).
        centred: the mean over channels is subtracted, as in LayerNorm.
        scale: what it divides by, a mean over reference tokens: RMS or standard deviation; 1 where there is no norm.
    """

    gain: Tensor
    centred: bool
    scale: float

    def pull(self, channel: int) -> float:
        """The change of a channel of the residual that changes its read by one."""
        return self.scale / self.gain[channel].item()

    def push(self, change: Tensor) -> Tensor:
        """The change of the read that a change (..., D) of the residual makes."""
        change = change - change.mean(-1, keepdim=True) if self.centred else change
        return change * self.gain / self.scale


@dataclass(frozen=True)
class Direction:
    """What one unit of a node of the sparse model is at a read of the dense one.

    Attributes:
        node: its name in the circuit, "site:channel".
        read: the sparse model's read it is a channel of.
        channel: which.
        site, dense_site: the pair of sites of the bridge.
        dense_read: the read of the dense model where it is added.
        vector: (D,).
    """

    node: str
    read: str
    channel: int
    site: str
    dense_site: str
    dense_read: str
    vector: Tensor


def read_of(site: str) -> str:
    """The read that follows a residual site."""
    block, _, kind = site.rpartition(".")
    return f"{block}.{'attn_in' if kind == 'resid_pre' else 'mlp_in'}" if block else "final_in"


@torch.no_grad()
def read_norm(model: Residuals, read: str, resid: Tensor) -> ReadNorm:
    """Describe the norm before a read by what it gives, so that any norm with one scale per token can be described.

    Args:
        model: the model.
        read: one of its reads.
        resid: (N, D), residuals of reference tokens at the site that is read.

    Raises:
        BridgeError: the norm is of another kind.
    """
    x = torch.ones_like(resid[0])
    x[: len(x) // 2] = -1
    x = x - x.mean()
    x = x / x.square().mean().sqrt()  # no mean, RMS 1, no zero
    up, down, moved = (model.normed(read, t) for t in (x, -x, x + 1))
    gain, shift = (up - down) / (2 * x), (up + down) / 2
    centred = torch.allclose(moved, up, rtol=TOLERANCE, atol=TOLERANCE * up.abs().max().item())
    scaled = (resid - resid.mean(-1, keepdim=True) if centred else resid) * gain
    found = model.normed(read, resid) - shift
    scale = scaled.norm(dim=-1) / found.norm(dim=-1)
    scale = scale.where(found.norm(dim=-1) > 0, torch.nan)  # tokens without a residual have no scale
    off = (found - scaled / scale[:, None]).norm(dim=-1) / found.norm(dim=-1)
    if not off.nanmean() < TOLERANCE:
        raise BridgeError(
            f"the norm before {read} must divide a token's residual by one number and multiply each channel by its "
            f"own, got values {off.nanmean().item():.2g} off in relative terms; circuits cannot be carried there"
        )
    return ReadNorm(gain, centred, scale.nanmean().item())


@torch.no_grad()
def transferred(
    nodes: NodeSet, bridge: Bridge, sparse: Residuals, dense: Residuals, reference: Tensor
) -> tuple[list[Direction], dict[str, str]]:
    """Carry the nodes of a circuit that read the residual stream across a bridge.

    Args:
        nodes: the circuit's, by site.
        bridge: between the two models.
        sparse, dense: the models.
        reference: tokens (B, T) that the scales of the norms are averaged over.

    Returns:
        The directions in forward order; and the nodes that have none, by name, with the reason.

    Raises:
        BridgeError: a norm cannot be described.
    """
    residuals = [{site: h.flatten(0, -2) for site, h in m.run(reference)[0].items()} for m in (sparse, dense)]
    pairs = {pair.sparse: (i, pair.dense) for i, pair in enumerate(bridge.pairs)}
    found: list[Direction] = []
    left: dict[str, str] = {}
    for site in sparse.sites:
        read = read_of(site)
        node_site = _node_site(site)
        channels = nodes[node_site].nonzero().flatten().tolist()
        names = {c: f"{node_site}:{c}" for c in channels}
        reason = _no_place(site, pairs, dense)
        if reason or not channels:
            left |= dict.fromkeys(names.values(), reason)
            continue
        i, dense_site = pairs[site]
        dense_read = read_of(dense_site)
        pull = read_norm(sparse, read, residuals[0][site])
        push = read_norm(dense, dense_read, residuals[1][dense_site])
        for c, name in names.items():
            if c >= sparse.width:
                left[name] = "it reads a channel of positions, which is no part of the residual stream"
            elif pull.gain[c] == 0:
                left[name] = "the gain of the sparse model's norm is zero there, so nothing is read"
            else:
                vector = push.push(bridge.direction(i, c) * pull.pull(c))
                found.append(Direction(name, read, c, site, dense_site, dense_read, vector))
    return found, left


def at_all_reads(found: Sequence[Direction], nodes: NodeSet, sparse: Residuals) -> NodeSet:
    """The channels of directions as nodes at every read of the residual stream, where the circuit has them or not.

    A channel of the stream is one place for all depths: what is written there is there for whatever reads it later.

    Args:
        found: the directions.
        nodes: of any circuit of the sparse model; for the sites and their sizes.
        sparse: that model.
    """
    channels = sorted({direction.channel for direction in found})
    marked = {site: torch.zeros_like(mask) for site, mask in nodes.items()}
    for site in sparse.sites:
        marked[_node_site(site)][channels] = True
    return marked


def _node_site(site: str) -> str:
    """Where the nodes are that read a residual site: at the read, but for the last norm's, which are at the site."""
    read = read_of(site)
    return site if read == "final_in" else read


def _no_place(site: str, pairs: dict[str, tuple[int, str]], dense: Residuals) -> str:
    """Why what reads a site of the sparse model has no place in the dense one, or nothing."""
    if site not in pairs:
        return f"the bridge has no pair for {site}"
    if read_of(pairs[site][1]) not in dense.reads:
        return f"the dense model reads {pairs[site][1]} through no norm that stands before it"
    return ""
