"""The stage `transfer`: a circuit of the sparse model carried to the dense one, and how far it explains that one.

runs/<name>/bridges/<bridge>/transfer/<task>/<circuit>/transfer.json
"""

import json
import logging
from pathlib import Path

import torch
from torch import Tensor

from sparsetrain import checkpoint
from sparsetrain.bridging import steering
from sparsetrain.bridging.bridge import Bridge
from sparsetrain.bridging.dense import OwnModel, load_dense
from sparsetrain.bridging.directions import Direction, at_all_reads, transferred
from sparsetrain.bridging.interventions import Case, measure
from sparsetrain.bridging.residuals import BridgeError, Residuals
from sparsetrain.bridging.same_tokens import same_tokens
from sparsetrain.bridging.train import check_models, is_finished, load_bridge
from sparsetrain.config import RunConfig
from sparsetrain.data import Corpus, batch, evaluation_batches, file_hash
from sparsetrain.files import write_json
from sparsetrain.pruning.circuit import Circuit, CircuitError, circuit_folder, load_circuit
from sparsetrain.pruning.edges import weights_hash
from sparsetrain.pruning.graph import node_sites
from sparsetrain.tasks import TaskData, TaskError, encode_task, load_task

log = logging.getLogger(__name__)

FORMAT = "sparsetrain-transfer-2"
N_TOKENS = 4096  # of training text for means and scales, and of held-out text for the loss


def transfer(
    run: str | Path, task: str, circuit: str = "node_masks", bridge: str = "dense",
    device: str | torch.device = "cpu", n_pairs: int = 32, n_random: int = 20,
) -> Path:  # fmt: skip
    """Carry a circuit to the dense model of a bridge, and measure what it does there.

    Args:
        run: the run directory of the sparse model.
        task: the task's name.
        circuit: its folder's name under circuits/<task>/.
        bridge: its folder's name under bridges/.
        device: where both models go.
        n_pairs: pairs of held-out prompts, and of training prompts.
        n_random: draws of random directions.

    Returns:
        The file transfer.json; see `measure`.

    Raises:
        BridgeError: there is no such bridge, a model has other weights than it had then, or no node of the circuit can
            be transferred.
        CircuitError: there is no such circuit, it is one of components, or of another model.
        CheckpointError, DataError, TaskError, WriteError: something cannot be read, drawn or written.
    """
    folder = circuit_folder(run, task, circuit)
    carried = load_circuit(folder, device)
    loaded, config = load_bridge(_bridge_folder(run, bridge), device)
    model, tokenizer, run_config = checkpoint.load_run(run, device)
    sparse, dense = OwnModel(model.requires_grad_(False), tokenizer), load_dense(config.bridge.dense, device)
    _check(carried, folder, sparse)
    same_tokens(sparse, dense)
    check_models(_bridge_folder(run, bridge), {"sparse": sparse, "dense": dense})
    corpus = checkpoint.run_corpus(run, run_config)
    reference = _reference(corpus, run_config).to(device)
    found, left = transferred(carried.nodes, loaded, sparse, dense, reference)
    if not found:
        why = next(iter(left.values()), "none of its nodes reads the residual stream")
        raise BridgeError(f"the circuit in {folder} must have a node that can be carried across, got none: {why}")
    seed = carried.settings["prune"]["seed"]
    heldout, train = _task_data(carried, sparse, n_pairs, seed, device)
    channels = transferred(at_all_reads(found, carried.nodes, sparse), loaded, sparse, dense, reference)[0]
    directions = found, channels
    case = _case(sparse, dense, directions, (heldout, train), reference, corpus, run_config, n_random, seed)
    facts = {
        "format": FORMAT, "made_of": made_of(folder, _bridge_folder(run, bridge)),
        "task": carried.task, "circuit": circuit, "bridge": bridge, "dense": config.bridge.dense,
        "n_nodes": len(carried.node_names()), "not_transferable": left,
        "explained_to_dense": _explained(_bridge_folder(run, bridge), loaded, found),
        "answers": [tokenizer.decode([int(heldout.correct[side::2].mode().values)]) for side in (0, 1)],
    }  # fmt: skip
    out = _bridge_folder(run, bridge) / "transfer" / carried.task / circuit
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "transfer.json", facts | measure(case))
    return out / "transfer.json"


