"""What is said of a circuit: measures on held-out prompts, each beside its control; and what a full model can do."""

import dataclasses
import logging
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sparsetrain import checkpoint
from sparsetrain.model import Transformer
from sparsetrain.pruning.ablation import BATCH, Ablation
from sparsetrain.pruning.curves import curve
from sparsetrain.pruning.cut import Cut, Method, Problem, find
from sparsetrain.pruning.edges import EdgeSet, batches
from sparsetrain.pruning.evaluate import (
    CHANCE,
    Calibration,
    all_answer_logits,
    calibrate,
    kl_divergence,
    task_losses,
    task_score,
)
from sparsetrain.pruning.graph import full
from sparsetrain.pruning.objective import logit_difference
from sparsetrain.pruning.space import Space, Units, complement, n_units, random_like
from sparsetrain.sparsity import multiply_nonzeros_
from sparsetrain.tasks import TASKS, TaskData, TaskError, encode_task, load_task, nonsense

log = logging.getLogger(__name__)


def measure(problem: Problem, heldout: TaskData, cut: Cut) -> dict[str, Any]:
    """The measures of a circuit on held-out prompts, each beside its control.

    Args:
        problem: what the circuit was found by; its prompts serve calibration alone.
        heldout: the held-out prompts.
        cut: the circuit's units and calibration.

    Returns:
        graph; units: `nodes` or `edges`, whatever the circuit was cut out of; size: how many were asked
        for, None where the target decided.
        task_loss, task_accuracy: of the circuit alone, calibrated (the target's terms); task_loss_se: the loss's
        standard error over the `n_prompts` held-out prompts; task_loss_uncalibrated.
        n_nodes, n_edges; n_dangling: units on no path that the target could not spare (see `cut.clean`), or that a
        size took in.
        logit_difference: right minus wrong, a mean over prompts, uncalibrated; faithfulness: how far it is from that
        with everything ablated (0) to that of the full model (1); it may leave this range.
        kl: to the full model over the vocabulary, uncalibrated; agreement: share of prompts where circuit and model
        prefer the same answer.
        completeness_loss: of the full model with only the circuit ablated; random_ablation_loss: the same for random
        circuits with as many units in each group, mean and standard deviation over `random_sets`.
        random_circuit_loss: such circuits alone, calibrated.
        full_model_loss, full_model_accuracy: uncalibrated; full_model_loss_calibrated: on the circuit's own terms.
    """
    space, ablation, config = problem.space, problem.ablation, problem.config
    fitted = problem.data.take(slice(0, len(heldout)))
    full_logits = full_model_logits(space.model, heldout)
    alone = space.logits(heldout, cut.kept, ablation)
    without = space.logits(heldout, complement(space.everything, cut.kept), ablation)
    full_calibration = calibrate(full_model_logits(space.model, fitted), fitted)
    loss, accuracy = task_score(alone, heldout, cut.calibration)
    full_loss, full_accuracy = task_score(full_logits, heldout)
    same = (cut.calibration(alone, heldout) > 0) == (Calibration()(full_logits, heldout) > 0)
    return {
        "graph": space.kind,
        "units": space.units,
        "size": config.size,
        "task_loss": loss,
        "task_loss_se": _standard_error(task_losses(cut.calibration(alone, heldout))),
        "task_accuracy": accuracy,
        "n_prompts": len(heldout),
        "task_loss_uncalibrated": task_score(alone, heldout)[0],
        **sizes(space, cut.kept),
        "n_dangling": n_units(cut.kept) - n_units(space.connected(cut.kept)),
        **faithfulness(problem, heldout, alone, full_logits),
        "kl": kl_divergence(full_logits, alone),
        "agreement": same.float().mean().item(),
        "completeness_loss": task_score(without, heldout)[0],
        **_random_controls(problem, heldout, fitted, cut.kept),
        "full_model_loss": full_loss,
        "full_model_accuracy": full_accuracy,
        "full_model_loss_calibrated": task_score(full_logits, heldout, full_calibration)[0],
        "target_loss": config.target_loss,
        "train_loss": cut.loss,
        "chance_loss": CHANCE,
    }


def _random_controls(problem: Problem, heldout: TaskData, fitted: TaskData, kept: Units) -> dict[str, float]:
    """What random circuits of a circuit's size do when they are ablated, and alone, calibrated on `fitted`."""
    space, ablation, config = problem.space, problem.ablation, problem.config
    generator = torch.Generator().manual_seed(config.seed)
    without, alone = [], []
    for random in [random_like(space.everything, kept, generator) for _ in range(config.random_sets)]:
        without.append(task_score(space.logits(heldout, complement(space.everything, random), ablation), heldout)[0])
        calibration = calibrate(space.logits(fitted, random, ablation), fitted)
        alone.append(task_score(space.logits(heldout, random, ablation), heldout, calibration)[0])
    return {
        "random_ablation_loss": statistics.fmean(without),
        "random_ablation_loss_std": statistics.pstdev(without),
        "random_circuit_loss": statistics.fmean(alone),
    }


