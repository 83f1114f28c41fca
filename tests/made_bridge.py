"""A bridge that is exact between a model and its copy in another basis, and nodes by hand."""

import torch

from sparsetrain.bridging.bridge import Bridge, Pair
from sparsetrain.bridging.dense import OwnModel
from sparsetrain.pruning.graph import node_sites


@torch.no_grad()
def exact_bridge(model, rotation, scale=2.0, sparse_scale=0.5) -> Bridge:
    bridge = Bridge([Pair(site, site) for site in model.sites], len(rotation), len(rotation), topk=1)
    for encoder, decoder in zip(bridge.encoders, bridge.decoders, strict=True):
        encoder.weight.copy_(rotation.T * scale / sparse_scale)
        decoder.weight.copy_(rotation * sparse_scale / scale)
        encoder.bias.zero_()
        decoder.bias.zero_()
    bridge.scale.fill_(scale)
    bridge.sparse_scale.fill_(sparse_scale)
    return bridge.requires_grad_(False)


def chosen(model: OwnModel, **channels):
    """A node set: at each site the channels given, else none."""
    nodes = {s: torch.zeros(n, dtype=torch.bool) for s, n in node_sites(model.model.options).items()}
    for site, those in channels.items():
        nodes[site.replace("__", ".")][those] = True
    return nodes
