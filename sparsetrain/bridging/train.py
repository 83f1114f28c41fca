"""The stage `bridge`: a sparse model trained jointly with a bridge to a dense one, or a bridge to a trained one.

runs/<name>/bridges/<bridge>/{config.yaml, models.json, bridge.safetensors, report.json}

The state of a joint training is in the run's own checkpoints; that of a bridge to a trained model is in checkpoints/
there, with metrics.jsonl and tensorboard/.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from sparsetrain import checkpoint
from sparsetrain.bridge_config import BridgeConfig
from sparsetrain.bridging.bridge import Bridge, Pair, pair_sites
from sparsetrain.bridging.dense import OwnModel, load_dense
from sparsetrain.bridging.fitting import Fitting
from sparsetrain.bridging.quality import quality, worst
from sparsetrain.bridging.residuals import BridgeError, Residuals
from sparsetrain.bridging.same_tokens import same_tokens
from sparsetrain.config import ConfigError, DataOptions, config_to_yaml, load_config
from sparsetrain.data import Corpus, batch, evaluation_batches, prepare
from sparsetrain.files import write_json, write_whole
from sparsetrain.kernels import ops
from sparsetrain.loop import TrainingError, run_steps
from sparsetrain.model import Transformer, n_kept
from sparsetrain.parallel import n_launched
from sparsetrain.pruning.edges import weights_hash
from sparsetrain.record import Recorder
from sparsetrain.step import Training, add_gradients_
from sparsetrain.train import RunSteps, pick_device, refuse_changes, train

log = logging.getLogger(__name__)


def bridge(config: BridgeConfig) -> Path:
    """Train a bridge as the config says, with the sparse model or to one that is trained; or go on with one.

    Args:
        config: the resolved config. Where `data.tokenizer` is null, the dense model's is taken.

    Returns:
        The bridge's folder. One that is done is left as it is.

    Raises:
        BridgeError: the dense model has no residual sites that can be found, or other tokens than the sparse one.
        ConfigError: the map of sites cannot be followed, or there is a bridge with another config.
        CheckpointError, DataError, TrainingError, WriteError, Interrupted: as in `train`.
    """
    if n_launched() > 1:
        raise ConfigError(f"a bridge must be trained by one process, got {n_launched()}; start it without torchrun")
    device, config = pick_device(config.run.device), _with_whole_paths(config)
    dense = load_dense(config.bridge.dense, device)
    if config.bridge.sparse:
        return _fit(config, dense, device)
    config = _with_tokenizer(config, dense)
    _check(config, dense, prepare(config.data).tokenizer)
    folder = _begin(config, {"dense": dense})
    train(config.run_config, lambda run: _JointSteps(run, config, dense, folder))
    return folder


class _JointSteps(RunSteps):
    """A sparse model and its bridge, a step of each at a time."""

    def __init__(self, run: Training, config: BridgeConfig, dense: Residuals, bridge_folder: Path):
        super().__init__(run)
        self.bridge_folder = bridge_folder
        sparse = OwnModel(run.model, run.corpus.tokenizer)
        self.fitting = Fitting(config, sparse, dense, run.device)
        self.loss_of = lambda x, y: self.fitting.loss(x, y, run.step, run.model)
        _load_or_regress(self.fitting, self.tokens, checkpoint.latest_checkpoint(run.config.run_dir))

    def advance(self) -> Tensor:
        every = self.fitting.options.regress_every
        if every and self.step and self.step % every == 0:
            _regress(self.fitting, self.tokens, self.step)
        progress = self.step / self.run.config.train.steps
        loss = super().advance()
        self.fitting.step_(progress)
        return loss

    def numbers(self, loss: float) -> dict[str, float]:
        return {**super().numbers(loss), **self.fitting.numbers()}

    def evaluate(self) -> dict[str, float]:
        return {**super().evaluate(), **_short_report(self.fitting, self.run.corpus)}

    def beside(self) -> dict[str, dict[str, Tensor]]:
        return {**super().beside(), "bridge": self.fitting.tensors()}

    def is_finished(self) -> bool:
        return super().is_finished() and is_finished(self.bridge_folder)

    def finish(self) -> dict[str, Any]:
        return {"bridge": worst(_finish(self.fitting, self.bridge_folder, self.run.corpus))}


class FitSteps:
    """A bridge to a sparse model that is trained already and stays as it is (`loop.Steps`)."""

    def __init__(self, config: BridgeConfig, sparse: OwnModel, dense: Residuals, device: torch.device, folder: Path):
        self.config, self.sparse, self.device, self.folder = config, sparse, device, folder
        self.step, self.seconds = 0, 0.0
        self.tokens_per_step = config.train.batch_size * config.model.n_ctx
        self.corpus = checkpoint.run_corpus(config.bridge.sparse, config)
        self.tokens = self.corpus.tokens("train")
        self.fitting = Fitting(config, sparse, dense, device)
        newest = checkpoint.latest_checkpoint(folder)
        if newest:
            state = checkpoint.read_state(newest)
            self.step, self.seconds = state["step"], state["seconds"]
            log.info("resuming %s, at step %d", folder, self.step)
        _load_or_regress(self.fitting, self.tokens, newest)

    def _batch(self) -> tuple[Tensor, Tensor]:
        c = self.config
        x, y = batch(self.tokens, c.run.seed, self.step, 0, c.train.batch_size, c.model.n_ctx, c.train.stride)
        return x.to(self.device), y.to(self.device)

    def advance(self) -> Tensor:
        loss = add_gradients_(
            self.config, lambda x, y: self.fitting.loss(x, y, self.step, self.sparse.model), *self._batch()
        )
        self.fitting.step_(self.step / self.config.train.steps)
        self.step += 1
        return loss

    def numbers(self, loss: float) -> dict[str, float]:
        return {"loss/train": loss, **self.fitting.numbers()}

    def evaluate(self) -> dict[str, float]:
        return _short_report(self.fitting, self.corpus)

    def record(self, recorder: Recorder, histograms: bool) -> None:
        pass  # all there is to tell are numbers

    def save(self) -> None:
        state = {"step": self.step, "seconds": self.seconds}
        tensors = {"bridge": self.fitting.tensors()}
        checkpoint.save_state(self.folder, tensors, state, self.config.train.keep_checkpoints)

    def broken(self, what: str, step: int) -> TrainingError:
        kept = checkpoint.latest_checkpoint(self.folder)
        left = f"the last good state is {kept or 'the beginning'}"
        return TrainingError(f"{what} at step {step}; {left}; try a lower bridge.lr")


def _load_or_regress(fitting: Fitting, tokens: np.ndarray, newest: Path | None) -> None:
    """Go on from a checkpoint, or begin with a regression."""
    if newest:
        fitting.load_(checkpoint.load_sparse(newest / "bridge.safetensors", fitting.device))
    else:
        _regress(fitting, tokens, 0)


def _regress(fitting: Fitting, tokens: np.ndarray, step: int) -> None:
    """Begin with the maps anew: a regression on training text, 64 tokens for each channel, from a step's batch on."""
    c = fitting.config
    n_batches = -(-64 * max(fitting.sparse.width, fitting.dense.width) // (c.train.batch_size * c.model.n_ctx))
    sizes = c.train.batch_size, c.model.n_ctx, c.train.stride
    drawn = [batch(tokens, c.run.seed, step + i, 0, *sizes)[0] for i in range(n_batches)]
    fitting.regress_([x.to(fitting.device) for x in drawn])


def _fit(config: BridgeConfig, dense: Residuals, device: torch.device) -> Path:
    model, tokenizer, run = checkpoint.load_run(config.bridge.sparse, device)
    cache = run.data.cache if config.data.cache == DataOptions().cache else config.data.cache
    data = dataclasses.replace(run.data, cache=cache)
    config = dataclasses.replace(config, data=data, model=run.model, sparsity=run.sparsity)
    _check(config, dense, tokenizer)
    sparse = OwnModel(model.requires_grad_(False), tokenizer)
    folder = _begin(config, {"dense": dense, "sparse": sparse})
    with ops.using(config.run.kernels):
        steps = FitSteps(config, sparse, dense, device, folder)
        if steps.step < config.train.steps:
            run_steps(steps, config.train, config.run)
        if not is_finished(folder):
            _finish(steps.fitting, folder, steps.corpus)
    return folder


def _with_whole_paths(config: BridgeConfig) -> BridgeConfig:
    """The config with models and tokenizer from the root, so that they are found from any other folder too."""
    given = {"dense": config.bridge.dense, "sparse": config.bridge.sparse}
    whole = {key: str(Path(name).resolve()) for key, name in given.items() if name and Path(name).is_dir()}
    config = dataclasses.replace(config, bridge=dataclasses.replace(config.bridge, **whole))
    return _with_given_tokenizer(config, Path(config.data.tokenizer)) if config.data.tokenizer else config


def _with_given_tokenizer(config: BridgeConfig, file: Path) -> BridgeConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(file.resolve())))