def faithfulness(problem: Problem, heldout: TaskData, alone: Tensor, full: Tensor) -> dict[str, float | None]:
    """The circuit's logit difference, and where it lies between nothing and the full model (Mueller et al. 2025)."""
    nothing = {group: torch.zeros_like(there) for group, there in problem.space.everything.items()}
    empty = problem.space.logits(heldout, nothing, problem.ablation)
    ours, low, high = (Calibration()(logits, heldout).mean().item() for logits in (alone, empty, full))
    return {
        "logit_difference": ours,
        "full_model_logit_difference": high,
        "faithfulness": (ours - low) / (high - low) if high != low else None,
    }


def size_curve(problem: Problem, heldout: TaskData, scores: EdgeSet) -> dict[str, Any]:
    """Faithfulness of circuits of many sizes, cut from one ranking as the circuit is, by the logit difference.

    Returns:
        shares of the edges; sizes, faithfulness of circuits by signed score, cpr; sizes_by_magnitude,
        faithfulness_by_magnitude, cmd. Nothing where the logit difference
        does not tell the model from one without edges.

    Source: Mueller et al. 2025.
    """
    graph, choose = problem.space.of, problem.space.top
    prompts = list(batches(graph, heldout, problem.ablation))
    try:
        signed = curve(graph, prompts, scores, logit_difference, choose=choose)
        magnitudes = {group: score.abs() for group, score in scores.items()}
        absolute = curve(graph, prompts, magnitudes, logit_difference, choose=choose)
    except ValueError as error:
        log.warning("no curve of sizes: %s", error)
        return {}
    return {
        "shares": list(signed.shares), "sizes": list(signed.sizes), "faithfulness": list(signed.faithfulness),
        "cpr": signed.area,
        "sizes_by_magnitude": list(absolute.sizes), "faithfulness_by_magnitude": list(absolute.faithfulness),
        "cmd": absolute.distance,
    }  # fmt: skip


def sizes(space: Space, kept: Units) -> dict[str, int]:
    """How many nodes and edges a circuit has."""
    return {"n_nodes": n_units(space.nodes(kept)), "n_edges": n_units(space.edges(kept))}


def _standard_error(losses: Tensor) -> float:
    return (losses.std() / len(losses) ** 0.5).item()


def nonsense_control(problem: Problem, heldout: TaskData, method: Method, tokenizer: Tokenizer) -> dict[str, Any]:
    """The control of Drori 2026: how small a circuit the same search finds for answers that mean nothing."""
    train, heldout = nonsense((problem.data, heldout), tokenizer, problem.config.seed)
    options = dataclasses.replace(problem.config.node_masks, search_trials=0)
    config = dataclasses.replace(problem.config, node_masks=options)
    space, ablation = problem.space, problem.ablation
    cut, _, _ = find(dataclasses.replace(problem, data=train, config=config), method)
    loss, accuracy = task_score(space.logits(heldout, cut.kept, ablation), heldout, cut.calibration)
    answers = [tokenizer.decode([t]) for t in (int(train.correct[0]), int(train.wrong[0]))]
    return {
        "answers": answers,
        "reached": cut.reached and cut.loss <= config.target_loss,
        "task_loss": loss,
        "task_accuracy": accuracy,
        **sizes(space, cut.kept),
        "full_model_loss": task_score(full_model_logits(space.model, heldout), heldout)[0],
    }


def full_model_logits(model: Transformer, data: TaskData) -> Tensor:
    """Logits (N, V) after each prompt of the whole model."""
    return all_answer_logits(model, data, full(model), Ablation("zero", {}))


@dataclass(frozen=True)
class TaskScore:
    """How a full model does a task; `loss` is None, with the reason, where its tokenizer cannot express it.

    Attributes:
        loss, accuracy: on held-out prompts, from the logits as they are.
        calibrated_loss: with a scale and shift fitted on training prompts, as for circuits.
        pair_accuracy: share of pairs whose positive answer is likelier after the positive prompt than after the
            negative one; it shows that a model tells the two apart even where it prefers one answer throughout.
    """

    name: str
    loss: float | None
    accuracy: float = 0.0
    calibrated_loss: float = 0.0
    pair_accuracy: float = 0.0
    examples: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    reason: str = ""


def score_tasks(
    run: str | Path, n_pairs: int = 128, device: str = "cpu", names: list[str] | None = None
) -> Iterator[TaskScore]:
    """How well a run's full model does each task (all built-in ones, or those named) on held-out prompts."""
    model, tokenizer, config = checkpoint.load_run(run, device)
    multiply_nonzeros_(model, BATCH * config.model.n_ctx)
    for name in names or TASKS:
        try:
            train, heldout = (
                encode_task(load_task(name), tokenizer, n_pairs, split, 0, config.model.n_ctx).to(device)
                for split in ("train", "heldout")
            )
        except TaskError as error:
            yield TaskScore(name, None, reason=error.reason)
            continue
        examples = [(p, tokenizer.decode([int(t)])) for p, t in zip(heldout.prompts[:2], heldout.correct, strict=False)]
        logits = full_model_logits(model, heldout)
        calibration = calibrate(full_model_logits(model, train), train)
        pairs = Calibration()(logits, heldout).view(-1, 2).sum(1)  # the shift between the two answers cancels out
        yield TaskScore(
            name, *task_score(logits, heldout), task_score(logits, heldout, calibration)[0],
            (pairs > 0).float().mean().item(), examples,
        )  # fmt: skip
