"""Run a model with some nodes ablated, and measure how well a task is done and how far that is from the full model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.model import Edit, Transformer
from sparsetrain.pruning.graph import NodeSet, complement, node_sites
from sparsetrain.tasks import TaskData

CHANCE = 0.6931471805599453  # ln 2: the loss of a coin
BATCH = 64  # prompts in one forward pass
BANK = 512  # places of the corpus kept for resampling

AblationKind = Literal["mean_data", "mean_task", "zero", "resample"]


@dataclass(frozen=True)
class Ablation:
    """What replaces the activation of a node outside the circuit.

    `values` has for each site a mean over the data (width,), or, under `resample`, a bank of activations
    (n_places, width); row i of every bank comes from the same place of the corpus.
    """

    kind: AblationKind
    values: dict[str, Tensor]

    def at(self, site: str, x: Tensor, places: Tensor) -> Tensor:
        """The replacement for x (B, T, width); `places` (B, T) picks rows of the bank."""
        values = self.values[site].to(x.dtype)
        return values[places] if self.kind == "resample" else values


@dataclass(frozen=True)
class Calibration:
    """Scale and shift of the answers' logits: scale x logit, and shift added to each pair's positive answer.

    Source: Gao et al. 2025, A.5 (scale and shift fitted with 16 steps of LBFGS).
    """

    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, logits: Tensor, data: TaskData) -> Tensor:
        """Logit of the right answer minus that of the wrong one, calibrated: (N,)."""
        return self.scale * _difference(logits, data) + self.shift * _side(data)


@torch.no_grad()
def build_ablation(
    model: Transformer, kind: AblationKind, corpus: Iterable[Tensor], data: TaskData | None = None, seed: int = 0
) -> Ablation:
    """Collect what replaces ablated nodes.

    Args:
        model: the model.
        kind: `mean_data` and `resample` read `corpus`, `mean_task` reads the prompts of `data`, `zero` neither.
        corpus: batches of tokens (B, T).
        data: prompts of the task.
        seed: for the places that are kept for resampling.

    Source: means over the pretraining distribution: Gao et al. 2025, A.5; zero and task means: Drori 2026.
    """
    sites = node_sites(model.options)
    device = model.unembed.weight.device
    if kind == "zero":
        return Ablation(kind, {s: torch.zeros(n, device=device) for s, n in sites.items()})
    if kind == "mean_task":
        assert data is not None
        real = torch.arange(data.tokens.shape[1], device=device) <= data.last[:, None]
        batches = [(part, real[i : i + BATCH]) for i, part in _parts(data.tokens)]
    else:
        batches = [(tokens.to(device), torch.ones_like(tokens, dtype=torch.bool, device=device)) for tokens in corpus]
    if kind == "resample":
        return Ablation(kind, _bank(model, [t for t, _ in batches], seed))
    sums = {s: torch.zeros(n, dtype=torch.float64, device=device) for s, n in sites.items()}
    for tokens, real in batches:
        seen: dict[str, Tensor] = {}
        model.final_resid(tokens, model.visitor(seen, sites))
        for site, x in seen.items():
            sums[site] += (x * real[..., None]).sum((0, 1), dtype=torch.float64)
    total = sum(int(real.sum()) for _, real in batches)
    return Ablation(kind, {s: (x / total).float() for s, x in sums.items()})


def mask_edits(masks: NodeSet, ablation: Ablation, places: Tensor) -> dict[str, Edit]:
    """Edits that keep the nodes of `masks` and replace the others: m x + (1 - m) replacement.

    Args:
        masks: for a site, a mask over its channels: boolean, or float in [0, 1] that gradients flow to. Sites not
            named are left alone.
        ablation: what replaces.
        places: (B, T) rows of a resampling bank; not looked at by other ablations.
    """

    def edit(site: str, mask: Tensor) -> Edit:
        if mask.dtype == torch.bool:
            return lambda x: torch.where(mask, x, ablation.at(site, x, places))
        return lambda x: torch.lerp(ablation.at(site, x, places).expand_as(x), x, mask.to(x.dtype))

    return {site: edit(site, mask) for site, mask in masks.items() if mask.dtype != torch.bool or not mask.all()}


def draw_places(ablation: Ablation, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Which rows of the bank replace each token of (B, T); zeros where the ablation has no bank."""
    if ablation.kind != "resample":
        return torch.zeros_like(tokens)
    n = len(ablation.values["final_resid"])
    return torch.randint(n, tokens.shape, generator=generator).to(tokens.device)


def answer_logits(model: Transformer, data: TaskData, masks: NodeSet, ablation: Ablation, places: Tensor) -> Tensor:
    """Logits (N, V) after the last token of each prompt, with all nodes outside `masks` ablated."""
    tokens = data.tokens[:, : int(data.last.max()) + 1]
    visit = model.visitor({}, (), mask_edits(masks, ablation, places[:, : tokens.shape[1]]))
    rows = torch.arange(len(data), device=tokens.device)
    resid = model.final_resid(tokens, visit)[rows, data.last]
    return model.logits(resid, tokens[rows, data.last])