def made_of(circuit: Path, bridge: Path) -> dict[str, str]:
    """What tells the circuit and the bridge that a transfer rests on: the hashes of their tensors."""
    return {
        "circuit": file_hash(circuit / "masks.safetensors"),
        "bridge": file_hash(bridge / "bridge.safetensors"),
    }


def _bridge_folder(run: str | Path, bridge: str) -> Path:
    bridges = Path(run) / "bridges"
    there = sorted(folder.name for folder in bridges.glob("[!.]*") if is_finished(folder))
    if bridge not in there:
        found = ", ".join(there) or "none"
        raise BridgeError(f"--bridge must be one that is finished in {bridges}, which are {found}, got {bridge!r}")
    return bridges / bridge


def _check(circuit: Circuit, folder: Path, sparse: OwnModel) -> None:
    if circuit.graph != "channel":
        raise CircuitError(
            f"{folder} must hold a circuit of channels, got one of the graph {circuit.graph!r}, whose heads and MLPs "
            "are no directions; prune with graph=channel"
        )
    if {site: len(mask) for site, mask in circuit.nodes.items()} != node_sites(sparse.model.options):
        raise CircuitError(f"{folder} must hold a circuit of this run's model, got one with other sites; prune again")
    ours = weights_hash(sparse.model)
    if (theirs := circuit.settings.get("model", ours)) != ours:
        raise CircuitError(
            f"{folder} must hold a circuit of this run's model as it is now ({ours}), got one of other weights "
            f"({theirs}); prune again"
        )


def _reference(corpus: Corpus, config: RunConfig) -> Tensor:
    n = -(-N_TOKENS // config.model.n_ctx)
    return batch(corpus.tokens("train"), config.run.seed, 0, 0, n, config.model.n_ctx, config.train.stride)[0]


def _task_data(
    circuit: Circuit, sparse: OwnModel, n_pairs: int, seed: int, device: str | torch.device
) -> tuple[TaskData, ...]:
    """Held-out and training prompts; those of a pair are equally long where such pairs can be had."""
    task = load_task(circuit.settings.get("task", circuit.task))

    def drawn(aligned: bool) -> tuple[TaskData, ...]:
        splits = ("heldout", "train")
        parts = (encode_task(task, sparse.tokenizer, n_pairs, s, seed, sparse.n_ctx, aligned) for s in splits)
        return tuple(part.trimmed().to(device) for part in parts)

    try:
        return drawn(True)
    except TaskError:  # which another draw repeats, if it is not for the lengths
        found = drawn(False)
        log.info("prompts of %s's pairs differ in length here: compared from their last tokens back", task.name)
        return found


def _case(
    sparse: OwnModel, dense: Residuals, directions: tuple[list[Direction], ...], drawn: tuple[TaskData, ...],
    reference: Tensor, corpus: Corpus, config: RunConfig, n_random: int, seed: int,
) -> Case:  # fmt: skip
    names = list(steering.by_read(directions[1]))
    prompts = [steering.read_prompts(dense, data, names) for data in drawn]
    heldout, train = ((p, steering.node_changes(sparse, directions[1], p)) for p in prompts)
    with torch.no_grad():
        seen = dense.run(reference, names)[0]
    size, n_ctx = config.train.batch_size, config.model.n_ctx
    batches = evaluation_batches(corpus.tokens("val"), -(-N_TOKENS // (size * n_ctx)), size, n_ctx, config.train.stride)
    text = [(x.to(reference.device), y.to(reference.device)) for x, y in batches]
    means = {name: seen[name].flatten(0, -2).mean(0) for name in names}
    return Case(dense, *directions, heldout, train, means, text, steering.plain(dense, drawn[1]), n_random, seed)


def _explained(folder: Path, bridge: Bridge, found: list[Direction]) -> dict[str, float]:
    """Share of the dense residual's variance that the decoder explains, by the site of the sparse model."""
    rows = json.loads((folder / "report.json").read_text())["pairs"]
    return {row["sparse"]: row["explained_to_dense"] for row in rows if row["sparse"] in {d.site for d in found}}
