"""The training loop: batch, gradients, Adam, projection, decay; logs and checkpoints; resumes where it stopped.

The method, with its numbered invariants, is in docs/method.md.
"""

import json
import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sparsetrain import checkpoint, machine, memory, sparsity
from sparsetrain.candidates import finish_refill_, start_refill
from sparsetrain.config import ConfigError, RunConfig, config_to_dict, config_to_yaml, known_keys, load_config
from sparsetrain.data import Corpus, batch, evaluation_batches, file_hash, prepare
from sparsetrain.files import write_json, write_whole
from sparsetrain.kernels import ops
from sparsetrain.model import Transformer
from sparsetrain.optim import build_adam, decay_, learning_rate, scale_gradients_
from sparsetrain.record import Recorder
from sparsetrain.threads import Threads

log = logging.getLogger(__name__)

LossOf = Callable[[Tensor, Tensor], Tensor]

# Keys that may change when a run is resumed: they change where and how it is computed, not what.
FREE_ON_RESUME = (
    "run.out", "run.device", "run.threads", "run.compile", "data.cache", "train.accumulate",
    "train.checkpoint_activations", "train.eval_every", "train.eval_batches", "train.log_every",
    "train.histogram_every", "train.checkpoint_every", "train.keep_checkpoints",
)  # fmt: skip


class TrainingError(RuntimeError):
    """Training that cannot go on; the last good checkpoint is kept."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; the run was checkpointed and can be resumed."""

    exit_status = 130


@dataclass
class Training:
    """The state of a run between two steps: all of it is in a checkpoint."""

    config: RunConfig
    corpus: Corpus
    model: Transformer
    optimizer: torch.optim.Adam
    device: torch.device
    step: int = 0  # steps done
    seconds: float = 0.0  # spent in steps, from the first one on
    val_loss: float | None = None  # at the last evaluation
    tensors: list[sparsity.Projected] = field(default_factory=list)


def train(config: RunConfig) -> Path:
    """Train a model as the config says, or go on with a run that was stopped.

    Args:
        config: the resolved config of the run.

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
    """
    if not config.model.causal:
        raise ConfigError("model.causal must be true to train, got false: each position would see what it predicts")
    with ops.using(config.run.kernels):
        return _train(config)


def _train(config: RunConfig) -> Path:
    run = _start(config)
    try:
        if run.step < config.train.steps:
            _describe(config.run_dir, run)
            _loop(run)
        if not (config.run_dir / "model").is_dir():
            _finish(run)
    except OSError as error:
        kept = checkpoint.latest_checkpoint(config.run_dir)
        raise checkpoint.CheckpointError(
            f"could not write to {config.run_dir}: {error}; the last good state is {kept or 'the beginning'}"
        ) from error
    return config.run_dir


