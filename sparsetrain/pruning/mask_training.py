"""What methods that learn masks share: the task as a loss of order one, and a training that outlives a kill."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from sparsetrain.config import ConfigError
from sparsetrain.files import write_whole
from sparsetrain.model import Transformer
from sparsetrain.pruning.ablation import BATCH, Ablation, draw_places
from sparsetrain.pruning.edges import EdgeGraph, all_answer_logits, fingerprint, gated_logits, like, n_edges, unflat
from sparsetrain.pruning.objective import Extremes, Metric
from sparsetrain.tasks import TaskData

log = logging.getLogger(__name__)

SAVE_EVERY = 50  # steps between saves of the state
FLAT = 1e-9  # a mean difference below this is no difference
MOST_KEPT = 2 << 30  # bytes of corrupted runs that are kept from one step to the next

State = dict[str, Tensor]


class StateError(ConfigError):
    """A saved training that cannot be gone on with."""


@dataclass(frozen=True)
class Objective:
    """How well a circuit does a task, on random prompts, in units of what cutting every edge changes.

    Attributes:
        extremes: outputs of all prompts.
        scale: the mean distance, over prompts, between the metric of the full model and with every edge cut.
        corrupted: of the corrupted prompts' runs what `graph.expand` needs; None where they are run at each step.
    """

    graph: EdgeGraph
    data: TaskData
    ablation: Ablation
    metric: Metric
    extremes: Extremes
    scale: float
    corrupted: Mapping[str, Tensor] | None = None

    def loss(self, gates: Tensor, n_prompts: int, generator: torch.Generator) -> Tensor:
        """Minus the metric of the circuit with these gates (n_edges,), on prompts drawn without replacement."""
        rows = torch.randperm(len(self.data), generator=generator)[:n_prompts].to(self.data.tokens.device)
        part = self.data.take(rows.tolist())
        places = draw_places(self.ablation, part.tokens, generator)
        part = part.trimmed()
        replacements = self.ablation.replacements(lambda tokens: self._read(tokens, rows), part, places)
        outputs = gated_logits(self.graph, part, unflat(self.graph, gates), replacements)
        ends = Extremes(self.extremes.full[rows], self.extremes.empty[rows])
        return -self.metric(outputs, part, ends).mean() / self.scale

    def _read(self, tokens: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """The sources of the corrupted prompts in these rows, whose tokens these are."""
        if self.corrupted is None:
            return self.graph.read(tokens)
        some = {name: x[..., rows, : tokens.shape[1], :] for name, x in self.corrupted.items()}
        return self.graph.expand(some)


def build_objective(graph: EdgeGraph, data: TaskData, ablation: Ablation, metric: Metric) -> Objective | None:
    """Measure both ends of the metric; None, and a warning, where cutting every edge changes nothing."""
    full, empty = (all_answer_logits(graph, data, like(graph, gate), ablation) for gate in (1.0, 0.0))
    ends = Extremes(full, empty)
    scale = (metric(full, data, ends) - metric(empty, data, ends)).abs().mean().item()
    if scale < FLAT:
        log.warning("the metric is the same with every edge cut; no edge matters to it, so all scores are 0")
        return None
    return Objective(graph, data, ablation, metric, ends, scale, _corrupted_runs(graph, data, ablation))


@torch.no_grad()
def _corrupted_runs(graph: EdgeGraph, data: TaskData, ablation: Ablation) -> dict[str, Tensor] | None:
    """What `graph.expand` needs of runs on all corrupted prompts; None without them, or where that would be too much.

    Of a prompt that ends early the first tokens are used, so the model must not look ahead.
    """
    if ablation.kind != "corrupted" or not graph.model.options.causal:
        return None
    one = graph.read_sites(data.corrupted[:1])
    if sum(x.nbytes for x in one.values()) * len(data) > MOST_KEPT:
        return None
    parts = [graph.read_sites(tokens) for tokens in data.corrupted.split(BATCH)]
    return {name: torch.cat([part[name] for part in parts], dim=-3) for name in one}


def train(
    state: State,
    step: Callable[[State, int, torch.Generator], None],
    n_steps: int,
    generator: torch.Generator,
    path: Path | None,
    about: dict[str, object],
) -> State:
    """Run `step` until `n_steps` are done; begin where the file at `path` stopped, if there is one.

    Args:
        state: tensors that `step` changes in place, as they are at the start.
        step: called with the state, the number of steps done and the generator.
        n_steps: how many steps.
        generator: what the steps draw from; its state is saved and set too.
        path: a safetensors file that is written whole every SAVE_EVERY steps and at the end; None saves nothing.
        about: what makes this training another than others; a file of another is refused.

    Returns:
        The state at the end; the same bits whether or not it was stopped in between.

    Raises:
        StateError: the file is damaged, or of another training.
    """
    note = json.dumps(about, sort_keys=True)
    done = _load(state, generator, path, note) if path is not None and path.exists() else 0
    for k in tqdm(range(done, n_steps), initial=done, total=n_steps, desc="learning masks", disable=None):
        step(state, k, generator)
        if path is not None and ((k + 1) % SAVE_EVERY == 0 or k + 1 == n_steps):
            _save(state, generator, path, note, k + 1)
    return state


def adam_(values: Tensor, gradient: Tensor, state: State, k: int, lr: float) -> None:
    """One step of Adam, the k-th from 0, with the moments in `state`, which the first step makes."""
    m, v = state["moment1"], state["moment2"]
    m.lerp_(gradient, 0.1)
    v.lerp_(gradient.square(), 0.001)
    values -= lr * (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)


def new_state(values: Tensor) -> State:
    """The values to learn, and Adam's moments of them."""
    return {"values": values, "moment1": torch.zeros_like(values), "moment2": torch.zeros_like(values)}


def about_edges(
    graph: EdgeGraph, data: TaskData, ablation: Ablation, metric: Metric, options: object, seed: int
) -> dict[str, object]:
    """What `train` tells one training of edge masks from another by."""
    units = f"{graph.kind}, {n_edges(graph.edges)} edges"
    asked = {"metric": getattr(metric, "__name__", "metric"), "options": repr(options), "seed": seed}
    return about(units, graph.model, data, ablation, asked)


def about(
    units: str, model: Transformer, data: TaskData, ablation: Ablation, asked: dict[str, object]
) -> dict[str, object]:
    """What `train` tells one training from another by: what is masked, where, for which prompts, and what was asked."""
    return {
        "units": units,
        "data": f"{data.name}, {len(data)} prompts",
        "weights and prompts": fingerprint(model, data)[:16],
        "ablation": ablation.label(),
        **asked,
    }


def _save(state: State, generator: torch.Generator, path: Path, note: str, done: int) -> None:
    tensors = {name: x.cpu().contiguous() for name, x in state.items()}
    tensors["generator"] = generator.get_state()
    write_whole(path, save(tensors, {"about": note, "done": str(done)}))


def _load(state: State, generator: torch.Generator, path: Path, note: str) -> int:
    """Fill `state` from the file; the number of steps that were done."""
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            if found.get("about") != note:
                raise StateError(
                    f"{path} must be of this training, {note}, got {found.get('about')}; delete it to start anew"
                )
            for name, x in state.items():
                x.copy_(file.get_tensor(name))
            generator.set_state(file.get_tensor("generator"))
            return int(found["done"])
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise StateError(f"{path} must be a saved training, got: {error}; delete it to start anew") from None
