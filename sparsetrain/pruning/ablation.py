"""What replaces what is outside a circuit: collected once, and laid out for each batch of prompts."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sparsetrain.config import RunConfig, load_config
from sparsetrain.data import require_source
from sparsetrain.model import Transformer
from sparsetrain.tasks import TaskData, TaskError

BATCH = 64  # prompts in one forward pass
OF_CORPUS = ("mean_data", "resample")  # ablations that read the corpus a model was trained on
BANK = 512  # places of the corpus kept for resampling

AblationKind = Literal["mean_data", "mean_task", "mean_position", "zero", "resample", "corrupted"]

# The activations of a full run, (..., B, T, width), by site or by another name: what an ablation replaces.
Read = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Ablation:
    """What replaces the activations outside a circuit.

    `values` has for each name a mean over the data (..., width), under `mean_position` one for each position
    (..., T, width), and under `resample` a bank of activations (..., n_places, width), where row i of every bank comes
    from the same place of the corpus. Under `corrupted` it is empty: the corrupted prompts are run with each batch.
    """

    kind: AblationKind
    values: dict[str, Tensor]

    def label(self) -> str:
        """Its kind, and how much it holds to four digits, by which a saved search tells it from others."""
        return f"{self.kind} {sum(x.double().norm().item() for x in self.values.values()):.4g}"

    def replacements(self, read: Read, data: TaskData, places: Tensor) -> dict[str, Tensor]:
        """For each name what replaces the activations of these prompts; it broadcasts over (..., N, T, width).

        Under `corrupted` there is `shared` too, (N, T) booleans: where a prompt has been its partner so far, so that a
        causal model does the same on both; or where it has ended.

        Args:
            read: what the ablation was built with; only `corrupted` runs it.
            data: N prompts of T tokens.
            places: (N, T) rows of the bank; not looked at by other ablations.
        """
        n_tokens = data.tokens.shape[1]
        if self.kind == "corrupted":
            with torch.no_grad():
                return {**read(data.corrupted[:, :n_tokens]), "shared": _shared(data)}
        if self.kind == "resample":
            return {name: bank[..., places[:, :n_tokens], :] for name, bank in self.values.items()}
        if self.kind == "mean_position":
            at = torch.arange(n_tokens, device=data.tokens.device)  # positions past the last mean take that one
            return {name: m[..., None, at.clamp(max=m.shape[-2] - 1), :] for name, m in self.values.items()}
        return {name: mean[..., None, None, :] for name, mean in self.values.items()}


def refuse_without_corpus(run: Path, kind: AblationKind) -> None:
    """Raise if an ablation reads the corpus and a run has none; of the run only the config is read.

    Raises:
        DataError: `data.source` is none, as for imported models.
    """
    config = next((file for file in (run / "model" / "config.yaml", run / "config.yaml") if file.exists()), None)
    if kind in OF_CORPUS and config is not None:
        require_source(load_config(RunConfig, [str(config)]).data)


def site_reader(model: Transformer, sites: Collection[str]) -> Read:
    """Run the model on tokens (B, T) and give back the activations at `sites`."""

    def read(tokens: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        model.final_resid(tokens, model.visitor(seen, sites))
        return seen

    return read


@torch.no_grad()
def build_ablation(
    read: Read, kind: AblationKind, corpus: Iterable[Tensor], data: TaskData | None = None, seed: int = 0
) -> Ablation:
    """Collect what replaces what is ablated.

    Args:
        read: the activations to collect, e.g. `site_reader(model, node_sites(model.options))`.
        kind: `mean_data` and `resample` read `corpus`; `mean_task` and `mean_position` read the prompts of `data`, the
            corrupted ones where it has some; `corrupted` reads them later, and `zero` only looks at widths.
        corpus: batches of tokens (B, T), on the model's device.
        data: prompts of the task.
        seed: for the places that are kept for resampling.

    Raises:
        TaskError: `corrupted` is asked for and the prompts have no corrupted partners, or the corpus that is to be read
            is empty.

    Source: means over the pretraining distribution: Gao et al. 2025, A.5; zero and task means: Drori 2026; corrupted
    prompts: Conmy et al. 2023.
    """
    if kind == "corrupted":
        if data is None or data.corrupted is None:
            raise TaskError(
                "ablation 'corrupted' needs for each prompt a corrupted one of as many tokens, got prompts without; "
                "take another ablation, or prompts that come in pairs of equal length"
            )
        return Ablation(kind, {})
    if kind in ("mean_task", "mean_position", "zero"):
        assert data is not None
        tokens = data.tokens if data.corrupted is None else data.corrupted
        real = torch.arange(tokens.shape[1], device=tokens.device) <= data.end[:, None]
        batches = list(zip(tokens.split(BATCH), real.split(BATCH), strict=True))
    else:
        batches = [(tokens, torch.ones_like(tokens, dtype=torch.bool)) for tokens in corpus]
    if not batches:
        raise TaskError(f"ablation {kind!r} needs the corpus a model was trained on, got none; take another ablation")
    if kind == "zero":
        return Ablation(kind, {name: torch.zeros_like(x[..., 0, 0, :]) for name, x in read(batches[0][0][:1]).items()})
    if kind == "resample":
        return Ablation(kind, _bank(read, [tokens for tokens, _ in batches], seed))
    over = (-3, -2) if kind != "mean_position" else (-3,)
    sums: dict[str, Tensor] = {}
    dtype = torch.float32
    for tokens, real in batches:
        for name, x in read(tokens).items():
            dtype = _float(x)
            part = (x * real[..., None]).sum(over, dtype=torch.float64)
            sums[name] = sums[name] + part if name in sums else part
    if kind == "mean_position":
        total = sum(real.sum(0) for _, real in batches)[:, None].clamp(min=1)
    else:
        total = sum(int(real.sum()) for _, real in batches)
    return Ablation(kind, {name: (x / total).to(dtype) for name, x in sums.items()})


def draw_places(ablation: Ablation, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Which rows of the bank replace each token of (B, T); zeros where the ablation has no bank."""
    if ablation.kind != "resample":
        return torch.zeros_like(tokens)
    n = next(iter(ablation.values.values())).shape[-2]
    return torch.randint(n, tokens.shape, generator=generator).to(tokens.device)


def _shared(data: TaskData) -> Tensor:
    same = data.tokens == data.corrupted[:, : data.tokens.shape[1]]
    ended = torch.arange(same.shape[1], device=same.device) > data.end[:, None]
    return same.cumprod(1).bool() | ended


def _float(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _bank(read: Read, batches: list[Tensor], seed: int) -> dict[str, Tensor]:
    """BANK places of the corpus, as many from each batch, and the activations there."""
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, list[Tensor]] = {}
    share = -(-BANK // len(batches))
    for tokens in batches:
        chosen = torch.randperm(tokens.numel(), generator=generator)[:share].to(tokens.device)
        for name, x in read(tokens).items():
            kept.setdefault(name, []).append(x.flatten(-3, -2)[..., chosen, :].to(_float(x)))
    return {name: torch.cat(rows, dim=-2)[..., :BANK, :] for name, rows in kept.items()}
