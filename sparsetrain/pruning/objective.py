"""What a circuit is to preserve: measures of its outputs on each prompt. Greater is better; gradients flow through."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparsetrain.config import ConfigError
from sparsetrain.pruning.evaluate import Calibration, right_and_wrong, task_losses
from sparsetrain.tasks import TaskData


@dataclass(frozen=True)
class Extremes:
    """The outputs (N, V), or (N, P, V), of the full model, and with every edge cut."""

    full: Tensor
    empty: Tensor


@dataclass
class LateExtremes:
    """Extremes whose empty outputs are computed when a metric first looks at them."""

    full: Tensor
    compute_empty: Callable[[], Tensor]

    @cached_property
    def empty(self) -> Tensor:
        with torch.no_grad():
            return self.compute_empty()


Metric = Callable[[Tensor, TaskData, Extremes], Tensor]  # outputs -> (N,)


def logit_difference(outputs: Tensor, data: TaskData, extremes: Extremes) -> Tensor:
    """Logit of the right answer minus that of the wrong one; of sets of answers, their log-odds."""
    return Calibration()(outputs, data)


def probability_difference(outputs: Tensor, data: TaskData, extremes: Extremes) -> Tensor:
    """Probability of the right answers minus that of the wrong ones, over the whole vocabulary.

    Source: Hanna et al. 2023, for greater-than.
    """
    right, wrong = right_and_wrong(outputs.log_softmax(-1), data)
    return right.exp() - wrong.exp()


def task_loss(outputs: Tensor, data: TaskData, extremes: Extremes) -> Tensor:
    """Minus the binary cross-entropy of the two answers, in nats."""
    return -task_losses(Calibration()(outputs, data))


def kl(outputs: Tensor, data: TaskData, extremes: Extremes) -> Tensor:
    """Minus KL(full model || circuit) over the vocabulary, in nats, summed over positions. Flat at the full model."""
    full, ours = (x.log_softmax(-1) for x in (extremes.full, outputs))
    return -(full.exp() * (full - ours)).flatten(1).sum(1)


def squared_error(outputs: Tensor, data: TaskData, extremes: Extremes) -> Tensor:
    """Minus the squared distance from the full model's outputs. Flat at the full model."""
    return -(outputs - extremes.full).square().flatten(1).sum(1)


def projection(outputs: Tensor, data: TaskData, extremes: Extremes) -> Tensor:
    """The outputs along the change that cutting every edge makes; linear in the outputs."""
    return (outputs * (extremes.full - extremes.empty)).flatten(1).sum(1)


def refuse_if_flat(metric: Metric, data: TaskData, extremes: Extremes | LateExtremes) -> None:
    """Raise if the metric has no slope at the full model's outputs, where methods of one gradient take theirs.

    Raises:
        ValueError: its gradient there is zero (to rounding in float64).
    """
    with torch.enable_grad():
        outputs = extremes.full.double().requires_grad_()
        value = metric(outputs, data, LateExtremes(extremes.full.double(), lambda: extremes.empty.double())).sum()
        (slope,) = torch.autograd.grad(value, outputs)
    if slope.abs().max() < 1e-12:
        refuse_flat(metric)


def refuse_flat(metric: Metric) -> None:
    """Raise that a metric is flat at the full model."""
    raise ConfigError(
        f"the metric of eap must have a gradient at the full model, got zero from {metric.__name__}; take "
        "logit_difference, task_loss or projection, or the estimator eap_ig_inputs, gates, gates_checked or exact"
    )


FLAT = (kl, squared_error)  # at the full model, whatever the prompts
METRICS: dict[str, Metric] = {
    f.__name__: f for f in (logit_difference, probability_difference, task_loss, kl, squared_error, projection)
}
