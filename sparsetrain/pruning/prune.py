"""The prune stage: rank nodes, cut at the target loss, clean up, measure on held-out prompts, save.

run -> Transformer, tokenizer -> task prompts -> masks -> node set -> Circuit -> runs/<name>/circuits/<task>/<method>/
"""

import dataclasses
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sparsetrain import checkpoint
from sparsetrain.config import ConfigError, RunConfig
from sparsetrain.data import evaluation_batches
from sparsetrain.files import make_folder, write_json
from sparsetrain.machine import peak_bytes, reset_peak
from sparsetrain.model import Transformer
from sparsetrain.prune_config import PruneConfig
from sparsetrain.pruning.ablation import BATCH, OF_CORPUS, Ablation, build_ablation, refuse_without_corpus
from sparsetrain.pruning.alternatives import Alternatives, alternatives
from sparsetrain.pruning.channel_edges import ChannelGraph
from sparsetrain.pruning.circuit import Circuit, Edge, list_edges, save_circuit
from sparsetrain.pruning.component_graph import ComponentGraph
from sparsetrain.pruning.cut import ORDER_PROMPTS, Cut, Problem, effects, find
from sparsetrain.pruning.edges import EdgeSet, batches, edge_names, fingerprint, mean_metric, weights_hash
from sparsetrain.pruning.evaluate import calibrate, task_losses, task_score
from sparsetrain.pruning.graph import wires
from sparsetrain.pruning.measures import full_model_logits, measure, nonsense_control, size_curve
from sparsetrain.pruning.methods import METHODS
from sparsetrain.pruning.mib import mib_json
from sparsetrain.pruning.objective import FLAT, METRICS, Extremes, refuse_flat
from sparsetrain.pruning.space import EdgeSpace, NodeSpace, Space, Unit, Units, n_units
from sparsetrain.sparsity import multiply_nonzeros_
from sparsetrain.tasks import Task, TaskData, encode_task, load_task

T = TypeVar("T")

log = logging.getLogger(__name__)

ALTERNATIVE_TOLERANCE = 0.05  # nats that the loss may rise in another minimal circuit
SPARSE = 0.5  # with a smaller share of nonzero weights a model's own graph is that of its channels


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
    _refuse(run, config, method)
    chosen = load_task(task)
    problem, heldout, tokenizer = _problem(run, chosen, config, method, device, at)
    folder = circuit_folder(run, chosen.name, config.name or method, at)
    unfinished = folder.with_name(f".{folder.name}-unfinished")
    # A search with other settings begins anew.
    state = unfinished / _digest(method, config, fingerprint(problem.space.model, problem.data))
    goes_on = state.exists() and any(state.iterdir())
    make_folder(state)
    _tell_of_another(folder, config)
    problem = dataclasses.replace(problem, state=state)
    (cut, ranking, used), cost = _at_cost(torch.device(device), lambda: find(problem, METHODS[method]))
    if goes_on:
        cost["seconds"] = None
    if cut.reached:
        problem = dataclasses.replace(problem, config=used, state=None)
        settings = {"run": run.name, "task": _task_reference(task), "cost": cost}
        answer = _save_measured(folder, chosen.name, method, problem, heldout, tokenizer, cut, ranking, settings)
        newest = {"task": answer.task, "method": method, **answer.measures}
    else:
        answer = _save_unreached(folder, chosen.name, problem, heldout, cut)
        newest = dataclasses.asdict(answer)
    shutil.rmtree(unfinished)
    if at is None:
        _summarise(run, newest)
    return answer


def _tell_of_another(folder: Path, config: PruneConfig) -> None:
    """A circuit of other settings is replaced once one is found with these."""
    file = folder / "circuit.json"
    try:
        before = dict(json.loads(file.read_text())["settings"]["prune"])
    except (OSError, ValueError, LookupError, TypeError):
        return
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    if differing := [key for key in now if before.get(key) != now[key]]:
        log.warning(
            "the circuit in %s, found with other settings (%s), will be replaced by what is found; name=... keeps both",
            folder, ", ".join(f"{key} was {before.get(key)}" for key in differing),
        )  # fmt: skip


