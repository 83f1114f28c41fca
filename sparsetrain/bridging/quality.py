"""How good a bridge is, on held-out text: variance explained, hybrid passes, dead channels."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.bridging.bridge import Bridge, kl, log_probabilities
from sparsetrain.bridging.residuals import Residuals


class _Explained:
    """Variance of targets, and of what is left of them, summed over batches in float64."""

    def __init__(self):
        self.n, self.sum, self.squares, self.errors = 0, 0, 0, 0

    def add(self, found: Tensor, target: Tensor) -> None:
        target = target.flatten(0, -2).double()
        self.n += len(target)
        self.sum = self.sum + target.sum(0)
        self.squares = self.squares + target.square().sum(0)
        self.errors += (found.flatten(0, -2).double() - target).square().sum().item()

    def share(self) -> float:
        spread = (self.squares - self.sum.square() / self.n).sum().item()
        return 1 - self.errors / max(spread, 1e-12)


@torch.no_grad()
def quality(
    bridge: Bridge, sparse: Residuals, dense: Residuals, batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """Measure a bridge.

    Args:
        batches: held-out tokens (B, T), and what follows each of them.

    Returns:
        `sparse_loss`, `dense_loss` (nats per token), `kl` of the sparse model from the dense one, `n_tokens`, and
        `pairs`: for each pair of sites its names, the shares of variance explained (`explained_to_sparse`,
        `explained_to_dense`; at most 1), loss and KL of the hybrid passes (`loss_to_sparse`, `kl_to_sparse`: dense up
        to the site, sparse from there; `loss_to_dense`, `kl_to_dense`: the reverse), and `dead_channels`, which the
        encoder never sent anything to.
    """
    n = len(bridge.pairs)
    explained = [(_Explained(), _Explained()) for _ in range(n)]
    alive = torch.zeros(n, sparse.width, dtype=torch.bool)
    sums: dict[Any, float] = {}
    n_tokens = 0

    def add(key: Any, logits: Tensor, targets: Tensor, wanted: Tensor) -> None:
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        sums[key, "loss"] = sums.get((key, "loss"), 0.0) + loss
        sums[key, "kl"] = sums.get((key, "kl"), 0.0) + kl(wanted, logits).sum().item()

    for tokens, targets in batches:
        n_tokens += tokens.numel()
        (h_sparse, sparse_logits), (h_dense, dense_logits) = sparse.run(tokens), dense.run(tokens)
        wanted = log_probabilities(dense_logits, sparse, dense)
        add("sparse", sparse_logits, targets, wanted)
        add("dense", dense_logits, targets, wanted)
        everyone = torch.arange(len(tokens), device=tokens.device)
        for i, pair in enumerate(bridge.pairs):
            s, d = h_sparse[pair.sparse], h_dense[pair.dense]
            encoded, decoded = bridge.encode(i, d), bridge.decode(i, s)
            explained[i][0].add(encoded, s)
            explained[i][1].add(decoded, d)
            alive[i] |= (encoded != 0).flatten(0, -2).any(0).cpu()
            add((i, "to_sparse"), sparse.enter(tokens, {pair.sparse: (everyone, encoded)}), targets, wanted)
            add((i, "to_dense"), dense.enter(tokens, {pair.dense: (everyone, decoded)}), targets, wanted)
    means = {key: value / n_tokens for key, value in sums.items()}
    pairs = [
        {
            "sparse": pair.sparse,
            "dense": pair.dense,
            "explained_to_sparse": explained[i][0].share(),
            "explained_to_dense": explained[i][1].share(),
            **{f"{what}_{way}": means[(i, way), what] for way in ("to_sparse", "to_dense") for what in ("loss", "kl")},
            "dead_channels": int((~alive[i]).sum()),
        }
        for i, pair in enumerate(bridge.pairs)
    ]
    return {
        "sparse_loss": means["sparse", "loss"],
        "dense_loss": means["dense", "loss"],
        "kl": means["sparse", "kl"],
        "n_tokens": n_tokens,
        "pairs": pairs,
    }


def worst(report: dict[str, Any]) -> dict[str, float]:
    """A report in four numbers: mean variance explained both ways, and the greatest excess loss of a hybrid pass."""
    pairs = report["pairs"]
    return {
        **{k: sum(p[k] for p in pairs) / len(pairs) for k in ("explained_to_sparse", "explained_to_dense")},
        **{
            f"excess_{way}": max(p[f"loss_{way}"] for p in pairs) - report["dense_loss"]
            for way in ("to_sparse", "to_dense")
        },
    }


def describe(report: dict[str, Any]) -> str:
    """A report as a table."""
    lines = [
        f"{'site of the sparse model':24} {'of the dense one':20} {'explained':>15} {'loss of hybrid':>15} "
        f"{'KL of hybrid':>15} {'dead':>5}",
        f"{'':45} {'->sparse':>7} {'->dense':>7} {'->sparse':>7} {'->dense':>7} {'->sparse':>7} {'->dense':>7}",
    ]
    for p in report["pairs"]:
        shown = [p[f"{what}_{way}"] for what in ("explained", "loss", "kl") for way in ("to_sparse", "to_dense")]
        numbers = " ".join(f"{value:7.3f}" for value in shown)
        lines.append(f"{p['sparse']:24} {p['dense']:20} {numbers} {p['dead_channels']:5}")
    lines.append(
        f"loss of the sparse model {report['sparse_loss']:.3f}, of the dense one {report['dense_loss']:.3f}; "
        f"KL of the sparse from the dense {report['kl']:.3f}; nats on {report['n_tokens']:,} held-out tokens"
    )
    return "\n".join(lines)
