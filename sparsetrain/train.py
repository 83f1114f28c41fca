"""The stage `train`: start a run or go on with one, step to its end, write what it leaves.

The method, with its numbered invariants, is in docs/method.md.
"""

import json
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsetrain import checkpoint, machine, parallel, sparsity
from sparsetrain.config import ConfigError, RunConfig, config_to_yaml, known_keys, load_config, value_of
from sparsetrain.data import batch, file_hash, prepare
from sparsetrain.files import write_json, write_whole
from sparsetrain.kernels import ops
from sparsetrain.linear import leave_sparse_products_out_of_graphs
from sparsetrain.locality.sheet import image
from sparsetrain.locality.wiring import DENSEST
from sparsetrain.loop import TrainingError, run_steps
from sparsetrain.optim import learning_rate
from sparsetrain.record import Recorder
from sparsetrain.step import LossOf, Training, build, evaluate, loss_under, not_finite, read_weights_, train_step

log = logging.getLogger(__name__)

# Keys that may change when a run is resumed: they change where and how it is computed, not what.
FREE_ON_RESUME = (
    "run.out", "run.device", "run.threads", "run.compile", "run.sharded", "data.cache", "train.accumulate",
    "train.checkpoint_activations", "train.eval_every", "train.eval_batches", "train.log_every",
    "train.histogram_every", "train.checkpoint_every", "train.keep_checkpoints",
)  # fmt: skip


