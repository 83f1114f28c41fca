"""What the process of a job does: the public functions of training, pruning and measuring, and the result to record."""

import importlib
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from sparsetrain.config import ConfigError, DataOptions, RunConfig, config_from_dict
from sparsetrain.data import batch, prepare
from sparsetrain.kernels import ops
from sparsetrain.machine import peak_bytes
from sparsetrain.prune_config import PruneConfig
from sparsetrain.pruning.measures import score_tasks
from sparsetrain.pruning.methods import METHODS
from sparsetrain.pruning.prune import Unreached, prune
from sparsetrain.sweeping.records import Job
from sparsetrain.tasks import InexpressibleTask, load_task
from sparsetrain.threads import use_faster_count
from sparsetrain.train import Training, build, pick_device, train, train_step

EVALUATION = 1 / 3  # a batch that is evaluated, in steps of training

COPIED = (
    "n_nodes", "n_edges", "task_loss", "task_accuracy", "full_model_loss", "full_model_loss_calibrated",
    "completeness_loss", "random_ablation_loss", "random_ablation_loss_std", "random_circuit_loss", "kl",
    "faithfulness", "n_dangling", "graph", "target_loss", "size",
)  # fmt: skip
COLUMNS = {
    "sweep", "point", "arm", "values", "seed", "windows", "n_layers", "n_params", "n_nonzero", "val_loss", "tokens",
    "train_seconds", "train_peak_bytes", "task", "method", "circuit", "reached", "why", "nonsense",
    "discovery_seconds", "discovery_peak_bytes", "error", *COPIED,
}  # fmt: skip


def run_stage(job: Job) -> dict[str, Any]:
    """Do a job and return its result, plain values by name."""
    return STAGES[job.stage](job)


def _check(job: Job) -> dict[str, Any]:
    """Look at all that can be wrong before any run begins, and prepare the corpora."""
    if job.order["method"] not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {job.order['method']!r}")
    for task in job.order["tasks"]:
        load_task(task)
    for measure in job.order["measures"]:
        _function(measure)
    for data in job.order["data"]:
        prepare(config_from_dict(DataOptions, data))
    return {}


def _train(job: Job) -> dict[str, Any]:
    config = config_from_dict(RunConfig, job.order["config"])
    was_done = (config.run_dir / "model").is_dir()
    summary = json.loads((train(config) / "summary.json").read_text())
    result = {key: summary[key] for key in ("val_loss", "n_nonzero", "tokens")}
    return {
        **result,
        "n_layers": config.model.n_layers,
        "n_params": round(summary["n_nonzero"] / summary["density"]),
        "train_seconds": summary["seconds"],
        "train_peak_bytes": None if was_done else peak_bytes(pick_device(config.run.device)),
    }


def _abilities(job: Job) -> dict[str, Any]:
    scores = score_tasks(job.folder, job.order["pairs"], _device(job), job.order["tasks"])
    return {
        s.name: {"loss": s.loss, "calibrated_loss": s.calibrated_loss, "accuracy": s.accuracy, "reason": s.reason}
        for s in scores
    }


def _prune(job: Job) -> dict[str, Any]:
    config = config_from_dict(PruneConfig, job.order["prune"])
    try:
        found = prune(job.folder, job.order["task"], config, job.order["method"], _device(job))
    except InexpressibleTask as error:
        return {"reached": False, "full_model_loss_calibrated": None, "why": error.reason}
    if isinstance(found, Unreached):
        return {
            "reached": False, "task_loss": found.best_loss, "full_model_loss_calibrated": found.full_model_loss,
            "why": found.why,
        }  # fmt: skip
    measures, cost = found.measures, found.settings["cost"]
    return {
        "reached": True,
        **{key: measures[key] for key in COPIED},
        "nonsense": measures.get("nonsense"),
        "discovery_seconds": cost["seconds"] and round(cost["seconds"], 2),
        "discovery_peak_bytes": cost["peak_bytes"],
    }


def _measure(job: Job) -> dict[str, Any]:
    name = job.order["measure"]
    found = _function(name)(job.folder)
    plain = isinstance(found, dict) and all(isinstance(x, (int, float, str, NoneType)) for x in found.values())
    if not plain or not all(math.isfinite(x) for x in found.values() if isinstance(x, float)):
        raise ConfigError(f"{name} must give finite numbers (or text, or None) by name, got {found!r:.100}")
    if taken := COLUMNS & found.keys():
        raise ConfigError(f"{name} must give numbers names of their own, got {', '.join(sorted(taken))}, as rows have")
    return found


def _function(measure: str) -> Callable[[Path], dict[str, Any]]:
    module, name = measure.split(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"measures must be MODULE:FUNCTION that can be imported, got {measure}: {error}") from None


def _device(job: Job) -> torch.device:
    """Where to compute, and with as many threads as the run's config says."""
    config = config_from_dict(RunConfig, job.order["config"])
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    else:
        use_faster_count()
    return pick_device(config.run.device)


def _calibrate(job: Job) -> dict[str, Any]:
    """How long a run would take: from a few of its first steps, which are dense, and a few as at its end."""
    config = config_from_dict(RunConfig, job.order["config"])
    device = torch.device(_device(job))
    with ops.using(config.run.kernels):
        run = build(config, prepare(config.data), device)
        steps = job.order["steps"]
        first, last = (_step_seconds(run, at, steps) for at in (0, max(0, config.train.steps - steps - 1)))
    falling = config.sparsity.anneal_stop if config.sparsity.density < 1 else 0.0
    step = falling * (first + last) / 2 + (1 - falling) * last
    t = config.train
    evaluations = -(-t.steps // t.eval_every) * t.eval_batches * EVALUATION
    return {"train_seconds": step * (t.steps + evaluations), "train_peak_bytes": peak_bytes(device)}


def _step_seconds(run: Training, at: int, n: int) -> float:
    """The time of a training step of a run as if it had done `at` steps; the first of `n` only warms up."""
    c, seconds = run.config, []
    run.step = at
    tokens = run.corpus.tokens("train")
    for _ in range(n):
        x, y = batch(tokens, c.run.seed, run.step, 0, c.train.batch_size, c.model.n_ctx, c.train.stride)
        began = time.perf_counter()
        loss, _ = train_step(run, run.model.loss, x.to(run.device), y.to(run.device))
        loss.item()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


STAGES = {
    "check": _check,
    "calibrate": _calibrate,
    "train": _train,
    "abilities": _abilities,
    "prune": _prune,
    "measure": _measure,
}
