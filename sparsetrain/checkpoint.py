"""Run directories and checkpoints: sparse safetensors, written whole or not at all, never a pickle.

runs/<name>/
  config.yaml  environment.json  tokenizer.json
  checkpoints/step_00000500/{model.safetensors, optimizer.safetensors, state.json}
  model/{model.safetensors, config.yaml, tokenizer.json}      the finished model; with locality, layout.safetensors
  metrics.jsonl  tensorboard/  summary.json  circuits/
"""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from sparsetrain import parallel
from sparsetrain.config import ModelOptions, RunConfig, load_config
from sparsetrain.data import Corpus, file_hash, prepare
from sparsetrain.kernels.sparse_weight import SparseWeight
from sparsetrain.linear import Linear
from sparsetrain.model import Transformer

log = logging.getLogger(__name__)

FORMAT = "sparsetrain-2"


class CheckpointError(RuntimeError):
    """A checkpoint or run directory that cannot be read, does not fit, or could not be written."""


def save_sparse(path: Path, tensors: Mapping[str, Tensor | SparseWeight], **notes: str) -> None:
    """Write tensors to a safetensors file; those that are mostly zero as `name.values` and `name.indices` (int32).

    `notes` go into the file's metadata, where `read_notes` finds them.

    Raises:
        CheckpointError: the file could not be written whole (e.g. a full disk); nothing is left at `path`.
    """
    stored, shapes = {}, {}
    for name, tensor in tensors.items():
        tensor = (tensor.to_dense() if isinstance(tensor, SparseWeight) else tensor).detach().cpu().contiguous()
        flat = tensor.flatten()
        if tensor.is_floating_point() and 2 * int(flat.count_nonzero()) < len(flat) < 2**31:
            indices = flat.nonzero().squeeze(-1)
            stored[f"{name}.values"], stored[f"{name}.indices"] = flat[indices], indices.int()
            shapes[name] = list(tensor.shape)
        else:
            stored[name] = tensor
    # In one entry, since safetensors writes several in another order in each process: equal weights, equal bytes.
    metadata = {"sparsetrain": json.dumps({"format": FORMAT, "sparse_shapes": shapes, **notes})}
    try:
        save_file(stored, path, metadata)
    except (OSError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {path}: {error}") from error


def load_sparse(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read what `save_sparse` wrote, as dense tensors.

    Raises:
        CheckpointError: the file is missing, truncated, or not one of ours.
    """
    notes = read_notes(path)
    with safe_open(path, framework="pt", device=str(device)) as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, shape in notes["sparse_shapes"].items():
        values, indices = stored.pop(f"{name}.values"), stored.pop(f"{name}.indices")
        dense = torch.zeros(shape, dtype=values.dtype, device=values.device)
        dense.view(-1)[indices.long()] = values
        stored[name] = dense
    return stored


def read_notes(path: Path) -> dict[str, Any]:
    """The notes of a file that `save_sparse` wrote, with its `format` and `sparse_shapes`, by the tensors' names.

    Raises:
        CheckpointError: the file is missing, truncated, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} must be a readable safetensors file, got: {error}") from None
    notes = json.loads(found.get("sparsetrain", "{}"))
    if notes.get("format") != FORMAT:
        raise CheckpointError(f"{path} must have been written by this sparsetrain, got {found or 'no metadata'}")
    return notes


def fill(model: Transformer, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy weights into a model.

    Raises:
        CheckpointError: names or shapes differ; every difference is listed.
    """
    _check_fit(model, tensors, source)
    model.load_state_dict({name: parallel.like(mine, tensors[name]) for name, mine in model.state_dict().items()})


def build(options: ModelOptions, tensors: Mapping[str, Tensor], source: Path) -> Transformer:
    """A model that consists of these weights: none are drawn first, and nothing is copied.

    Those that a file holds dense stay in it until they are read; what is written to the model does not get there.

    Its vocabulary is as large as the embedding, which may have rows that no token of the tokenizer needs.

    Raises:
        CheckpointError: names or shapes differ; every difference is listed.
    """
    with torch.device("meta"):
        model = Transformer(options, len(tensors.get("embed.weight", "?")))
    _check_fit(model, tensors, source)
    model.load_state_dict(dict(tensors), assign=True)
    return model


def _check_fit(model: Transformer, tensors: Mapping[str, Tensor], source: Path) -> None:
    ours = model.state_dict()
    differences = [f"{name} is missing there" for name in ours if name not in tensors]
    differences += [f"{name} is unknown here" for name in tensors if name not in ours]
    differences += [
        f"{name} has shape {tuple(tensors[name].shape)} there, {tuple(mine.shape)} here"
        for name, mine in ours.items()
        if name in tensors and mine.shape != tensors[name].shape
    ]
    if differences:
        raise CheckpointError(f"{source} does not fit this model:\n  " + "\n  ".join(differences))


def save_checkpoint(
    run_dir: Path,
    model: Transformer,
    optimizer: torch.optim.Adam,
    state: Mapping[str, Any],
    keep: int,
    beside: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a checkpoint of a run; see `save_state`. Of several processes all must call this, and the first writes.

    Args:
        beside: tensors of what is trained beside the model, by the names of their files (without suffix).
    """
    held = {"model": _weights(model), "optimizer": _moments(model, optimizer)}
    tensors = {name: parallel.collected(of_file) for name, of_file in held.items()} | dict(beside or {})
    if parallel.rank() == 0:
        save_state(run_dir, tensors, state, keep, tokenizer=file_hash(run_dir / "tokenizer.json"))


def save_state(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor | SparseWeight]],
    state: Mapping[str, Any],
    keep: int,
    **notes: str,
) -> Path:
    """Write the checkpoint of the step in `state["step"]`, then drop all but the newest `keep`.

    Args:
        folder: whose `checkpoints/` it goes to.
        tensors: by name, for each file by its name (without suffix).
        notes: go into each file's metadata.

    Raises:
        CheckpointError: it could not be written; the earlier checkpoints are untouched.
    """
    target = folder / "checkpoints" / f"step_{state['step']:08d}"
    with whole_folder(target) as unfinished:
        for name, held in tensors.items():
            save_sparse(unfinished / f"{name}.safetensors", held, **notes)
        hashes = {f.name: file_hash(f) for f in sorted(unfinished.glob("*.safetensors"))}
        (unfinished / "state.json").write_text(json.dumps({**state, "sha256": hashes}, indent=1))
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, after checking that its files are as they were written.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        hashes = state["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}/state.json is missing or damaged ({error}); {_remedy(folder)}") from None
    for name, expected in hashes.items():
        if not (folder / name).exists() or file_hash(folder / name) != expected:
            raise CheckpointError(f"{folder / name} is missing, truncated or changed; {_remedy(folder)}")
    return state


