"""Run a model with some nodes ablated, and measure how well a task is done and how far that is from the full model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.model import Edit, Transformer, taken
from sparsetrain.pruning.ablation import BATCH, Ablation, draw_places, site_reader
from sparsetrain.pruning.graph import NodeSet, node_sites
from sparsetrain.tasks import TaskData

CHANCE = 0.6931471805599453  # ln 2: the loss of a coin


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


def mask_edits(masks: NodeSet, replacements: Mapping[str, Tensor]) -> dict[str, Edit]:
    """Edits that keep the nodes of `masks` and replace the others: m x + (1 - m) replacement.

    Args:
        masks: for a site, a mask over its channels: boolean, or float in [0, 1] that gradients flow to. Sites not
            named are left alone.
        replacements: for a site what replaces its activation (B, T, width), which it broadcasts over.
    """

    def edit(site: str, mask: Tensor) -> Edit:
        if mask.dtype == torch.bool:
            return lambda x: torch.where(mask, x, replacements[site].to(x.dtype))
        return lambda x: torch.lerp(replacements[site].to(x.dtype).expand_as(x), x, mask.to(x.dtype))

    return {site: edit(site, mask) for site, mask in masks.items() if mask.dtype != torch.bool or not mask.all()}


def answer_logits(model: Transformer, data: TaskData, masks: NodeSet, ablation: Ablation, places: Tensor) -> Tensor:
    """Logits (N, V) after the last token of each prompt, with all nodes outside `masks` ablated."""
    data = data.trimmed()
    replacements = ablation.replacements(site_reader(model, node_sites(model.options)), data, places)
    visit = model.visitor({}, (), mask_edits(masks, at_answers(model, replacements, data)))
    return logits_of(model, model.final_resid(data.tokens, visit, data.read_at), data)


def at_answers(model: Transformer, replacements: Mapping[str, Tensor], data: TaskData) -> dict[str, Tensor]:
    """Replacements of node sites for `final_resid` at the positions that are read alone."""
    last = f"blocks.{model.options.n_layers - 1}."
    late = {"final_resid", *(last + name for name in ("attn_out", "mlp_in", "mlp_act", "mlp_out"))}
    return {
        site: taken(x.expand(len(data), -1, -1), data.read_at) if site in late and x.shape[-2] > 1 else x
        for site, x in replacements.items()
    }


def logits_of(model: Transformer, resid: Tensor, data: TaskData) -> Tensor:
    """Logits (N, V), or (N, P, V) where each prompt is read at P positions, from the final residual there (N, P, D)."""
    found = model.logits(resid, data.tokens.gather(1, data.read_at))
    return found if data.last.dim() == 2 else found[:, 0]


def logits_at_answers(model: Transformer, resid: Tensor, data: TaskData) -> Tensor:
    """The same from the final residual at all positions (N, T, D)."""
    return logits_of(model, taken(resid, data.read_at), data)


@torch.no_grad()
def all_answer_logits(model: Transformer, data: TaskData, masks: NodeSet, ablation: Ablation, seed: int = 0) -> Tensor:
    """`answer_logits` of many prompts, a batch of similar lengths at a time."""
    return in_batches(lambda part, places: answer_logits(model, part, masks, ablation, places), data, ablation, seed)


def in_batches(run: Callable[[TaskData, Tensor], Tensor], data: TaskData, ablation: Ablation, seed: int) -> Tensor:
    """What `run` gives for each prompt, from its prompts and their places in the ablation's bank, BATCH at a time."""
    rows, results = zip(*((rows, run(part, places)) for rows, part, places in parts(data, ablation, seed)), strict=True)
    return torch.cat(results)[torch.cat(rows).argsort()]


def parts(
    data: TaskData, ablation: Ablation, seed: int, size: int = BATCH
) -> Iterator[tuple[Tensor, TaskData, Tensor]]:
    """Row numbers, prompts and places in the ablation's bank, `size` prompts of similar lengths at a time."""
    places = draw_places(ablation, data.tokens, torch.Generator().manual_seed(seed))
    for rows in data.end.argsort(stable=True).split(size):
        yield rows, data.take(rows.tolist()), places[rows]


def right_and_wrong(logits: Tensor, data: TaskData) -> tuple[Tensor, Tensor]:
    """Logits (N,) of the right and of the wrong answers, from logits (N, V) after each prompt.

    Of a set of answers it is the logsumexp, so that the difference of the two is the log-odds of right against wrong.
    """
    if data.correct_set is None or data.wrong_set is None:
        rows = torch.arange(len(data), device=logits.device)
        return logits[rows, data.correct], logits[rows, data.wrong]
    logits = logits[:, : data.correct_set.shape[1]]  # a model may have logits past its tokenizer's last token
    right, wrong = (logits.masked_fill(~answers, -torch.inf) for answers in (data.correct_set, data.wrong_set))
    return right.logsumexp(1), wrong.logsumexp(1)


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


def _difference(logits: Tensor, data: TaskData) -> Tensor:
    right, wrong = right_and_wrong(logits, data)
    return right - wrong


def _side(data: TaskData) -> Tensor:
    """+1 where the pair's positive answer is right, -1 where it is wrong."""
    return (data.correct == data.positive).float() * 2 - 1