@torch.no_grad()
def all_answer_logits(model: Transformer, data: TaskData, masks: NodeSet, ablation: Ablation, seed: int = 0) -> Tensor:
    """`answer_logits` of many prompts, a batch of similar lengths at a time."""
    places = draw_places(ablation, data.tokens, torch.Generator().manual_seed(seed))
    order = data.last.argsort(stable=True)
    parts = [
        answer_logits(model, data.take(rows.tolist()), masks, ablation, places[rows]) for rows in order.split(BATCH)
    ]
    return torch.cat(parts)[order.argsort()]


def task_losses(difference: Tensor) -> Tensor:
    """Binary cross-entropy of each prompt (N,) from the logit difference right - wrong; chance is ln 2.

    Source: Gao et al. 2025, as in the released registries.py; half of the number stored there, which sums a pair.
    """
    return F.softplus(-difference)


def task_score(logits: Tensor, data: TaskData, calibration: Calibration | None = None) -> tuple[float, float]:
    """Mean task loss and accuracy of answer logits (N, V)."""
    difference = (calibration or Calibration())(logits, data)
    return task_losses(difference).mean().item(), (difference > 0).float().mean().item()


def calibrate(logits: Tensor, data: TaskData) -> Calibration:
    """Fit the calibration that minimises the task loss of answer logits (N, V); scale stays positive."""
    # On the CPU: two scalars are fitted, and a GPU would wait at each of the many small steps.
    difference, side = _difference(logits, data).double().cpu(), _side(data).double().cpu()
    log_scale, shift = (torch.zeros((), dtype=torch.float64).requires_grad_() for _ in range(2))
    optimizer = torch.optim.LBFGS([log_scale, shift], max_iter=16, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # A task that is done perfectly would push the scale to infinity.
        loss = task_losses(log_scale.exp() * difference + shift * side).mean() + 1e-4 * log_scale.square()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return Calibration(log_scale.exp().item(), shift.item())


def kl_divergence(full: Tensor, ablated: Tensor) -> float:
    """Mean KL(full model || ablated model) in nats over the whole vocabulary, from answer logits (N, V) of each."""
    return F.kl_div(ablated.log_softmax(-1), full.log_softmax(-1), reduction="batchmean", log_target=True).item()


def node_effects(
    model: Transformer,
    data: TaskData,
    nodes: NodeSet,
    ablation: Ablation,
    calibration: Calibration,
    progress: Callable[[int], object] = lambda done: None,
) -> dict[tuple[str, int], float]:
    """How much the circuit's task loss rises when one more node is ablated, for each of its nodes."""  # fmt: skip
    base = task_score(all_answer_logits(model, data, nodes, ablation), data, calibration)[0]
    effects = {}
    for site, mask in nodes.items():
        for channel in mask.nonzero().flatten().tolist():
            fewer = mask.clone()
            fewer[channel] = False
            logits = all_answer_logits(model, data, {**nodes, site: fewer}, ablation)
            effects[site, channel] = task_score(logits, data, calibration)[0] - base
            progress(1)
    return effects


def random_like(nodes: NodeSet, generator: torch.Generator) -> NodeSet:
    """A random node set with as many nodes at each site as `nodes`, none of them in it where there is room."""
    drawn = {}
    for site, mask in complement(nodes).items():
        n = int((~mask).sum())
        order = torch.rand(len(mask), generator=generator).to(mask.device) + mask  # those outside `nodes` first
        drawn[site] = torch.zeros_like(mask)
        drawn[site][order.argsort(descending=True)[:n]] = True
    return drawn


def _difference(logits: Tensor, data: TaskData) -> Tensor:
    rows = torch.arange(len(data), device=logits.device)
    return logits[rows, data.correct] - logits[rows, data.wrong]


def _side(data: TaskData) -> Tensor:
    """+1 where the pair's positive answer is right, -1 where it is wrong."""
    return (data.correct == data.positive).float() * 2 - 1


def _parts(tokens: Tensor) -> Iterable[tuple[int, Tensor]]:
    return ((i, tokens[i : i + BATCH]) for i in range(0, len(tokens), BATCH))


def _bank(model: Transformer, batches: list[Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, list[Tensor]] = {s: [] for s in node_sites(model.options)}
    share = -(-BANK // len(batches))
    for tokens in batches:
        seen: dict[str, Tensor] = {}
        model.final_resid(tokens, model.visitor(seen, kept))
        chosen = torch.randperm(tokens.numel(), generator=generator)[:share].to(tokens.device)
        for site, x in seen.items():
            kept[site].append(x.flatten(0, 1)[chosen].float())
    return {site: torch.cat(rows)[:BANK] for site, rows in kept.items()}