def _problem(
    run: Path, task: Task, config: PruneConfig, method: str, device: str, at: Path | None
) -> tuple[Problem, TaskData, Tokenizer]:
    """What is searched, the held-out prompts, and the run's tokenizer."""
    model, tokenizer, run_config = checkpoint.load_run(run, device, at)
    model.requires_grad_(False)
    train, heldout = (
        encode_task(
            task, tokenizer, n, split, config.seed, run_config.model.n_ctx, aligned=config.ablation == "corrupted"
        ).to(device)
        for split, n in (("train", config.train_pairs), ("heldout", config.heldout_pairs))
    )
    log.info("task %s: %d prompts to learn on, %d held out", task.name, len(train), len(heldout))
    space = make_space(model, config, method)
    if isinstance(space, NodeSpace):  # edges are masked in the dense weight
        multiply_nonzeros_(model, BATCH * train.tokens.shape[1])
    return Problem(space, train, _ablation(space, run, run_config, config, train), config), heldout, tokenizer


def _save_measured(
    folder: Path, task: str, method: str, problem: Problem, heldout: TaskData, tokenizer: Tokenizer, cut: Cut,
    ranking: dict[str, Tensor], settings: dict[str, Any],
) -> Circuit:  # fmt: skip
    """Measure a circuit on held-out prompts, beside its controls, and save it."""
    space, config = problem.space, problem.config
    log.info("measuring %d %s on held-out prompts", n_units(cut.kept), space.units)
    measures, found = _measured(problem, heldout, cut, ranking, method)
    if config.nonsense:
        log.info("the same search for nonsense answers")
        measures["nonsense"] = nonsense_control(problem, heldout, METHODS[method], tokenizer)
    effects = {space.name(unit): rise for unit, rise in unit_effects(problem, heldout, cut).items()}
    settings = {"prune": dataclasses.asdict(config), "model": weights_hash(space.model), **settings}
    circuit = Circuit(
        task, method, space.kind, space.nodes(cut.kept), circuit_edges(space, cut.kept, ranking), problem.ablation,
        cut.calibration, ranking, effects, measures, settings,
    )  # fmt: skip
    save_circuit(folder, circuit)
    _save_extras(folder, space, cut.kept, ranking, found)
    return circuit


def _save_unreached(folder: Path, task: str, problem: Problem, heldout: TaskData, cut: Cut) -> Unreached:
    config, model = problem.config, problem.space.model
    full_logits = full_model_logits(model, heldout)
    calibration = calibrate(full_model_logits(model, problem.data), problem.data)
    full_loss = task_score(full_logits, heldout, calibration)[0]
    answer = Unreached(task, cut.loss, config.target_loss, full_loss, _why(cut, full_loss, config))
    folder.mkdir(parents=True, exist_ok=True)  # a circuit found earlier, with other settings, stays
    write_json(folder / "unreached.json", dataclasses.asdict(answer))
    return answer


