"""Where a bridge begins: each linear map by ridge regression between residuals of the two models as they are.

What is held of the tokens are sums: of a residual's products with itself and with the other model's. Sums of as many
sites as there is room for are filled in one pass over the tokens, and those of the others in further passes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsetrain.bridging.bridge import Bridge, Pair
from sparsetrain.bridging.residuals import BridgeError, Residuals

RIDGE = 1e-5  # of the mean variance of what is regressed on
SUMS_BYTES = 2**31  # of sums that one pass fills
PART_BYTES = 2**28  # of residuals and logits that are held of a part of a batch


class _Moments:
    """Sums over tokens of [s, d, 1] and of its products with itself, in float64."""

    def __init__(self, n_sparse: int, n_dense: int, device: torch.device):
        self.n_sparse, width = n_sparse, n_sparse + n_dense + 1
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, s: Tensor, d: Tensor) -> None:
        s, d = s.flatten(0, -2).double(), d.flatten(0, -2).double()
        both = torch.cat([s, d, s.new_ones(len(s), 1)], 1)
        self.products.addmm_(both.T, both)

    def centred_(self) -> tuple[Tensor, Tensor]:
        """Means (S + D,), and covariances (S + D, S + D) in place of the sums."""
        n = self.products[-1, -1].clone()
        mean = self.products[-1, :-1] / n
        return mean, self.products[:-1, :-1].div_(n).addr_(mean, mean, alpha=-1)


@torch.no_grad()
def regress_(bridge: Bridge, sparse: Residuals, dense: Residuals, batches: Sequence[Tensor]) -> None:
    """Set the constants and all maps of a bridge from residuals on batches of tokens (B, T).

    AbsTopK is left out of it: encoders are what explains most of the sparse residual before it.

    Raises:
        BridgeError: a residual of a model is not finite.
    """
    n_bytes = 8 * (sparse.width + dense.width + 1) ** 2
    n_sites, n_at_once = len(bridge.pairs), max(1, SUMS_BYTES // n_bytes)
    for first in range(0, n_sites, n_at_once):
        chosen = range(first, min(first + n_at_once, n_sites))
        moments = _gather([bridge.pairs[i] for i in chosen], sparse, dense, batches, bridge.mean.device)
        for i in chosen:
            _set_pair_(bridge, i, moments.pop(0))


def _gather(
    pairs: list[Pair], sparse: Residuals, dense: Residuals, batches: Sequence[Tensor], device: torch.device
) -> list[_Moments]:
    """The sums of some pairs of sites, in one pass over the batches."""
    moments = [_Moments(sparse.width, dense.width, device) for _ in pairs]
    n_numbers = sum(len(m.sites) * m.width + m.vocab_size for m in (sparse, dense))  # of a token
    for tokens in batches:
        for part in tokens.split(max(1, PART_BYTES // (4 * n_numbers * tokens.shape[1]))):
            h_sparse, h_dense = sparse.run(part)[0], dense.run(part)[0]
            for pair, sums in zip(pairs, moments, strict=True):
                sums.add(h_sparse[pair.sparse], h_dense[pair.dense])
    return moments


def _set_pair_(bridge: Bridge, i: int, sums: _Moments) -> None:
    """Set the constants and maps of one pair."""
    n = sums.n_sparse
    _check_finite(bridge.pairs[i], sums.products.diagonal(), n)
    mean, covariance = sums.centred_()
    mean_s, mean_d, spread = mean[:n], mean[n:], covariance.diagonal()
    t = (spread[:n].mean() + mean_s.square().mean()).sqrt().clamp_min(1e-6)
    s = spread[n:].mean().sqrt().clamp_min(1e-6)
    bridge.mean[i], bridge.scale[i], bridge.sparse_scale[i] = mean_d, s, t
    encode = _ridge(covariance[n:, n:], covariance[n:, :n])
    decode = _ridge(covariance[:n, :n], covariance[:n, n:])
    _set_(bridge.encoders[i], encode * s / t, mean_s / t)
    _set_(bridge.decoders[i], decode * t / s, -(decode @ mean_s) / s)


def _check_finite(pair: Pair, squares: Tensor, n_sparse: int) -> None:
    """Refuse sums (S + D + 1,) of squares that are no numbers."""
    for side, site, part in (("sparse", pair.sparse, squares[:n_sparse]), ("dense", pair.dense, squares[n_sparse:])):
        if not bool(part.isfinite().all()):
            raise BridgeError(f"the {side} model's residuals must be finite, got infinite or NaN at {site}")


def _ridge(variance: Tensor, covariance: Tensor) -> Tensor:
    """(O, I): the map from what has this variance (I, I) to what covaries with it (I, O)."""
    penalty = RIDGE * variance.diagonal().mean().clamp_min(1e-12)
    return torch.linalg.solve(variance + penalty * torch.eye(len(variance)).to(variance), covariance).T


def _set_(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
