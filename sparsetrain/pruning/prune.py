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
from tqdm import tqdm

from sparsetrain import checkpoint
from sparsetrain.config import ConfigError, PruneConfig, RunConfig
from sparsetrain.data import evaluation_batches
from sparsetrain.files import write_json
from sparsetrain.model import Transformer
from sparsetrain.pruning import attribution, node_masks
from sparsetrain.pruning.ablation import build_ablation
from sparsetrain.pruning.channel_edges import ChannelGraph
from sparsetrain.pruning.circuit import Circuit, Edge, list_edges, save_circuit
from sparsetrain.pruning.component_graph import ComponentGraph
from sparsetrain.pruning.cut import ORDER_PROMPTS, Cut, Method, Problem, effects, find
from sparsetrain.pruning.evaluate import calibrate, task_score
from sparsetrain.pruning.graph import wires
from sparsetrain.pruning.measures import full_model_logits, measure, nonsense_control
from sparsetrain.pruning.objective import METRICS
from sparsetrain.pruning.space import EdgeSpace, NodeSpace, Space, Unit, Units, n_units
from sparsetrain.tasks import TASKS, TaskData, encode_task, load_task

log = logging.getLogger(__name__)

SPARSE = 0.5  # with a smaller share of nonzero weights a model's own graph is that of its channels


def _node_masks(problem: Problem) -> dict[str, Tensor]:
    config = problem.config
    log.info("learning masks, %d steps", config.node_masks.steps)
    return node_masks.rank_nodes(
        problem.space.model, problem.data, problem.ablation, config.node_masks, config.tie_qk, config.seed
    )


def _attribution(problem: Problem) -> dict[str, Tensor]:
    config = problem.config
    log.info("scoring %d edges by %s", n_units(problem.space.everything), config.attribution.estimator)
    return attribution.rank(
        problem.space.of, problem.data, problem.ablation, METRICS[config.metric], config.attribution
    )


METHODS = {"node_masks": Method(_node_masks), "attribution": Method(_attribution, by_magnitude=True)}


@dataclass(frozen=True)
class Unreached:
    """The answer when no node set reaches the target: the best loss found, and why that may be."""

    task: str
    best_loss: float
    target_loss: float
    full_model_loss: float
    why: str


def prune(
    run: str | Path,
    task: str,
    config: PruneConfig,
    method: str = "node_masks",
    device: str = "cpu",
    at: Path | None = None,
) -> Circuit | Unreached:
    """Find, measure and save the circuit of a task.

    Args:
        run: a run directory.
        task: a built-in task's name, or a JSON-lines file.
        config: see PruneConfig.
        method: one of METHODS.
        device: where to compute.
        at: a checkpoint of the run, in place of its model.

    Returns:
        The circuit, saved in its `circuit_folder`, or Unreached, saved there as unreached.json.

    Raises:
        ConfigError: the method is unknown, or the settings do not suit the model.
        TaskError: the task is unknown, its answers are not single tokens of the run's tokenizer, or the ablation needs
            what there is not.
        CheckpointError: the run holds no readable model.
        WriteError: a result could not be written.
    """
    run = Path(run)
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    model, tokenizer, run_config = checkpoint.load_run(run, device, at)
    model.requires_grad_(False)
    chosen = load_task(task)
    train, heldout = (
        encode_task(
            chosen, tokenizer, n, split, config.seed, run_config.model.n_ctx, aligned=config.ablation == "corrupted"
        ).to(device)
        for split, n in (("train", config.train_pairs), ("heldout", config.heldout_pairs))
    )
    log.info("task %s: %d prompts to learn on, %d held out", chosen.name, len(train), len(heldout))
    space = make_space(model, config, method)
    needs_corpus = config.ablation in ("mean_data", "resample")
    corpus = corpus_tokens(run, run_config, config.reference_tokens, device) if needs_corpus else []
    ablation = build_ablation(space.read, config.ablation, corpus, train)
    problem = Problem(space, train, ablation, config)
    cut, ranking, used = find(problem, METHODS[method])
    folder = circuit_folder(run, chosen.name, config.name or method, at)
    if not cut.reached:
        answer = _unreached(chosen.name, folder, problem, heldout, cut)
        if at is None:
            _summarise(run, {"task": answer.task, **dataclasses.asdict(answer)})
        return answer
    log.info("measuring %d %s on held-out prompts", n_units(cut.kept), space.units)
    measures = measure(problem, heldout, cut)
    if config.nonsense:
        log.info("the same search for nonsense answers")
        problem = dataclasses.replace(problem, config=used)
        measures["nonsense"] = nonsense_control(problem, heldout, METHODS[method], tokenizer)
    effects = {space.name(unit): rise for unit, rise in unit_effects(problem, heldout, cut).items()}
    settings = {"prune": dataclasses.asdict(used), "run": run.name, "task": _task_reference(task)}
    circuit = Circuit(
        chosen.name, method, space.kind, space.nodes(cut.kept), circuit_edges(space, cut.kept, ranking), ablation,
        cut.calibration, ranking, effects, measures, settings,
    )  # fmt: skip
    save_circuit(folder, circuit)
    if at is None:
        _summarise(run, {"task": circuit.task, "method": method, **circuit.measures})
    return circuit


