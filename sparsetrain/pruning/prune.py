"""The prune stage: rank nodes, cut at the target loss, clean up, measure on held-out prompts, save.

run -> Transformer, tokenizer -> task prompts -> masks -> node set -> Circuit -> runs/<name>/circuits/<task>/<method>/
"""

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsetrain import checkpoint
from sparsetrain.config import PruneConfig, RunConfig
from sparsetrain.data import evaluation_batches
from sparsetrain.files import write_json
from sparsetrain.pruning.ablation import build_ablation, site_reader
from sparsetrain.pruning.circuit import Circuit, edges_between, save_circuit
from sparsetrain.pruning.cut import Cut, find
from sparsetrain.pruning.evaluate import calibrate, node_effects, task_score
from sparsetrain.pruning.graph import n_nodes, node_sites
from sparsetrain.pruning.measures import full_model_logits, measure, nonsense_control
from sparsetrain.tasks import TASKS, encode_task, load_task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unreached:
    """The answer when no node set reaches the target: the best loss found, and why that may be."""

    task: str
    best_loss: float
    target_loss: float
    full_model_loss: float
    why: str


def prune(
    run: str | Path, task: str, config: PruneConfig, method: str = "node_masks", device: str = "cpu"
) -> Circuit | Unreached:
    """Find, measure and save the circuit of a task.

    Args:
        run: a run directory.
        task: a built-in task's name, or a JSON-lines file.
        config: see PruneConfig.
        method: one of METHODS.
        device: where to compute.

    Returns:
        The circuit, saved under `run`/circuits/<task>/<method>/, or Unreached, saved there as unreached.json.

    Raises:
        TaskError: the task is unknown, or its answers are not single tokens of the run's tokenizer.
        CheckpointError: the run holds no readable model.
        WriteError: a result could not be written.
    """
    run = Path(run)
    model, tokenizer, run_config = checkpoint.load_run(run, device)
    chosen = load_task(task)
    train, heldout = (
        encode_task(chosen, tokenizer, n, split, config.seed, run_config.model.n_ctx).to(device)
        for split, n in (("train", config.train_pairs), ("heldout", config.heldout_pairs))
    )
    log.info("task %s: %d prompts to learn on, %d held out", chosen.name, len(train), len(heldout))
    read = site_reader(model, node_sites(model.options))
    ablation = build_ablation(
        read, config.ablation, corpus_tokens(run, run_config, config.reference_tokens, device), train
    )
    cut, used = find(model, train, ablation, config, method)
    folder = run / "circuits" / chosen.name / method
    full_logits = full_model_logits(model, heldout)
    full_loss = task_score(full_logits, heldout, calibrate(full_model_logits(model, train), train))[0]
    if not cut.reached:
        answer = Unreached(chosen.name, cut.loss, config.target_loss, full_loss, _why(cut, full_loss, config))
        folder.mkdir(parents=True, exist_ok=True)  # a circuit found earlier, with other settings, stays
        write_json(folder / "unreached.json", dataclasses.asdict(answer))
        _summarise(run, {"task": chosen.name, **dataclasses.asdict(answer)})
        return answer
    log.info("measuring %d nodes on held-out prompts", n_nodes(cut.nodes))
    measures = measure(model, (train, heldout), cut, ablation, config)
    if config.nonsense:
        log.info("the same search for nonsense answers")
        measures["nonsense"] = nonsense_control(model, tokenizer, (train, heldout), ablation, used, method)
    effects = node_effects(model, heldout, cut.nodes, ablation, cut.calibration)
    circuit = Circuit(
        chosen.name, method, cut.nodes, edges_between(model, cut.nodes), ablation, cut.calibration,
        {f"{site}:{channel}": e for (site, channel), e in effects.items()}, measures,
        {"prune": dataclasses.asdict(used), "run": run.name, "task": _task_reference(task)},
    )  # fmt: skip
    save_circuit(folder, circuit)
    _summarise(run, {"task": circuit.task, **circuit.measures})
    return circuit


def corpus_tokens(run: Path, config: RunConfig, n_tokens: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Batches of a run's training tokens that ablation means are taken over, spread over the corpus."""
    n_windows = max(1, n_tokens // config.model.n_ctx)
    tokens = checkpoint.run_corpus(run, config).tokens("train")
    return [x.to(device) for x, _ in evaluation_batches(tokens, -(-n_windows // 32), 32, config.model.n_ctx)]


def _summarise(run: Path, newest: dict[str, Any]) -> None:
    """Put the newest circuit's numbers, or why there is none, into the run's summary."""
    file = run / "summary.json"
    summary = json.loads(file.read_text()) if file.exists() else {}
    summary["circuit"] = newest
    write_json(file, summary)


def _task_reference(task: str) -> str:
    """What finds the task again from anywhere: its name, or its file's whole path."""
    return task if task in TASKS else str(Path(task).resolve())


def _why(cut: Cut, full_loss: float, config: PruneConfig) -> str:
    if full_loss > config.target_loss:
        return (
            f"the full model itself, calibrated alike, has a held-out loss of {full_loss:.3f}, above the target of "
            f"{config.target_loss} (chance is 0.693); train longer, prune another task, or raise target_loss"
        )
    return (
        f"the full model does the task (calibrated loss {full_loss:.3f}) but no size of circuit came below "
        f"{cut.loss:.3f} under {config.ablation} ablation; try more steps, another count_penalty, or search_trials"
    )
