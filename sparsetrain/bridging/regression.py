"""Where a bridge begins: each linear map by ridge regression between residuals of the two models as they are."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsetrain.bridging.bridge import Bridge
from sparsetrain.bridging.residuals import BridgeError, Residuals

RIDGE = 1e-5  # of the mean variance of what is regressed on


class _Moments:
    """Sums over tokens of [s, d, 1] and of its products with itself, in float64."""

    def __init__(self, n_sparse: int, n_dense: int, device: torch.device):
        self.n_sparse, width = n_sparse, n_sparse + n_dense + 1
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, s: Tensor, d: Tensor) -> None:
        s, d = s.flatten(0, -2).double(), d.flatten(0, -2).double()
        both = torch.cat([s, d, s.new_ones(len(s), 1)], 1)
        self.products += both.T @ both

    def centred(self) -> tuple[Tensor, Tensor]:
        """Means (S + D,), and covariances (S + D, S + D)."""
        n = self.products[-1, -1]
        mean = self.products[-1, :-1] / n
        return mean, self.products[:-1, :-1] / n - torch.outer(mean, mean)


@torch.no_grad()
def regress_(bridge: Bridge, sparse: Residuals, dense: Residuals, batches: Iterable[Tensor]) -> None:
    """Set the constants and all maps of a bridge from residuals on batches of tokens (B, T).

    AbsTopK is left out of it: encoders are what explains most of the sparse residual before it.

    Raises:
        BridgeError: a residual of the dense model is not finite.
    """
    device = bridge.mean.device
    moments = [_Moments(sparse.width, dense.width, device) for _ in bridge.pairs]
    for tokens in batches:
        h_sparse, h_dense = sparse.run(tokens)[0], dense.run(tokens)[0]
        if broken := [site for site, h in h_dense.items() if not bool(h.isfinite().all())]:
            raise BridgeError(f"the dense model's residuals must be finite, got infinite or NaN at {', '.join(broken)}")
        for pair, sums in zip(bridge.pairs, moments, strict=True):
            sums.add(h_sparse[pair.sparse], h_dense[pair.dense])
    for i, sums in enumerate(moments):
        mean, covariance = sums.centred()
        n = sums.n_sparse
        mean_s, mean_d, spread = mean[:n], mean[n:], covariance.diagonal()
        t = (spread[:n].mean() + mean_s.square().mean()).sqrt().clamp_min(1e-6)
        s = spread[n:].mean().sqrt().clamp_min(1e-6)
        bridge.mean[i], bridge.scale[i], bridge.sparse_scale[i] = mean_d, s, t
        encode = _ridge(covariance[n:, n:], covariance[n:, :n])
        decode = _ridge(covariance[:n, :n], covariance[:n, n:])
        _set_(bridge.encoders[i], encode * s / t, mean_s / t)
        _set_(bridge.decoders[i], decode * t / s, -(decode @ mean_s) / s)


def _ridge(variance: Tensor, covariance: Tensor) -> Tensor:
    """(O, I): the map from what has this variance (I, I) to what covaries with it (I, O)."""
    penalty = RIDGE * variance.diagonal().mean().clamp_min(1e-12)
    return torch.linalg.solve(variance + penalty * torch.eye(len(variance)).to(variance), covariance).T


def _set_(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