def train_step(run: Training, loss_of: LossOf, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """One optimiser step, in the order of docs/method.md.

    Args:
        run: the state, which moves on.
        loss_of: `run.model.loss`, compiled or not.
        inputs, targets: (B, T), on the device of the run.

    Returns:
        The loss and the gradients' RMS, 0-d.
    """
    c = run.config
    progress = run.step / c.train.steps
    lr = learning_rate(c.optim, c.sparsity, progress)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    n_sequences = c.train.batch_size // c.train.accumulate  # of a part: candidates are chosen in the first
    refill = start_refill(run.tensors, c.sparsity, run.step, c.train.steps, n_sequences)
    loss = torch.zeros((), device=run.device)
    for part_in, part_out in zip(inputs.chunk(c.train.accumulate), targets.chunk(c.train.accumulate), strict=True):
        part = _loss(run, loss_of, part_in, part_out) / c.train.accumulate
        part.backward()
        loss += part.detach()
    rms = scale_gradients_(run.model, c.optim.gradient)
    run.optimizer.step()
    run.optimizer.zero_grad()
    sparsity.project_all_(run.tensors, c.sparsity, progress)
    decay_(run.model, c.optim, lr)
    run.step += 1
    try:
        finish_refill_(refill, run.optimizer, c.sparsity, progress)
        read_weights_(run)
    except ValueError:
        raise TrainingError(_not_finite(run, "a weight became infinite or NaN", run.step)) from None
    return loss, rms


def read_weights_(run: Training) -> None:
    """Choose each linear map's product for the weights as they are now: after a step, and before the first."""
    c = run.config
    n_tokens = c.train.batch_size // c.train.accumulate * c.model.n_ctx
    progress = max(0, run.step - 1) / c.train.steps
    sparsity.read_all_(run.tensors, c.sparsity, progress, n_tokens, getattr(torch, c.run.dtype))


@torch.no_grad()
def evaluate(run: Training) -> float:
    """Mean held-out loss in nats per token, on the same windows each time."""
    c = run.config
    run.model.eval()
    sums = [
        (_loss(run, run.model.loss, x.to(run.device), y.to(run.device)).item(), len(x))
        for x, y in evaluation_batches(
            run.corpus.tokens("val"), c.train.eval_batches, c.train.batch_size, c.model.n_ctx, c.train.stride
        )
    ]
    run.model.train()
    return sum(loss * n for loss, n in sums) / sum(n for _, n in sums)


def _start(config: RunConfig) -> Training:
    device = pick_device(config.run.device)
    corpus = prepare(config.data)
    for split in ("train", "val"):
        if len(corpus.tokens(split)) <= config.model.n_ctx + 1:
            raise ConfigError(
                f"model.n_ctx must be below the {len(corpus.tokens(split))} tokens of the {split} split, "
                f"got {config.model.n_ctx}"
            )
    run_dir = config.run_dir
    newest = checkpoint.latest_checkpoint(run_dir)
    if (run_dir / "config.yaml").exists():
        _refuse_changes(run_dir, config)
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
        run.step, run.seconds = state["step"], state["seconds"]
        read_weights_(run)
        doing = "resuming" if run.step < config.train.steps else "nothing left to train in"
        log.info("%s %s, at step %d", doing, run_dir, run.step)
    return run


def build(config: RunConfig, corpus: Corpus, device: torch.device) -> Training:
    """A run before its first step, its weights drawn from its seed."""
    generator = torch.Generator().manual_seed(config.run.seed)
    model = Transformer(config.model, corpus.tokenizer.get_vocab_size(), generator)
    model.checkpoint_activations = config.train.checkpoint_activations
    model = model.to(device).train()
    run = Training(config, corpus, model, build_adam(model, config.optim), device)
    run.tensors = sparsity.projected(model, config.sparsity)
    return run


def pick_device(name: str) -> torch.device:
    """The device of a setting: auto is cuda if there is one.

    Raises:
        ConfigError: cuda was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device must be auto or cpu on a machine without a CUDA device, got cuda")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _refuse_changes(run_dir: Path, config: RunConfig) -> None:
    before = load_config(RunConfig, [str(run_dir / "config.yaml")])
    changes = [
        f"{key}: {_value(before, key)!r} there, {_value(config, key)!r} now"
        for key, _ in known_keys(RunConfig)
        if key not in FREE_ON_RESUME and _value(before, key) != _value(config, key)
    ]
    if changes:
        raise ConfigError(
            f"{run_dir} holds a run with another config; choose another run.name, or delete the folder:\n  "
            + "\n  ".join(changes)
        )


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config_to_dict(config)
    for part in key.split("."):
        value = value[part]
    return value


def _describe(run_dir: Path, run: Training) -> None:
    """Write what is needed to know, later and elsewhere, what was run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(run_dir / "config.yaml", config_to_yaml(run.config).encode())
    write_whole(run_dir / "tokenizer.json", (run.corpus.folder / "tokenizer.json").read_bytes())
    write_json(
        run_dir / "environment.json",
        {
            **machine.describe(run.device),
            "corpus": {k: v for k, v in run.corpus.manifest.items() if k != "files"},
        },
    )


def _loop(run: Training) -> None:
    c = run.config
    if run.device.type == "cpu":
        memory.keep_freed()
    loss_of = _compiled(run.model.loss) if c.run.compile else run.model.loss
    tokens = run.corpus.tokens("train")
    threads = Threads(c.run.threads if run.device.type == "cpu" else torch.get_num_threads())
    losses = _Losses(run)
    tokens_per_step = c.train.batch_size * c.model.n_ctx
    logged_at, seconds_then = run.step, run.seconds
    bar = tqdm(total=c.train.steps, initial=run.step, unit=" steps", disable=None, smoothing=0.05)
    with bar, Recorder(c.run_dir, run.step) as recorder, _stop_signals() as stopped:
        while run.step < c.train.steps:
            n_threads = threads.choose()
            if n_threads != torch.get_num_threads():
                torch.set_num_threads(n_threads)
            began = time.perf_counter()
            x, y = batch(tokens, c.run.seed, run.step, 0, c.train.batch_size, c.model.n_ctx, c.train.stride)
            loss, rms = train_step(run, loss_of, x.to(run.device), y.to(run.device))
            logs, last = run.step % c.train.log_every == 0, run.step == c.train.steps
            losses.add(loss)
            if logs or run.device.type == "cpu":
                losses.check()
            seconds = time.perf_counter() - began
            threads.record(n_threads, seconds)
            run.seconds += seconds
            bar.update()
            if logs:
                speed = tokens_per_step * (run.step - logged_at) / (run.seconds - seconds_then)
                logged_at, seconds_then = run.step, run.seconds
                bar.set_postfix_str(f"loss {losses.newest:.3f}, {speed:,.0f} tokens/s")
                recorder.numbers(run.step, _numbers(run, losses.newest, rms.item(), speed))
            if last or run.step % c.train.eval_every == 0:
                run.val_loss = evaluate(run)
                recorder.numbers(run.step, {"loss/val": run.val_loss, "seconds": run.seconds})
                recorder.sparsity(run.step, run.tensors)
                _tell(run, losses.newest)
            if run.step % c.train.histogram_every == 0:
                recorder.histograms(run.step, run.tensors)
            if last or stopped.is_set() or run.step % c.train.checkpoint_every == 0:
                losses.check()
                _save(run)
            if stopped.is_set() and not last:
                raise Interrupted(f"stopped after step {run.step}; the same command goes on from there")


def _compiled(loss_of: Callable[[Tensor, Tensor], Tensor]):
    # The graph breaks at every sparse product, and torch warns of each tensor that goes from one part to the next.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
    return torch.compile(loss_of)


class _Losses:
    """The losses not looked at yet: looking waits for the device, so it is done now and then."""

    def __init__(self, run: Training):
        self.run = run
        self.waiting: list[tuple[int, Tensor]] = []
        self.newest = math.nan

    def add(self, loss: Tensor) -> None:
        self.waiting.append((self.run.step, loss))

    def check(self) -> None:
        """Raises TrainingError, naming the step, if a loss is not finite."""
        for step, loss in self.waiting:
            self.newest = loss.item()
            if not math.isfinite(self.newest):
                raise TrainingError(_not_finite(self.run, f"the loss became {self.newest}", step))
        self.waiting.clear()


def _numbers(run: Training, loss: float, rms: float, tokens_per_second: float) -> dict[str, float]:
    c = run.config
    progress = (run.step - 1) / c.train.steps
    return {
        "loss/train": loss,
        "gradient_rms": rms,
        "learning_rate": learning_rate(c.optim, c.sparsity, progress),
        "density": sparsity.density(c.sparsity, progress),
        "tokens_per_second": tokens_per_second,
    }


def _tell(run: Training, loss: float) -> None:
    steps = run.config.train.steps
    left = run.seconds / run.step * (steps - run.step)
    log.info(
        "step %d of %d: loss %.3f, held out %.3f; %.0f s done, about %.0f s left",
        run.step, steps, loss, run.val_loss, run.seconds, left,
    )  # fmt: skip


def _loss(run: Training, loss_of: LossOf, inputs: Tensor, targets: Tensor) -> Tensor:
    bf16 = run.config.run.dtype == "bfloat16"
    with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):
        return loss_of(inputs, targets)