def _with_tokenizer(config: BridgeConfig, dense: Residuals) -> BridgeConfig:
    """The config with the dense model's tokenizer where it names none."""
    if config.data.tokenizer:
        return config
    text = dense.tokenizer.to_str().encode()
    file = Path(config.data.cache) / f"tokenizer-{hashlib.sha256(text).hexdigest()[:12]}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, text)
    return _with_given_tokenizer(config, file)


def _check(config: BridgeConfig, dense: Residuals, tokenizer: Tokenizer) -> None:
    """Refuse, before anything is trained, a dense model with other tokens, or that is too short for a sequence, and
    encoders that keep nothing."""
    topk, width = config.bridge.topk, config.model.d_model
    if n_kept(topk, width) < 1:
        raise ConfigError(f"bridge.topk must keep at least one of {width} channels, got {topk}")
    with torch.device("meta"):
        sparse = OwnModel(Transformer(config.model, tokenizer.get_vocab_size()), tokenizer)
    same_tokens(sparse, dense)
    pair_sites(config.bridge, sparse, dense)
    if dense.n_ctx is not None and config.model.n_ctx > dense.n_ctx:
        raise ConfigError(f"model.n_ctx must be at most the dense model's {dense.n_ctx}, got {config.model.n_ctx}")


def _begin(config: BridgeConfig, models: Mapping[str, Residuals]) -> Path:
    """The bridge's folder, with its config in it, and what tells the weights of the models that it rests on."""
    run_dir = Path(config.bridge.sparse) if config.bridge.sparse else config.run_dir
    folder = run_dir / "bridges" / config.bridge.name
    if (folder / "config.yaml").exists():
        refuse_changes(folder / "config.yaml", config)
    elif not config.bridge.sparse and checkpoint.latest_checkpoint(run_dir):
        raise ConfigError(
            f"{run_dir} must be a new run, to be trained with the bridge {config.bridge.name!r}, got one that was "
            f"trained without it; choose another run.name, or set bridge.sparse={run_dir} to bridge to it as it is"
        )
    check_models(folder, models)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "models.json", {side: weights_hash(model.model) for side, model in models.items()})
    write_whole(folder / "config.yaml", config_to_yaml(config).encode())
    return folder


