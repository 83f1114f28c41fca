"""When a circuit forms: the same search on every checkpoint that a run has kept."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from sparsetrain.checkpoint import CheckpointError, checkpoints
from sparsetrain.config import config_to_dict
from sparsetrain.data import file_hash
from sparsetrain.files import write_json, write_whole
from sparsetrain.prune_config import PruneConfig
from sparsetrain.pruning.circuit import load_circuit
from sparsetrain.pruning.prune import circuit_folder, prune
from sparsetrain.tasks import load_task

log = logging.getLogger(__name__)

SHOWN = ("task_loss", "full_model_loss", "full_model_loss_calibrated", "completeness_loss", "n_nodes", "n_edges", "kl")


def over_training(
    run: str | Path, task: str, config: PruneConfig, method: str = "node_masks", device: str = "cpu"
) -> Path:
    """Prune every kept checkpoint of a run for a task; what the same settings have found already is not done again.

    Args:
        run: a run directory; `train.keep_checkpoints` says how many it keeps.
        task, config, method, device: as for `prune`.

    Returns:
        The file `formation.json`: for each checkpoint its `step`, whether a circuit reached the target, and measures of
        the circuit on held-out prompts; of a checkpoint without a circuit only the full model's calibrated loss.

    Raises:
        CheckpointError: the run has kept no checkpoint.
        And what `prune` raises.
    """
    run = Path(run)
    kept = checkpoints(run)
    if not kept:
        raise CheckpointError(
            f"{run} must hold checkpoints to prune, got none; train with train.keep_checkpoints higher"
        )
    name = load_task(task).name
    text = file_hash(Path(task)) if Path(task).suffix == ".jsonl" else None
    rows = []
    for i, at in enumerate(kept, 1):
        log.info("checkpoint %d of %d: %s", i, len(kept), at.name)
        folder = circuit_folder(run, name, config.name or method, at)
        asked = [method, config_to_dict(config), file_hash(at / "model.safetensors"), text]
        settings = json.dumps(asked, indent=1)
        done = folder.with_name(f".{at.name}-settings.json")
        if not folder.exists() or not done.exists() or done.read_text() != settings:
            done.unlink(missing_ok=True)  # first, lest it vouch for what a killed search leaves
            shutil.rmtree(folder, ignore_errors=True)
            prune(run, task, config, method, device, at)
            write_whole(done, settings.encode())
        rows.append({"step": int(at.name.removeprefix("step_")), **_row(folder)})
    file = circuit_folder(run, name, config.name or method, kept[0]).parent / "formation.json"
    write_json(file, rows)
    return file


def _row(folder: Path) -> dict[str, Any]:
    if (folder / "circuit.json").exists():
        measures = load_circuit(folder).measures
        return {"reached": True, **{key: measures[key] for key in SHOWN}}
    unreached = json.loads((folder / "unreached.json").read_text())
    return {"reached": False, "full_model_loss_calibrated": unreached["full_model_loss"]}
