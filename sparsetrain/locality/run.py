"""A run with its layout: the one kept with its model, and one found afterwards; and a copy with permuted weights."""

import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from sparsetrain import checkpoint
from sparsetrain.config import RunConfig, config_to_yaml
from sparsetrain.data import file_hash
from sparsetrain.locality.edges import Edges
from sparsetrain.locality.export import permuted
from sparsetrain.locality.positions import Layout, LocalityError, Plan, from_tensors, identity
from sparsetrain.locality.relayout import relayout
from sparsetrain.locality.wiring import Wiring
from sparsetrain.model import Transformer
from sparsetrain.sparsity import projected


@dataclass(frozen=True)
class LaidOutRun:
    """A run's model, its wires, and where its nodes lie.

    Attributes:
        folder: the run directory.
        model, tokenizer, config: as `checkpoint.load_run` gives them.
        edges: the nonzeros of the tensors that are projected in training.
        plan: the nodes; its sheet and whether tokens have places are those of the run's config.
        kept: the layout in the files of the model: the one that it was trained with, or exported by; or None.
    """

    folder: Path
    model: Transformer
    tokenizer: Tokenizer
    config: RunConfig
    edges: Edges
    plan: Plan
    kept: Layout | None

    @cached_property
    def afterwards(self) -> Layout:
        """A layout found from the weights alone: sweeps from the Fiedler order."""
        return relayout(self.edges, identity(self.plan), self.config.run.seed, fresh=True)

    @property
    def layout(self) -> Layout:
        """The kept layout, or else the one found afterwards."""
        return self.kept or self.afterwards


def open_run(run: str | Path) -> LaidOutRun:
    """Read a run's model, and the layout that was kept with it.

    Args:
        run: a run directory, or a `model` folder copied out of one.

    Raises:
        CheckpointError: the run holds no readable model, or its layout is damaged.
        LocalityError: its layout is of another architecture, or a matrix has no nonzeros.
    """
    model, tokenizer, config = checkpoint.load_run(run)
    wiring = Wiring(config.locality, model, projected(model, config.sparsity), config.run.seed)
    kept = _kept_layout(Path(run), wiring.plan)
    return LaidOutRun(Path(run), model, tokenizer, config, wiring.edges(), wiring.plan, kept)


def export_run(run: str | Path, folder: str | Path) -> Path:
    """Write a run directory whose weights are in the order of their nodes' places.

    The model is the same function, save for rounding. Circuits, checkpoints and metrics stay behind: circuits name
    channels, which have other numbers now.

    Args:
        run: a run directory.
        folder: one that does not exist yet; written whole or not at all.

    Returns:
        `folder`, with config.yaml, tokenizer.json, model.safetensors and the layout of the permuted model, in which
        nodes lie in the order of their indices and tokens where they were.

    Raises:
        LocalityError: `folder` exists.
        CheckpointError: see `open_run`; or it could not be written.
    """
    target = Path(folder)
    if target.exists():
        raise LocalityError(f"the folder to export to must be a new one, got {target}, which exists; name another")
    laid = open_run(run)
    model, layout = permuted(laid.model, laid.layout)
    config = replace(laid.config, run=replace(laid.config.run, name=target.name, out=str(target.parent)))
    with checkpoint.whole_folder(target) as unfinished:
        shutil.copyfile(_root(laid.folder) / "tokenizer.json", unfinished / "tokenizer.json")
        (unfinished / "config.yaml").write_text(config_to_yaml(config))
        notes = {"tokenizer": file_hash(unfinished / "tokenizer.json"), "permuted_from": str(laid.folder)}
        checkpoint.save_sparse(unfinished / "model.safetensors", model.state_dict(), **notes)
        checkpoint.save_sparse(unfinished / "layout.safetensors", layout.tensors(), **notes)
    return target


def _root(run: Path) -> Path:
    """Where the files of a run's finished model are, or those of a run that is not done."""
    return run / "model" if (run / "model").is_dir() else run


def _kept_layout(run: Path, plan: Plan) -> Layout | None:
    """From the finished model, or from the newest checkpoint of a run that is not done."""
    places = [_root(run), checkpoint.latest_checkpoint(run)]
    file = next((f for p in places if p and (f := p / "layout.safetensors").exists()), None)
    if file is None:
        return None
    try:
        return from_tensors(plan, checkpoint.load_sparse(file))
    except LocalityError as error:
        raise LocalityError(f"{file}: {error}") from None