def check_models(folder: Path, models: Mapping[str, Residuals]) -> None:
    """Make sure that models, by side, have the weights that they had when a bridge was begun.

    Of a sparse model that was trained with the bridge nothing is known: its weights are not those of then.

    Raises:
        BridgeError: which has others.
    """
    file = folder / "models.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    if other := [side for side in known.keys() & models.keys() if weights_hash(models[side].model) != known[side]]:
        raise BridgeError(
            f"the {' and the '.join(other)} model must have the weights that it had when the bridge in {folder} was "
            "begun, got others; bring them back, or make a new bridge"
        )


def is_finished(folder: Path) -> bool:
    """Whether a bridge's folder holds all that a bridge leaves."""
    return all((folder / name).exists() for name in ("bridge.safetensors", "report.json"))


def _short_report(fitting: Fitting, corpus: Corpus) -> dict[str, float]:
    """What is recorded of the bridge on one held-out batch."""
    found = worst(_quality(fitting, corpus, 1))
    return {f"bridge/val_{name}": value for name, value in found.items()}


def _quality(fitting: Fitting, corpus: Corpus, n_batches: int) -> dict[str, Any]:
    c, device = fitting.config, fitting.device
    batches = evaluation_batches(corpus.tokens("val"), n_batches, c.train.batch_size, c.model.n_ctx, c.train.stride)
    there = ((x.to(device), y.to(device)) for x, y in batches)
    return quality(fitting.bridge, fitting.sparse, fitting.dense, there)


def _finish(fitting: Fitting, folder: Path, corpus: Corpus) -> dict[str, Any]:
    """Write the bridge and its report."""
    unfinished = folder / ".bridge.unfinished"
    checkpoint.save_sparse(unfinished, fitting.bridge.state_dict())
    unfinished.replace(folder / "bridge.safetensors")
    report = _quality(fitting, corpus, fitting.config.train.eval_batches)
    write_json(folder / "report.json", report)
    return report


def load_bridge(folder: str | Path, device: str | torch.device = "cpu") -> tuple[Bridge, BridgeConfig]:
    """Read a bridge that `bridge` wrote.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder = Path(folder)
    if not is_finished(folder):
        raise checkpoint.CheckpointError(f"{folder} must hold a finished bridge, got none; see `sparsetrain bridge`")
    config = load_config(BridgeConfig, [str(folder / "config.yaml")])
    tensors = checkpoint.load_sparse(folder / "bridge.safetensors", device)
    report = json.loads((folder / "report.json").read_text())
    pairs = [Pair(row["sparse"], row["dense"]) for row in report["pairs"]]
    n_sparse, n_dense = tensors["encoders.0.weight"].shape
    loaded = Bridge(pairs, n_sparse, n_dense, config.bridge.topk)
    loaded.load_state_dict(tensors)
    return loaded.to(device).requires_grad_(False), config