def restore(folder: Path, model: Transformer, optimizer: torch.optim.Adam) -> None:
    """Copy weights and moments of a checkpoint into a model and its optimiser.

    Raises:
        CheckpointError: they do not fit.
    """
    fill(model, load_sparse(folder / "model.safetensors"), folder)
    moments = load_sparse(folder / "optimizer.safetensors")
    for name, linear in _linear_maps(model):
        if (candidates := moments.get(f"{name}.candidates")) is not None:
            linear.hold_(candidates.long().to(linear.weight.device))
    for name, p in model.named_parameters():
        state = {key: parallel.like(p, moments[f"{name}.{key}"]).to(p.device) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": moments[f"{name}.step"].to(p.device), **state}


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def export_model(
    run_dir: Path, model: Transformer, config_yaml: str, beside: Mapping[str, Mapping[str, Tensor]] | None = None
) -> Path:
    """Write `model/`, which holds all that loading the finished model takes.

    Of several processes all must call this, and the first writes.

    Args:
        beside: tensors of what belongs to the model, by the names of their files (without suffix).
    """
    target, weights = run_dir / "model", parallel.collected(_weights(model))
    if parallel.rank():
        return target
    with whole_folder(target) as folder:
        for name, tensors in {"model": weights, **(beside or {})}.items():
            save_sparse(folder / f"{name}.safetensors", tensors, tokenizer=file_hash(run_dir / "tokenizer.json"))
        (folder / "config.yaml").write_text(config_yaml)
        shutil.copy(run_dir / "tokenizer.json", folder / "tokenizer.json")
    return target


def load(run: str | Path, device: str | torch.device = "cpu") -> tuple[Transformer, Tokenizer]:
    """Load a run's model and its tokenizer; see `load_run`."""
    return load_run(run, device)[:2]


def load_run(
    run: str | Path, device: str | torch.device = "cpu", at: Path | None = None
) -> tuple[Transformer, Tokenizer, RunConfig]:
    """Load a run's model (the finished one, or else its newest checkpoint), tokenizer and config.

    Args:
        run: a run directory, or a `model` folder copied out of one.
        device: where the weights go.
        at: one of the run's checkpoints, in place of its model.

    Raises:
        CheckpointError: it is no run directory, holds no model yet, is damaged, or its tokenizer was exchanged.
    """
    run = Path(run)
    root = run / "model" if (run / "model").is_dir() else run
    weights = (at or root) / "model.safetensors"
    if not weights.exists():
        newest = latest_checkpoint(run)
        if newest is None:
            raise CheckpointError(f"{run} must be a run directory with a model or a checkpoint, got none there")
        weights = newest / "model.safetensors"
    for name in ("config.yaml", "tokenizer.json"):
        if not (root / name).exists():
            raise CheckpointError(f"{root / name} is missing; a model is loaded with its config and tokenizer")
    if read_notes(weights).get("tokenizer") != file_hash(root / "tokenizer.json"):
        raise CheckpointError(f"{root}/tokenizer.json is not the one {weights} was trained with; bring it back")
    config = load_config(RunConfig, [str(root / "config.yaml")])
    tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
    model = build(config.model, load_sparse(weights, device), weights)
    return model.eval(), tokenizer, config


def run_corpus(run: str | Path, config: RunConfig) -> Corpus:
    """The corpus a run was trained on, in that run's tokens.

    Where its files have changed since (another machine's standard library, say), what is there now is read with the
    run's own tokenizer, and a warning says so. So it is, without one, where the tokenizer that the run was given is no
    longer where it was, seen from here.
    """
    tokenizer = Path(run) / "tokenizer.json"
    if config.data.tokenizer and not Path(config.data.tokenizer).exists():
        return prepare(dataclasses.replace(config.data, tokenizer=str(tokenizer)))
    corpus = prepare(config.data)
    if corpus.manifest["tokenizer_sha256"] == file_hash(tokenizer):
        return corpus
    log.warning("the corpus here is not the one %s was trained on; reading what is here with its tokenizer", run)
    return prepare(dataclasses.replace(config.data, tokenizer=str(tokenizer)))


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder that appears at `target`, replacing what is there, only if the body succeeds.

    Raises:
        CheckpointError: something could not be written; what was at `target` is untouched.
    """
    unfinished = target.with_name(f".{target.name}.unfinished")
    replaced = target.with_name(f".{target.name}.replaced")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if replaced.exists() and not target.exists():  # a kill came between the two renames below
            os.rename(replaced, target)
        for left_by_a_kill in (unfinished, replaced):
            shutil.rmtree(left_by_a_kill, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        for file in unfinished.iterdir():
            file.chmod(0o644)  # safetensors closes its files to everyone else
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        if target.exists():
            os.rename(target, replaced)
        os.rename(unfinished, target)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        if replaced.exists() and not target.exists():
            os.rename(replaced, target)
        raise CheckpointError(f"could not write {target}: {error}; what was there before is untouched") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run that were kept, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step_*"))


def _linear_maps(model: Transformer) -> list[tuple[str, Linear]]:
    return [(f"{name}.weight", m) for name, m in model.named_modules() if isinstance(m, Linear)]


def _weights(model: Transformer) -> dict[str, Tensor | SparseWeight]:
    """The state of a model by name, weights that are held at candidates as such."""
    return {**model.state_dict(), **{name: linear.held() for name, linear in _linear_maps(model)}}


def _moments(model: Transformer, optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    moments = {f"{name}.{key}": v for name, p in model.named_parameters() for key, v in optimizer.state[p].items()}
    held = {f"{name}.candidates": m.indices() for name, m in _linear_maps(model) if m.candidates is not None}
    return {**moments, **held}


def _remedy(folder: Path) -> str:
    return f"delete {folder} to resume from the checkpoint before it"
