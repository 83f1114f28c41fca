"""A bridge while it is trained: its losses on a batch, its optimiser, and its state in a checkpoint."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsetrain.bridge_config import BridgeConfig
from sparsetrain.bridging.bridge import Bridge, Losses, bridge_losses, pair_sites, weigh
from sparsetrain.bridging.regression import regress_
from sparsetrain.bridging.residuals import Residuals
from sparsetrain.kernels.ops import next_token_loss
from sparsetrain.model import Transformer, norm_and_keep


class Fitting:
    """A bridge between two models, and Adam over it alone.

    Args:
        config: the whole config.
        sparse, dense: the models.
        device: theirs.

    Raises:
        ConfigError: the map of sites cannot be followed.
    """

    def __init__(self, config: BridgeConfig, sparse: Residuals, dense: Residuals, device: torch.device):
        self.config, self.options, self.sparse, self.dense = config, config.bridge, sparse, dense
        self.device = device
        pairs = pair_sites(self.options, sparse, dense)
        self.bridge = Bridge(pairs, sparse.width, dense.width, self.options.topk).to(device)
        self.optimizer = torch.optim.Adam(self.bridge.parameters(), lr=self.options.lr, fused=True)
        self.parts: Losses = {}  # of the last batch, detached
        self.rows_seen = 0  # of a batch that comes in parts

    def regress_(self, batches: Sequence[Tensor]) -> None:
        """Set the maps by ridge regression on batches of tokens (B, T), and forget Adam's moments of them.

        Raises:
            BridgeError: a residual of a model is not finite.
        """
        regress_(self.bridge, self.sparse, self.dense, batches)
        self.optimizer.state.clear()

    def losses(self, tokens: Tensor, targets: Tensor, shift: int, model: Transformer) -> Losses:
        """All losses of a batch by the names of their weights: the sparse model's own, and the bridge's four."""
        h_sparse, pretrain = residuals_and_loss(model, self.sparse.sites, tokens, targets)
        if not self.rows_seen:  # once a step
            self.bridge.follow_(h_sparse)
        bridged = bridge_losses(self.bridge, self.sparse, self.dense, tokens, h_sparse, shift)
        return {"pretrain": pretrain, **bridged}

    def loss(self, tokens: Tensor, targets: Tensor, shift: int, model: Transformer) -> Tensor:
        """Their weighted sum, 0-d; `parts` keeps them one by one.

        A batch may come in parts, until `step_` ends it: its rows take the hybrid passes that they would take at once.
        """
        losses = self.losses(tokens, targets, shift + self.rows_seen, model)
        before = self.parts if self.rows_seen else dict.fromkeys(losses, 0)
        share = len(tokens) / self.config.train.batch_size
        self.parts = {name: before[name] + share * value.detach() for name, value in losses.items()}
        self.rows_seen += len(tokens)
        return weigh(losses, self.options)

    def step_(self, progress: float) -> None:
        """Move the bridge along its gradients, at the rate for `progress` in [0, 1): warm-up, then linear decay."""
        warmup = self.config.optim.warmup
        rate = self.options.lr * (min(1.0, progress / warmup) if warmup else 1.0) * (1 - progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rows_seen = 0

    def numbers(self) -> dict[str, float]:
        """The losses of the last batch, as they are recorded."""
        return {f"bridge/{name}": value.item() for name, value in self.parts.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint needs of it."""
        state = self.optimizer.state
        moments = {
            f"{name}.{key}": v for name, p in self.bridge.named_parameters() for key, v in state.get(p, {}).items()
        }
        return {**self.bridge.state_dict(), **moments}

    def load_(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        own = self.bridge.state_dict()
        self.bridge.load_state_dict({name: tensors[name] for name in own})
        for name, p in self.bridge.named_parameters():
            self.optimizer.state[p] = {
                key: tensors[f"{name}.{key}"].to(p.device) for key in ("step", "exp_avg", "exp_avg_sq")
            }


def residuals_and_loss(
    model: Transformer, sites: tuple[str, ...], tokens: Tensor, targets: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The residual stream (B, T, S) at every site, and the loss (0-d), of one forward pass."""
    seen: dict[str, Tensor] = {}
    resid = model.final_resid(tokens, model.visitor(seen, sites))
    logits = model.unembed(norm_and_keep(model.norm, resid, 1))
    return seen, next_token_loss(logits, model.bigram if model.options.bigram else None, tokens, targets)