def _save(run: Training) -> None:
    _refuse_broken(run)
    state = {"step": run.step, "seconds": run.seconds, "corpus": run.corpus.manifest["fingerprint"]}
    checkpoint.save_checkpoint(run.config.run_dir, run.model, run.optimizer, state, run.config.train.keep_checkpoints)


@torch.no_grad()
def _refuse_broken(run: Training) -> None:
    """A checkpoint must not replace a good one if training cannot go on from it: look at the next step's loss."""
    c = run.config
    tokens = run.corpus.tokens("train")
    n_sequences = c.train.batch_size // c.train.accumulate
    x, y = batch(tokens, c.run.seed, run.step, 0, n_sequences, c.model.n_ctx, c.train.stride)
    loss = _loss(run, run.model.loss, x.to(run.device), y.to(run.device)).item()
    if not math.isfinite(loss) or not all(bool(p.isfinite().all()) for p in run.model.parameters()):
        raise TrainingError(_not_finite(run, f"the loss became {loss}", run.step + 1))


def _not_finite(run: Training, what: str, step: int) -> str:
    kept = checkpoint.latest_checkpoint(run.config.run_dir)
    return f"{what} at step {step}; the last good state is {kept or 'the beginning'}; try a lower optim.lr"


def _finish(run: Training) -> None:
    c = run.config
    n_nonzero = sum(int(row["n_nonzero"]) for row in sparsity.count(run.tensors).values())
    summary_file = c.run_dir / "summary.json"
    earlier = json.loads(summary_file.read_text()) if summary_file.exists() else {}
    write_json(
        summary_file,
        {
            **earlier,
            "val_loss": evaluate(run) if run.val_loss is None else run.val_loss,
            "density": n_nonzero / sum(t.size for t in run.tensors),
            "n_nonzero": n_nonzero,
            "tokens": c.train.steps * c.train.batch_size * c.model.n_ctx,
            "seconds": round(run.seconds, 2),
        },
    )
    checkpoint.export_model(c.run_dir, run.model, config_to_yaml(c))  # last: it says that the run is done


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second Ctrl-C ends the process at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def stop(number, frame):
        log.warning("stopping after this step; once more to stop at once")
        stopped.set()
        for s, handler in before.items():
            signal.signal(s, handler)

    for s in before:
        signal.signal(s, stop)
    try:
        yield stopped
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
