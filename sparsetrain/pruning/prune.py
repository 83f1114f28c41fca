"""The prune stage: rank nodes, cut at the target loss, clean up, measure on held-out prompts, save.

run -> Transformer, tokenizer -> task prompts -> masks -> node set -> Circuit -> runs/<name>/circuits/<task>/<method>/
"""

import dataclasses
import json
import logging
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from sparsetrain import checkpoint
from sparsetrain.config import ConfigError, PruneConfig, RunConfig
from sparsetrain.data import evaluation_batches
from sparsetrain.model import Transformer
from sparsetrain.pruning import node_masks
from sparsetrain.pruning.circuit import Circuit, edges_between, save_circuit
from sparsetrain.pruning.evaluate import (
    CHANCE,
    Ablation,
    Calibration,
    all_answer_logits,
    build_ablation,
    calibrate,
    kl_divergence,
    node_effects,
    random_like,
    task_score,
)
from sparsetrain.pruning.graph import NodeSet, complement, full, n_edges, n_nodes, without_dangling
from sparsetrain.tasks import TASKS, TaskData, TaskError, encode_task, load_task, nonsense

log = logging.getLogger(__name__)

METHODS = {"node_masks": node_masks.rank_nodes}


@dataclass(frozen=True)
class Cut:
    """A node set and how it does on the prompts it was chosen on."""

    nodes: NodeSet
    loss: float
    calibration: Calibration
    reached: bool


