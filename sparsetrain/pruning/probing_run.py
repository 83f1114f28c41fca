"""Circuit probing of a run: search, measures and controls, saved as JSON and safetensors.

run -> Transformer, tokenizer -> prompts with labels -> mask parameters -> Probing ->
runs/<name>/circuits/<task>/probing/<variable>.<sublayer>/{probing.json, masks.safetensors}
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsetrain import checkpoint
from sparsetrain.checkpoint import whole_folder
from sparsetrain.config import RunConfig
from sparsetrain.data import evaluation_batches
from sparsetrain.model import Transformer
from sparsetrain.prune_config import ProbingOptions
from sparsetrain.pruning.ablation import Ablation, build_ablation, refuse_without_corpus, site_reader
from sparsetrain.pruning.circuit import CircuitError, read_result
from sparsetrain.pruning.graph import NodeSet
from sparsetrain.pruning.probing import Found, Sublayer, probe
from sparsetrain.pruning.probing_data import ProbeData, probe_data
from sparsetrain.pruning.probing_measures import measure_probing
from sparsetrain.task_probing import probing_task
from sparsetrain.tasks import TaskError

log = logging.getLogger(__name__)

FORMAT = "sparsetrain-probing-1"


@dataclass(frozen=True)
class Probing:
    """The neurons of a sublayer that compute a variable, with measures and controls.

    Attributes:
        task, variable, sublayer: what was looked for, and where.
        tau: for each site the mask parameters (width,); a neuron was found where they are above 0.
        measures: see `measure_probing`; with the losses of the search.
        controls: the same for shuffled labels and for variables that the answer does not need, by name; `skipped`, with
            the reason, for one whose labels are of no use here.
        settings: the ProbingOptions, and the run.
    """

    task: str
    variable: str
    sublayer: str
    tau: dict[str, Tensor]
    measures: dict[str, Any]
    controls: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def neurons(self) -> NodeSet:
        """For each site a boolean mask over its channels."""
        return {site: t > 0 for site, t in self.tau.items()}

    def neuron_names(self) -> list[str]:
        """Every neuron found, as "site:channel"."""
        return [f"{site}:{c}" for site, mask in self.neurons.items() for c in mask.nonzero().flatten().tolist()]


def probe_run(run: str | Path, task: str, options: ProbingOptions, device: str = "cpu") -> Probing:
    """Find, measure and save the neurons of a run's sublayer that compute a variable of a task.

    A search that was stopped goes on where it stopped when this is called again, to the same bits on a CPU.

    Args:
        run: a run directory.
        task: a probing task; see `sparsetrain.task_probing`.
        options: see ProbingOptions.
        device: where to compute.

    Returns:
        The result, saved under `run`/circuits/<task>/probing/<variable>.<sublayer>/.

    Raises:
        TaskError: there is no such task or variable, or the labels or prompts are of no use.
        ConfigError: the model has no such sublayer.
        CheckpointError: the run holds no readable model, or the result could not be written.
    """
    run = Path(run)
    refuse_without_corpus(run, options.ablation)
    model, tokenizer, config = checkpoint.load_run(run, device)
    found = probing_task(task)
    n_pairs = options.train_pairs, options.heldout_pairs

    def drawn(name: str | None) -> tuple[ProbeData, ...]:
        asked = task, name, tokenizer, n_pairs, options.seed, config.model.n_ctx, options.position
        return tuple(part.to(device) for part in probe_data(*asked))

    train, heldout = drawn(options.variable)
    absent, controls = _absent(drawn, found.absent if found and options.controls else ())
    log.info("probing %s for %s: %d prompts to learn on, %d held out",
             options.sublayer, train.variable, len(train), len(heldout))  # fmt: skip
    ablation = sublayer_ablation(Sublayer(model, options.sublayer), run, config, train, options)
    folder = run / "circuits" / task / "probing" / f"{train.variable}.{options.sublayer}"
    states = folder.with_name(f".{folder.name}.searches")
    search, measures = _searched(model, (train, heldout), ablation, options, states / "search.safetensors")
    if options.controls:
        shuffled = tuple(part.shuffled(options.seed) for part in (train, heldout))
        for i, pair in enumerate((shuffled, *absent)):
            if (name := pair[0].variable) != train.variable:
                log.info("control: the same search for %s", name)
                file = states / f"control_{i}.safetensors"
                controls[name] = _searched(model, pair, ablation, options, file)[1]
    settings = {"probing": asdict(options), "run": run.name}
    result = Probing(task, train.variable, options.sublayer, search.tau, measures, controls, settings)
    save_probing(folder, result)
    shutil.rmtree(states, ignore_errors=True)
    return result


def _absent(
    drawn: Callable[[str], tuple[ProbeData, ...]], names: Iterable[str]
) -> tuple[list[tuple[ProbeData, ...]], dict[str, dict[str, object]]]:
    """The prompts for variables that the answer does not need; and of those that have no prompts of use, why not."""
    found, skipped = [], {}
    for name in names:
        try:
            found.append(drawn(name))
        except TaskError as error:
            log.warning("the control %s is skipped: %s", name, error)
            skipped[name] = {"skipped": str(error)}
    return found, skipped


def sublayer_ablation(
    sublayer: Sublayer, run: Path, config: RunConfig, data: ProbeData, options: ProbingOptions
) -> Ablation:
    """What replaces the neurons of a sublayer; reads the run's corpus under `mean_data` alone."""
    corpus: list[Tensor] = []
    if options.ablation == "mean_data":
        tokens, n_ctx = checkpoint.run_corpus(run, config).tokens("train"), config.model.n_ctx
        n_batches = -(-max(1, options.reference_tokens // n_ctx) // 32)
        corpus = [x.to(data.label.device) for x, _ in evaluation_batches(tokens, n_batches, 32, n_ctx)]
    return build_ablation(site_reader(sublayer.model, sublayer.widths), options.ablation, corpus, data.prompts)


def save_probing(folder: Path, probing: Probing) -> None:
    """Write a result into `folder`, whole or not at all: `probing.json`, and `masks.safetensors` with `tau.<site>`.

    Raises:
        CheckpointError: it could not be written.
    """
    written = {"format": FORMAT, **dataclasses.asdict(dataclasses.replace(probing, tau={}))}
    written = {**written, "sites": list(probing.tau), "neurons": probing.neuron_names()}
    del written["tau"]
    with whole_folder(folder) as unfinished:
        (unfinished / "probing.json").write_text(json.dumps(written, indent=1) + "\n")
        save_file({f"tau.{s}": t.cpu().contiguous() for s, t in probing.tau.items()}, unfinished / "masks.safetensors")


def load_probing(folder: str | Path, device: str | torch.device = "cpu") -> Probing:
    """Read what `save_probing` wrote; needs neither the model nor the run.

    Raises:
        CircuitError: a file is missing, damaged or not such a result.
    """
    read, tensors = read_result(Path(folder), "probing.json", FORMAT, device)
    try:
        tau = {site: tensors[f"tau.{site}"] for site in read["sites"]}
        names = [f.name for f in dataclasses.fields(Probing) if f.name != "tau"]
        return Probing(tau=tau, **{name: read[name] for name in names})
    except (KeyError, TypeError) as error:
        raise CircuitError(f"{folder} holds a damaged result: {type(error).__name__} {error}") from None


def _searched(
    model: Transformer, data: tuple[ProbeData, ProbeData], ablation: Ablation, options: ProbingOptions, state: Path
) -> tuple[Found, dict[str, Any]]:
    found = probe(model, data[0], options, ablation, state)
    losses = {"first_loss": found.first_loss, "last_loss": found.last_loss}
    return found, {**measure_probing(model, found, data, ablation, options), **losses}
