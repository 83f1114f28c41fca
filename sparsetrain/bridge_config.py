"""The typed configuration of a bridge: every key of `sparsetrain bridge`."""

from dataclasses import dataclass, field, fields

from sparsetrain.config import RunConfig, option


@dataclass(frozen=True)
class BridgeOptions:
    """A bridge between a weight-sparse model and an existing dense one (Gao et al. 2025, 2.3 and A.3)."""

    dense: str | None = option(None, "the dense model: a run directory, a Hugging Face folder, or a name on its hub")
    sparse: str | None = option(
        None, "a run directory, whose sparse model stays as it is and gets a bridge; null: trained jointly with it"
    )
    name: str = option("dense", "folder of the bridge, under bridges/ in the sparse model's run directory")
    sites: list[str] = option(
        [], "pairs of residual sites, as blocks.0.resid_mid=blocks.3.resid_pre (sparse=dense); none: those of the same "
        "name, for models of equal depth",
    )  # fmt: skip
    topk: float = option(0.25, "share of the sparse model's residual channels that an encoder keeps", "fraction", 0, 1)
    regress_every: int = option(
        100,
        "steps of a joint training between regressions that set the maps anew; 0: at the start alone",
        "steps",
        low=0,
    )
    lr: float = option(2e-3, "peak learning rate of the bridge's Adam, with the run's warm-up and decay", low=0)
    pretrain: float = option(1.0, "weight of the sparse model's own loss", low=0)
    nmse_to_sparse: float = option(1.0, "weight of the encoders' normalised error, summed over sites", low=0)
    nmse_to_dense: float = option(1.0, "weight of the decoders' normalised error, summed over sites", low=0)
    kl_to_sparse: float = option(1.0, "weight of the KL of passes dense up to a site, sparse from there", low=0)
    kl_to_dense: float = option(1.0, "weight of the KL of passes sparse up to a site, dense from there", low=0)


@dataclass(frozen=True)
class BridgeConfig(RunConfig):
    """A run of the sparse model, with the bridge that is trained beside it."""

    bridge: BridgeOptions = field(default_factory=BridgeOptions)

    def problems(self) -> list[str]:
        found = [] if self.bridge.dense else ["bridge.dense must name the dense model, got null"]
        if self.run.compile:
            found.append("run.compile must be false with a bridge, which is not compiled, got true")
        return [*super().problems(), *found]

    @property
    def run_config(self) -> RunConfig:
        """What the sparse model's run directory holds: all but the bridge's own keys."""
        return RunConfig(**{f.name: getattr(self, f.name) for f in fields(RunConfig)})