class RunSteps:
    """A run, as the loop sees it (`loop.Steps`)."""

    def __init__(self, run: Training):
        c = run.config
        self.run, self.folder, self.device = run, c.run_dir, run.device
        self.tokens_per_step = c.train.batch_size * c.model.n_ctx
        self.tokens = run.corpus.tokens("train")
        self.loss_of: LossOf = _compiled(run.model.loss) if c.run.compile else run.model.loss

    @property
    def step(self) -> int:
        return self.run.step

    @property
    def seconds(self) -> float:
        return self.run.seconds

    @seconds.setter
    def seconds(self, value: float) -> None:
        self.run.seconds = value

    @property
    def progress(self) -> float:
        """That of the step just taken, in [0, 1)."""
        return (self.step - 1) / self.run.config.train.steps

    def advance(self) -> Tensor:
        loss, self.rms = train_step(self.run, self.loss_of, *self.batch(self.run.config.train.batch_size))
        return loss

    def batch(self, n_sequences: int) -> tuple[Tensor, Tensor]:
        """The next step's batch (B, T) and what follows each token, or their first part, on the run's device.

        Of several processes each gets its rows of them.
        """
        c = self.run.config
        x, y = batch(self.tokens, c.run.seed, self.step, 0, n_sequences, c.model.n_ctx, c.train.stride)
        return parallel.mine(x).to(self.device), parallel.mine(y).to(self.device)

    def numbers(self, loss: float) -> dict[str, float]:
        c, wiring = self.run.config, self.run.wiring
        return {
            "loss/train": loss,
            "gradient_rms": self.rms.item(),
            "learning_rate": learning_rate(c.optim, c.sparsity, self.progress),
            "density": sparsity.density(c.sparsity, self.progress),
            **({"locality/mean_length": wiring.mean_length} if wiring and math.isfinite(wiring.mean_length) else {}),
        }

    def evaluate(self) -> dict[str, float]:
        self.run.val_loss = evaluate(self.run)
        return {"loss/val": self.run.val_loss}

    def record(self, recorder: Recorder, histograms: bool) -> None:
        recorder.sparsity(self.step, self.run.tensors)
        if histograms:
            recorder.histograms(self.step, self.run.tensors)
        if histograms and self.run.wiring and sparsity.density(self.run.config.sparsity, self.progress) <= DENSEST:
            recorder.image(self.step, "locality/sheet", image(self.run.wiring.edges(), self.run.wiring.layout))

    def save(self) -> None:
        self.refuse_broken()
        parallel.refuse_drift(self.run.model.named_parameters())
        run, c = self.run, self.run.config
        state = {"step": run.step, "seconds": run.seconds, "corpus": run.corpus.manifest["fingerprint"]}
        checkpoint.save_checkpoint(c.run_dir, run.model, run.optimizer, state, c.train.keep_checkpoints, self.beside())

    def beside(self) -> dict[str, dict[str, Tensor]]:
        """What else a checkpoint holds: tensors by name, for each file."""
        return _layout(self.run)

    @torch.no_grad()
    def refuse_broken(self) -> None:
        """A checkpoint must not replace a good one if training cannot go on from it: look at the next step's loss."""
        c = self.run.config
        loss = loss_under(c, self.run.model.loss, *self.batch(c.train.batch_size // c.train.accumulate))
        parallel.average_([loss])
        weights = (parallel.local(p) for p in self.run.model.parameters())
        if parallel.anyone(not loss.isfinite() or not all(bool(w.isfinite().all()) for w in weights)):
            raise self.broken(f"the loss became {loss.item()}", self.step + 1)

    def broken(self, what: str, step: int) -> TrainingError:
        return not_finite(self.run, what, step)

    def is_finished(self) -> bool:
        """Whether all that a finished run leaves is there."""
        return (self.folder / "model").is_dir()

    def finish(self) -> dict[str, Any]:
        """Write what the finished run leaves besides its model; the numbers that its summary gets too."""
        return {}


def train(config: RunConfig, steps_of: Callable[[Training], RunSteps] = RunSteps) -> Path:
    """Train a model as the config says, or go on with a run that was stopped.

    Args:
        config: the resolved config of the run.
        steps_of: what is done in a step, and kept, for a run that is trained with something beside it.

    Returns:
        The run directory, with `model/` and `summary.json` in it. A run that is done is left as it is.

    Raises:
        ConfigError: the run directory holds a run with another config (every difference is listed), or the model sees
            what it shall predict.
        DataError: the corpus or the tokenizer cannot be used.
        CheckpointError: a checkpoint is damaged, or could not be written.
        WriteError: another file of the run could not be written.
        TrainingError: the loss is no longer finite.
        Interrupted: a signal came; a checkpoint was written.
        ParallelError: of several processes that train together, another is gone.
    """
    if not config.model.causal:
        raise ConfigError("model.causal must be true to train, got false: each position would see what it predicts")
    with ops.using(config.run.kernels), parallel.joined(config, pick_device(config.run.device)):
        return _train(config, steps_of)


def _train(config: RunConfig, steps_of: Callable[[Training], RunSteps]) -> Path:
    steps = steps_of(_start(config))
    _refuse_another_command(steps)
    try:
        if steps.step < config.train.steps:
            _describe(config.run_dir, steps.run)
            run_steps(steps, config.train, config.run)
        if not parallel.anyone(steps.is_finished()):
            _finish(steps)
    except OSError as error:
        kept = checkpoint.latest_checkpoint(config.run_dir)
        raise checkpoint.CheckpointError(
            f"could not write to {config.run_dir}: {error}; the last good state is {kept or 'the beginning'}"
        ) from error
    return config.run_dir


def _start(config: RunConfig) -> Training:
    device = pick_device(config.run.device)
    corpus = parallel.first_then_others(lambda: prepare(config.data))
    for split in ("train", "val"):
        if len(corpus.tokens(split)) <= config.model.n_ctx + 1:
            raise ConfigError(
                f"model.n_ctx must be below the {len(corpus.tokens(split))} tokens of the {split} split, "
                f"got {config.model.n_ctx}"
            )
    run_dir = config.run_dir
    newest = checkpoint.latest_checkpoint(run_dir)
    if (run_dir / "config.yaml").exists():
        refuse_changes(run_dir / "config.yaml", config)
    run = build(config, corpus, device)
    if newest:
        state = checkpoint.read_state(newest)
        if state["corpus"] != corpus.manifest["fingerprint"]:
            raise checkpoint.CheckpointError(
                f"{newest} was trained on another corpus or tokenizer ({state['corpus'][:12]}) than the one prepared "
                f"now ({corpus.manifest['fingerprint'][:12]}); bring back its files or choose another run.name"
            )
        ours = file_hash(corpus.folder / "tokenizer.json")
        if checkpoint.read_notes(newest / "model.safetensors").get("tokenizer") != ours:
            raise checkpoint.CheckpointError(
                f"{newest} was trained with another tokenizer than {corpus.folder}/tokenizer.json; "
                f"set data.tokenizer={run_dir}/tokenizer.json in a new run, or choose another run.name"
            )
        checkpoint.restore(newest, run.model, run.optimizer)
        if run.wiring:
            run.wiring.load_(checkpoint.load_sparse(newest / "layout.safetensors"))
        run.step, run.seconds = state["step"], state["seconds"]
        read_weights_(run)
        doing = "resuming" if run.step < config.train.steps else "nothing left to train in"
        log.info("%s %s, at step %d", doing, run_dir, run.step)
    return run


def pick_device(name: str) -> torch.device:
    """The device of a setting: auto is cuda if there is one.

    Raises:
        ConfigError: cuda was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device must be auto or cpu on a machine without a CUDA device, got cuda")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def refuse_changes(file: Path, config: RunConfig) -> None:
    """Make sure that a run goes on with the config it began with, which `file` holds.

    Raises:
        ConfigError: a key differs that changes what is computed; every difference is listed.
    """
    before = load_config(type(config), [str(file)])
    changes = [
        f"{key}: {value_of(before, key)!r} there, {value_of(config, key)!r} now"
        for key, _ in known_keys(type(config))
        if key not in FREE_ON_RESUME and not _is_same(key, value_of(before, key), value_of(config, key))
    ]
    if changes:
        raise ConfigError(
            f"{file.parent} holds a run with another config; choose another name, or delete the folder:\n  "
            + "\n  ".join(changes)
        )


def _refuse_another_command(steps: RunSteps) -> None:
    newest = checkpoint.latest_checkpoint(steps.folder)
    more = {f.stem for f in newest.glob("*.safetensors")} - {"model", "optimizer", *steps.beside()} if newest else None
    if more:
        raise ConfigError(
            f"{steps.folder} must go on with what is trained beside its model ({', '.join(more)}), got a command that "
            "leaves it out; go on with the one that began it"
        )


def _is_same(key: str, before: Any, now: Any) -> bool:
    """Whether a key says the same; a tokenizer does by what its file holds, wherever that is.

    One that is no longer where it was is held to the checkpoint's when that is read.
    """
    if key == "data.tokenizer" and before and now and before != now:
        return not Path(before).exists() or file_hash(Path(before)) == file_hash(Path(now))
    return before == now


def _describe(run_dir: Path, run: Training) -> None:
    """Write what is needed to know, later and elsewhere, what was run."""
    if parallel.rank():
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(run_dir / "config.yaml", config_to_yaml(run.config).encode())
    write_whole(run_dir / "tokenizer.json", (run.corpus.folder / "tokenizer.json").read_bytes())
    write_json(
        run_dir / "environment.json",
        {
            **machine.describe(run.device),
            "processes": parallel.n_ranks(),
            "corpus": {k: v for k, v in run.corpus.manifest.items() if k != "files"},
        },
    )


def _compiled(loss_of: LossOf) -> LossOf:
    # The graph breaks at every sparse product, and torch warns of each tensor that goes from one part to the next.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
    leave_sparse_products_out_of_graphs()
    return torch.compile(loss_of)


def _finish(steps: RunSteps) -> None:
    run, c = steps.run, steps.run.config
    n_nonzero = sum(int(row["n_nonzero"]) for row in sparsity.count(run.tensors).values())
    found = {
        "val_loss": evaluate(run) if run.val_loss is None else run.val_loss,
        "density": n_nonzero / sum(t.size for t in run.tensors),
        "n_nonzero": n_nonzero,
        "tokens": c.train.steps * c.train.batch_size * c.model.n_ctx,
        "seconds": round(run.seconds, 2),
        "peak_bytes": machine.peak_bytes(run.device),
        **steps.finish(),
    }
    if parallel.rank() == 0:
        file = c.run_dir / "summary.json"
        write_json(file, {**(json.loads(file.read_text()) if file.exists() else {}), **found})
    checkpoint.export_model(c.run_dir, run.model, config_to_yaml(c), _layout(run))  # last: it says that the run is done


def _layout(run: Training) -> dict[str, dict[str, Tensor]]:
    """The file of a run's layout, where it has one."""
    return {"layout": run.wiring.tensors()} if run.wiring else {}