def circuit_folder(run: Path, task: str, name: str, at: Path | None = None) -> Path:
    """Where a circuit of a run is kept, or that of one of its checkpoints."""
    folder = run / "circuits" / task
    return folder / name if at is None else folder / f"{name}-checkpoints" / at.name


def make_space(model: Transformer, config: PruneConfig, method: str) -> Space:
    """What circuits are cut out of: nodes for `node_masks`, edges of the graph that the config names for the others.

    Raises:
        ConfigError: the graph does not suit the model.
    """
    if method == "node_masks":
        return NodeSpace(model, config.tie_qk)
    kind = config.graph
    if kind == "auto":
        weights = [wire.weight for wire in wires(model)]
        share = sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        kind = "channel" if share < SPARSE else "component"
    if kind == "channel":
        return EdgeSpace(ChannelGraph(model))
    try:
        return EdgeSpace(ComponentGraph(model, config.split_embedding))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def circuit_edges(space: Space, kept: Units, ranking: dict[str, Tensor]) -> list[Edge]:
    """The edges of a circuit, with their scores where edges were ranked."""
    if isinstance(space, EdgeSpace):
        return list_edges(space.of, kept, ranking)
    return list_edges(ChannelGraph(space.model), space.edges(kept))


def unit_effects(problem: Problem, heldout: TaskData, cut: Cut) -> dict[Unit, float]:
    """The rise of the held-out loss without each unit; of edges on fewer prompts, since there are many."""
    few = heldout if isinstance(problem.space, NodeSpace) else heldout.take(slice(0, ORDER_PROMPTS))
    with tqdm(desc="effects", unit=" units", total=n_units(cut.kept), disable=None) as progress:
        return effects(dataclasses.replace(problem, data=few), cut, progress.update)


def corpus_tokens(run: Path, config: RunConfig, n_tokens: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Batches of a run's training tokens that ablation means are taken over, spread over the corpus."""
    n_windows = max(1, n_tokens // config.model.n_ctx)
    tokens = checkpoint.run_corpus(run, config).tokens("train")
    return [x.to(device) for x, _ in evaluation_batches(tokens, -(-n_windows // 32), 32, config.model.n_ctx)]


def _unreached(task: str, folder: Path, problem: Problem, heldout: TaskData, cut: Cut) -> Unreached:
    config, model = problem.config, problem.space.model
    full_logits = full_model_logits(model, heldout)
    calibration = calibrate(full_model_logits(model, problem.data), problem.data)
    full_loss = task_score(full_logits, heldout, calibration)[0]
    answer = Unreached(task, cut.loss, config.target_loss, full_loss, _why(cut, full_loss, config))
    folder.mkdir(parents=True, exist_ok=True)  # a circuit found earlier, with other settings, stays
    write_json(folder / "unreached.json", dataclasses.asdict(answer))
    return answer


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
        f"{cut.loss:.3f} under {config.ablation} ablation; try other settings of the method (more steps, say), another "
        "method, or another ablation"
    )