def _digest(*what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


def _at_cost(device: torch.device, search: Callable[[], T]) -> tuple[T, dict[str, float | None]]:
    """What a search finds, with its seconds, and the most memory of the process in that time where that can be told."""
    known = reset_peak(device)
    started = time.perf_counter()
    found = search()
    return found, {
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak_bytes(device) if known else None,
    }


def _refuse(run: Path, config: PruneConfig, method: str) -> None:
    """Raise for what can be told before a model is read."""
    refuse_without_corpus(run, config.ablation)
    if method == "attribution" and config.attribution.estimator == "eap" and METRICS[config.metric] in FLAT:
        refuse_flat(METRICS[config.metric])
    if config.name is not None and Path(config.name).name != config.name:
        raise ConfigError(f"name must be a folder's name without a path, got {config.name!r}")
    if method not in METHODS:
        raise ConfigError(
            f"method must be one of {', '.join(METHODS)} (or, at the command line, probing), got {method!r}"
        )
    if method == "node_masks" and config.graph == "component":
        raise ConfigError(
            "graph must be channel with node_masks, got component; attribution, edge_masks, topk_masks and acdc take it"
        )
    if config.node_masks.search_trials and method != "node_masks":
        raise ConfigError(
            f"node_masks.search_trials must be 0 with another method, got {config.node_masks.search_trials} with "
            f"{method}; the search is over settings of node_masks"
        )


def _ablation(space: Space, run: Path, run_config: RunConfig, config: PruneConfig, train: TaskData) -> Ablation:
    """What replaces the rest; the run's corpus is read by the ablations alone that ask for it."""
    device = train.tokens.device
    reads_corpus = config.ablation in OF_CORPUS
    corpus = corpus_tokens(run, run_config, config.reference_tokens, device) if reads_corpus else []
    return build_ablation(space.read, config.ablation, corpus, train)


def _measured(
    problem: Problem, heldout: TaskData, cut: Cut, ranking: dict[str, Tensor], method: str
) -> tuple[dict[str, Any], Alternatives | None]:
    """The measures of a circuit; for edges with the curve of its ranking, and the other circuits near it."""
    measures = measure(problem, heldout, cut)
    if not isinstance(problem.space, EdgeSpace):
        return measures, None
    measures["curve"] = size_curve(problem, heldout, ranking)
    if not problem.config.alternative_runs or not n_units(cut.kept):
        return measures, None
    found = look_for_alternatives(problem, cut, METHODS[method].worth(ranking))
    counts = {"n": len(found.circuits), "n_needed": n_units(found.needed), "complete": found.complete}
    return measures | {"alternatives": counts}, found


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
    greedy = config.select == "greedy"
    if kind == "channel":
        if greedy:
            raise ConfigError("select=greedy must go with graph=component, got the channel graph; take select=top")
        return EdgeSpace(ChannelGraph(model))
    try:
        return EdgeSpace(ComponentGraph(model, config.split_embedding), greedy)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def circuit_edges(space: Space, kept: Units, ranking: dict[str, Tensor]) -> list[Edge]:
    """The edges of a circuit, with their scores where edges were ranked."""
    if isinstance(space, EdgeSpace):
        return list_edges(space.of, kept, ranking)
    return list_edges(ChannelGraph(space.model), space.edges(kept))


def look_for_alternatives(problem: Problem, cut: Cut, ranking: EdgeSet) -> Alternatives:
    """Other minimal circuits among the edges of a circuit and as many of the next best, on some of its prompts.

    OR-like redundancy shows here: of two branches that each suffice a circuit has one. They do as well as the circuit,
    to ALTERNATIVE_TOLERANCE of the loss that it was cut at: with its calibration, without which a model that prefers
    one answer throughout loses nothing when all is cut.
    """
    space, config = problem.space, problem.config
    near = space.top(ranking, 2 * n_units(cut.kept))
    edges = {group: kept | cut.kept[group] for group, kept in near.items()}
    some = problem.data.take(slice(0, ORDER_PROMPTS))
    prompts = list(batches(space.of, some, problem.ablation))

    def metric(outputs: Tensor, data: TaskData, extremes: Extremes) -> Tensor:
        return -task_losses(cut.calibration(outputs, data))

    better = mean_metric(space.of, prompts, edges, metric) - mean_metric(space.of, prompts, cut.kept, metric)
    log.info("looking for alternatives, %d runs at most", config.alternative_runs)
    tolerance = ALTERNATIVE_TOLERANCE + max(0.0, better)
    return alternatives(space.of, prompts, metric, edges, tolerance, config.alternative_runs)


def _save_extras(folder: Path, space: Space, kept: Units, ranking: EdgeSet, found: Alternatives | None) -> None:
    """What other tools and readers may want of a circuit of edges: alternatives.json and mib.json."""
    if not isinstance(space, EdgeSpace):
        return
    if found is not None:
        named = [[f"{a}->{b}" for a, b in edge_names(space.of, edges)] for edges in (found.needed, *found.circuits)]
        write_json(
            folder / "alternatives.json", {"complete": found.complete, "needed": named[0], "circuits": named[1:]}
        )
    if isinstance(space.of, ComponentGraph) and not space.of.split_embedding:
        write_json(folder / "mib.json", mib_json(space.of, ranking, kept))


def unit_effects(problem: Problem, heldout: TaskData, cut: Cut) -> dict[Unit, float]:
    """The rise of the held-out loss without each unit; of edges on fewer prompts, and of very many not at all."""
    if n_units(cut.kept) > problem.config.effect_units:
        log.info("%d %s are too many to measure one by one (effect_units)", n_units(cut.kept), problem.space.units)
        return {}
    few = heldout if isinstance(problem.space, NodeSpace) else heldout.take(slice(0, ORDER_PROMPTS))
    return effects(dataclasses.replace(problem, data=few), cut.kept, cut.calibration)


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
    return str(Path(task).resolve()) if Path(task).suffix == ".jsonl" else task


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