@dataclass(frozen=True)
class Unreached:
    """The answer when no node set reaches the target: the best loss found, and why that may be."""

    task: str
    best_loss: float
    target_loss: float
    full_model_loss: float
    why: str


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
        The circuit, saved under `run`/circuits/<task>/<method>/, or Unreached, saved there as metrics.json alone.

    Raises:
        TaskError: the task is unknown, or its answers are not single tokens of the run's tokenizer.
        CheckpointError: the run holds no readable model.
    """
    run = Path(run)
    model, tokenizer, run_config = checkpoint.load_run(run, device)
    chosen = load_task(task)
    train, heldout = (
        encode_task(chosen, tokenizer, n, split, config.seed, run_config.model.n_ctx).to(device)
        for split, n in (("train", config.train_pairs), ("heldout", config.heldout_pairs))
    )
    ablation = build_ablation(model, config.ablation, corpus_tokens(run, run_config, config.reference_tokens), train)
    cut, used = find(model, train, ablation, config, method)
    folder = run / "circuits" / chosen.name / method
    full_loss = task_score(full_model_logits(model, heldout), heldout)[0]
    if not cut.reached:
        answer = Unreached(chosen.name, cut.loss, config.target_loss, full_loss, _why(cut, full_loss, config))
        with checkpoint.whole_folder(folder) as unfinished:
            (unfinished / "metrics.json").write_text(json.dumps(dataclasses.asdict(answer), indent=1) + "\n")
        return answer
    measures = measure(model, heldout, cut, ablation, config)
    if config.nonsense:
        measures["nonsense"] = _nonsense(model, tokenizer, (train, heldout), ablation, used, method)
    effects = node_effects(model, heldout, cut.nodes, ablation, cut.calibration)
    circuit = Circuit(
        chosen.name, method, cut.nodes, edges_between(model, cut.nodes), ablation, cut.calibration,
        {f"{site}:{channel}": e for (site, channel), e in effects.items()}, measures,
        {"prune": dataclasses.asdict(used), "run": run.name},
    )  # fmt: skip
    save_circuit(folder, circuit)
    _summarise(run, circuit)
    return circuit


def find(
    model: Transformer, data: TaskData, ablation: Ablation, config: PruneConfig, method: str = "node_masks"
) -> tuple[Cut, PruneConfig]:
    """The smallest node set found that reaches the target loss on `data`, and the settings that gave it."""
    if config.search_trials:
        return _search(model, data, ablation, config, method)
    tau = METHODS[method](model, data, ablation, config)
    cut = bisect(model, data, ablation, tau, config)
    return (clean(model, data, ablation, cut, config) if cut.reached else cut), config


def bisect(model: Transformer, data: TaskData, ablation: Ablation, tau: dict[str, Tensor], config: PruneConfig) -> Cut:
    """Cut a ranking of nodes at the size where the calibrated task loss just reaches the target.

    Source: Gao et al. 2025, A.5. The loss need not be monotone in the size: sizes are doubled until one reaches the
    target, then halved into. Where none does, the best size tried is returned, with `reached` false.
    """

    def cut(n: int) -> Cut:
        return _score(model, data, ablation, node_masks.top_nodes(tau, n, config.tie_qk), config)

    n_all = sum(len(t) for t in tau.values())
    best, low, high = cut(0), 0, 1
    while high <= n_all:
        tried = cut(high)
        if tried.loss < best.loss:
            best = tried
        if tried.reached:
            break
        low, high = high, 2 * high if high == n_all else min(2 * high, n_all)
    while best.reached and high - low > 1:
        middle = (low + high) // 2
        tried = cut(middle)
        if tried.reached:
            best, high = tried, middle
        else:
            low = middle
    return best


def clean(model: Transformer, data: TaskData, ablation: Ablation, cut: Cut, config: PruneConfig) -> Cut:
    """Drop dangling nodes, then, if asked, every node that the target does not need.

    Learnt masks leave nodes that do nothing (Gao et al. 2025, footnote 9, removed them by hand). Nodes are tried
    once each, in order of the rise in loss without them; a tied query and key channel are tried together.
    """
    cut = _without_dangling(model, data, ablation, cut, config)
    if not config.clean:
        return cut
    progress = tqdm(desc="cleaning", unit=" nodes", total=2 * n_nodes(cut.nodes), disable=None)
    some = data.take(slice(0, 64))  # enough to order them by
    effects = node_effects(model, some, cut.nodes, ablation, cut.calibration, progress.update)
    for site, channel in sorted(effects, key=effects.__getitem__):
        progress.update()
        fewer = {s: mask.clone() for s, mask in cut.nodes.items()}
        for s in _together(site, config.tie_qk):
            fewer[s][channel] = False
        tried = _score(model, data, ablation, fewer, config)
        if tried.reached:
            cut = tried
    progress.close()
    return _without_dangling(model, data, ablation, cut, config)


def measure(model: Transformer, heldout: TaskData, cut: Cut, ablation: Ablation, config: PruneConfig) -> dict[str, Any]:
    """The measures of a circuit on held-out prompts, each beside its control.

    Returns:
        task_loss, task_accuracy: of the circuit alone, calibrated (the target's terms); task_loss_uncalibrated.
        n_nodes, n_edges; kl: to the full model over the vocabulary, uncalibrated; agreement: share of prompts where
        circuit and model prefer the same answer. completeness_loss: of the full model with only the circuit ablated.
        random_ablation_loss: the same for random node sets with as many nodes at each site, mean and standard
        deviation over `random_sets`; random_circuit_loss: such sets alone, calibrated. full_model_loss and accuracy.
    """
    generator = torch.Generator().manual_seed(config.seed)
    full_logits = full_model_logits(model, heldout)
    alone = all_answer_logits(model, heldout, cut.nodes, ablation)
    without = all_answer_logits(model, heldout, complement(cut.nodes), ablation)
    randoms = [random_like(cut.nodes, generator) for _ in range(config.random_sets)]
    random_without = [
        task_score(all_answer_logits(model, heldout, complement(r), ablation), heldout)[0] for r in randoms
    ]
    random_alone = []
    for r in randoms:
        logits = all_answer_logits(model, heldout, r, ablation)
        random_alone.append(task_score(logits, heldout, calibrate(logits, heldout))[0])
    loss, accuracy = task_score(alone, heldout, cut.calibration)
    full_loss, full_accuracy = task_score(full_logits, heldout)
    same = (cut.calibration(alone, heldout) > 0) == (Calibration()(full_logits, heldout) > 0)
    return {
        "task_loss": loss,
        "task_accuracy": accuracy,
        "task_loss_uncalibrated": task_score(alone, heldout)[0],
        "n_nodes": n_nodes(cut.nodes),
        "n_edges": n_edges(model, cut.nodes),
        "kl": kl_divergence(full_logits, alone),
        "agreement": same.float().mean().item(),
        "completeness_loss": task_score(without, heldout)[0],
        "random_ablation_loss": statistics.fmean(random_without),
        "random_ablation_loss_std": statistics.pstdev(random_without),
        "random_circuit_loss": statistics.fmean(random_alone),
        "full_model_loss": full_loss,
        "full_model_accuracy": full_accuracy,
        "target_loss": config.target_loss,
        "train_loss": cut.loss,
        "chance_loss": CHANCE,
    }


def full_model_logits(model: Transformer, data: TaskData) -> Tensor:
    """Logits (N, V) after each prompt of the whole model."""
    return all_answer_logits(model, data, full(model), Ablation("zero", {}))


def score_tasks(
    run: str | Path, n_pairs: int = 128, device: str = "cpu", names: list[str] | None = None
) -> Iterator[TaskScore]:
    """How well a run's full model does each task (all built-in ones, or those named) on held-out prompts."""
    model, tokenizer, config = checkpoint.load_run(run, device)
    for name in names or TASKS:
        try:
            train, heldout = (
                encode_task(load_task(name), tokenizer, n_pairs, split, 0, config.model.n_ctx).to(device)
                for split in ("train", "heldout")
            )
        except TaskError as error:
            yield TaskScore(name, None, reason=str(error))
            continue
        examples = [(p, tokenizer.decode([int(t)])) for p, t in zip(heldout.prompts[:2], heldout.correct, strict=False)]
        logits = full_model_logits(model, heldout)
        calibration = calibrate(full_model_logits(model, train), train)
        pairs = Calibration()(logits, heldout).view(-1, 2).sum(1)  # the shift between the two answers cancels out
        yield TaskScore(
            name, *task_score(logits, heldout), task_score(logits, heldout, calibration)[0],
            (pairs > 0).float().mean().item(), examples,
        )  # fmt: skip


def corpus_tokens(run: Path, config: RunConfig, n_tokens: int) -> list[Tensor]:
    """Batches of a run's training tokens that ablation means are taken over, spread over the corpus."""
    n_windows = max(1, n_tokens // config.model.n_ctx)
    tokens = checkpoint.run_corpus(run, config).tokens("train")
    return [x for x, _ in evaluation_batches(tokens, -(-n_windows // 32), 32, config.model.n_ctx)]


def _summarise(run: Path, circuit: Circuit) -> None:
    """Name the newest circuit and its main numbers in the run's summary."""
    file = run / "summary.json"
    summary = json.loads(file.read_text()) if file.exists() else {}
    summary["circuit"] = {"task": circuit.task, **circuit.measures}
    checkpoint.write_json(file, summary)


def _score(model: Transformer, data: TaskData, ablation: Ablation, nodes: NodeSet, config: PruneConfig) -> Cut:
    logits = all_answer_logits(model, data, nodes, ablation)
    calibration = calibrate(logits, data)
    loss = task_score(logits, data, calibration)[0]
    return Cut(nodes, loss, calibration, loss <= config.target_loss)


def _without_dangling(model: Transformer, data: TaskData, ablation: Ablation, cut: Cut, config: PruneConfig) -> Cut:
    tidy = without_dangling(model, cut.nodes)
    if n_nodes(tidy) == n_nodes(cut.nodes):
        return cut
    tried = _score(model, data, ablation, tidy, config)
    return tried if tried.reached else cut


def _together(site: str, tie_qk: bool) -> list[str]:
    if tie_qk and site.rpartition(".")[2] in "qk":
        return [site[:-1] + "q", site[:-1] + "k"]
    return [site]


def _nonsense(
    model: Transformer, tokenizer: Tokenizer, data: tuple[TaskData, TaskData], ablation: Ablation,
    config: PruneConfig, method: str,
) -> dict[str, Any]:  # fmt: skip
    """The control of Drori 2026: how small a circuit the same search finds for answers that mean nothing."""
    train, heldout = (nonsense(part, tokenizer, config.seed) for part in data)
    cut, _ = find(model, train, ablation, dataclasses.replace(config, search_trials=0), method)
    loss, accuracy = task_score(all_answer_logits(model, heldout, cut.nodes, ablation), heldout, cut.calibration)
    answers = [tokenizer.decode([t]) for t in (int(train.correct[0]), int(train.wrong[0]))]
    return {
        "answers": answers,
        "reached": cut.reached,
        "task_loss": loss,
        "task_accuracy": accuracy,
        "n_nodes": n_nodes(cut.nodes),
        "n_edges": n_edges(model, cut.nodes),
        "full_model_loss": task_score(full_model_logits(model, heldout), heldout)[0],
    }


def _search(
    model: Transformer, data: TaskData, ablation: Ablation, config: PruneConfig, method: str
) -> tuple[Cut, PruneConfig]:
    """Optuna's TPE over the mask training's settings; fewest edges at the target wins, else the lowest loss."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("search_trials needs Optuna; pip install 'sparsetrain[sweep]', or search_trials=0") from None

    found: list[tuple[tuple[float, float], Cut, PruneConfig]] = []

    def objective(trial: optuna.Trial) -> float:
        tried = dataclasses.replace(
            config,
            search_trials=0,
            count_penalty=trial.suggest_float("count_penalty", 1e-6, 1e-2, log=True),
            lr=trial.suggest_float("lr", 3e-4, 1e-1, log=True),
            temperature=trial.suggest_float("temperature", 0.1, 10, log=True),
            init_mean=trial.suggest_float("init_mean", 0.0, 0.5),
            weight_decay=trial.suggest_float("weight_decay", 1e-5, 1e-1, log=True),
            beta2=1 - trial.suggest_float("inverse_beta2", 1e-3, 0.3, log=True),
        )
        cut, _ = find(model, data, ablation, tried, method)
        edges = n_edges(model, cut.nodes)
        found.append(((not cut.reached, edges if cut.reached else cut.loss), cut, tried))
        return edges if cut.reached else 1e6 * (1 + cut.loss)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=config.seed))
    centre = {"count_penalty": config.count_penalty, "lr": config.lr, "temperature": config.temperature,
              "init_mean": config.init_mean, "weight_decay": config.weight_decay,
              "inverse_beta2": 1 - config.beta2}  # fmt: skip
    study.enqueue_trial(centre)
    study.optimize(objective, n_trials=config.search_trials)
    _, cut, used = min(found, key=lambda item: item[0])
    return cut, used


def _why(cut: Cut, full_loss: float, config: PruneConfig) -> str:
    if full_loss > config.target_loss:
        return (
            f"the full model itself has a held-out loss of {full_loss:.3f}, above the target of "
            f"{config.target_loss}: it has not learnt the task; train longer, or prune another task"
        )
    return (
        f"the full model does the task (loss {full_loss:.3f}) but no size of circuit came below {cut.loss:.3f} under "
        f"{config.ablation} ablation; try more steps, another count_penalty, or search_trials"
    )
