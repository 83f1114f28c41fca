"""Circuit probing: which neurons of one sublayer compute a variable (Lepori, Serre and Pavlick 2023)."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from sparsetrain.config import ConfigError
from sparsetrain.files import write_whole
from sparsetrain.model import Transformer, site_widths
from sparsetrain.prune_config import ProbingOptions
from sparsetrain.pruning.ablation import BATCH, Ablation
from sparsetrain.pruning.evaluate import mask_edits
from sparsetrain.pruning.graph import NodeSet
from sparsetrain.pruning.probing_data import ProbeData, check_labels

log = logging.getLogger(__name__)

# The outputs of a sublayer's weight matrices; what the published code calls neurons.
NEURON_SITES = {"attn": ("q", "k", "v", "attn_out"), "mlp": ("mlp_act", "mlp_out")}
SMALL = 1e-5  # keeps the logarithm finite for a prompt without another of its label in the batch


def soft_nearest_neighbours(updates: Tensor, label: Tensor) -> Tensor:
    """How far vectors (N, D) are from having those of their own label (N,) as neighbours; 0-d, in nats.

    The mean over i of -log[(sum over j of the same label, e^-d) / (sum over all j, e^-d)], j other than i, with
    d = 1 - cosine. The cosine with a zero vector is 0, and it passes no gradient.
    """
    length = torch.linalg.vector_norm(updates, dim=-1, keepdim=True)
    unit = updates / torch.where(length > 0, length, 1)
    near = (unit @ unit.T - 1).exp()
    near = near * ~torch.eye(len(label), dtype=torch.bool, device=label.device)
    same = near * (label[:, None] == label)
    return ((near.sum(1) + SMALL).log() - (same.sum(1) + SMALL).log()).mean()


@dataclass(frozen=True)
class Sublayer:
    """The attention or the MLP of one block, run on its own: its input does not depend on its masks.

    Attributes:
        model: the transformer; its weights get no gradient.
        name: `blocks.0.attn`, `blocks.2.mlp` and their like.
    """

    model: Transformer
    name: str

    def __post_init__(self) -> None:
        blocks = range(self.model.options.n_layers)
        names = [f"blocks.{l}.{part}" for l in blocks for part in NEURON_SITES]
        if self.name not in names:
            raise ConfigError(f"sublayer must be one of {', '.join(names)}, got {self.name!r}")

    @property
    def widths(self) -> dict[str, int]:
        """Its sites whose channels are neurons, with their widths."""
        prefix, _, part = self.name.rpartition(".")
        every = site_widths(self.model.options)
        return {site: every[site] for kind in NEURON_SITES[part] if (site := f"{prefix}.{kind}")}

    @torch.no_grad()
    def inputs(self, data: ProbeData) -> Tensor:
        """The residual stream that it reads: (N, T, D), or (N, 1, D) at the position for an MLP."""
        prefix, _, part = self.name.rpartition(".")
        site = f"{prefix}.{'resid_pre' if part == 'attn' else 'resid_mid'}"
        n_tokens = int(data.position.max()) + 1
        parts = []
        for rows in torch.arange(len(data), device=data.position.device).split(BATCH):
            seen: dict[str, Tensor] = {}
            tokens = data.prompts.tokens[rows, :n_tokens] if self.model.options.causal else data.prompts.tokens[rows]
            self.model.final_resid(tokens, self.model.visitor(seen, [site]))
            x = seen[site]
            parts.append(
                x if part == "attn" else x[torch.arange(len(x), device=x.device), data.position[rows]][:, None]
            )
        return torch.cat(parts)

    def updates(self, x: Tensor, position: Tensor, masks: NodeSet, replacements: Mapping[str, Tensor]) -> Tensor:
        """What it adds to the residual stream (n, D) at `position` (n,), with masked neurons replaced.

        Args:
            x: rows of `inputs`.
            position: of the same prompts.
            masks: for each site of `widths` a mask, boolean, or float that gradients flow to.
            replacements: for each site what replaces its activations.
        """
        prefix, _, part = self.name.rpartition(".")
        visit = self.model.visitor({}, (), mask_edits(masks, replacements))
        module = getattr(self.model.get_submodule(prefix), part)
        if part == "mlp":
            return module(x, self._vectors(position), f"{prefix}.", visit)[:, 0]
        out = module(x, self._vectors(torch.arange(x.shape[1], device=x.device)), f"{prefix}.", visit)
        return out[torch.arange(len(x), device=x.device), position]

    def _vectors(self, position: Tensor) -> Tensor | None:
        """Position vectors that are read beside the residual stream: (T, d_pos), or (n, 1, d_pos) for an MLP."""
        if self.model.options.positions != "concat":
            return None
        vectors = self.model.positions.weight[position]
        return vectors[:, None] if self.name.endswith(".mlp") else vectors


@dataclass(frozen=True)
class Found:
    """The neurons that a search found.

    Attributes:
        tau: for each site the mask parameters (width,), which rank its neurons.
        first_loss, last_loss: mean over the first and over the last epoch, penalty included, in nats.
    """

    tau: dict[str, Tensor]
    first_loss: float
    last_loss: float

    @property
    def neurons(self) -> NodeSet:
        """For each site a boolean mask over its channels."""
        return {site: t > 0 for site, t in self.tau.items()}


def probe(
    model: Transformer, data: ProbeData, options: ProbingOptions, ablation: Ablation, state: Path | None = None
) -> Found:
    """Learn which neurons of a sublayer bring prompts of one label together and keep others apart.

    Every neuron has a mask sigmoid(T m): m starts at 0, and T rises from 1 to `final_temperature` by the same factor
    after each epoch, until the mask is all but hard. The loss is `soft_nearest_neighbours` of the sublayer's update,
    plus `count_penalty` times the sum of the masks. Each batch is a pure function of (seed, epoch).

    Args:
        model: any model; its parameters get no gradient.
        data: training prompts with their labels.
        options: see ProbingOptions.
        ablation: what replaces a masked neuron: zero, or a mean.
        state: a file that the search is resumed from, and written to after every epoch.

    Raises:
        TaskError: the labels are of no use (see `check_labels`).
        ConfigError: the model has no such sublayer.

    Source: Lepori, Serre and Pavlick 2023; continuous sparsification is Savarese, Silva and Maire 2020's. Differs: a
    mask multiplies a neuron's output, behind activation and AbsTopK, where theirs multiplies the row of the weight,
    and so leaves the neuron at its bias; the batches of an epoch are of the same size, within one.
    """
    check_labels(data)
    sublayer = Sublayer(model, options.sublayer)
    x = sublayer.inputs(data)
    replacements = {site: ablation.values[site] for site in sublayer.widths}
    search = _Search(sum(sublayer.widths.values()), options, x.device)
    identity = _identity(sublayer, data, options, x, replacements)
    if state is not None:
        search.restore(state, identity)
    progress = tqdm(total=options.epochs, initial=search.epoch, desc="probing", unit=" epochs", disable=None)
    with _frozen(model), progress:
        while search.epoch < options.epochs:
            temperature = options.final_temperature ** (search.epoch / options.epochs)
            losses = []
            for rows in _batches(len(data), options, search.epoch):
                rows = rows.to(x.device)
                masks = _by_site(torch.sigmoid(temperature * search.tau), sublayer.widths)
                updates = sublayer.updates(x[rows], data.position[rows], masks, replacements)
                kept = sum(mask.sum() for mask in masks.values())
                loss = soft_nearest_neighbours(updates, data.label[rows]) + options.count_penalty * kept
                search.step(loss)
                losses.append(loss.item())
            search.finish_epoch(sum(losses) / len(losses))
            progress.update()
            if state is not None:
                search.save(state, identity)
    return Found(_by_site(search.tau.detach(), sublayer.widths), *search.losses)


class _Search:
    """Mask parameters (n,), their optimiser and the epoch: all there is to a search that can be resumed."""

    def __init__(self, n: int, options: ProbingOptions, device: torch.device):
        self.tau = torch.zeros(n, device=device, requires_grad=True)
        self.optimizer = torch.optim.AdamW([self.tau], lr=options.lr)
        self.epoch = 0
        self.losses = (0.0, 0.0)  # of the first epoch and of the last

    def step(self, loss: Tensor) -> None:
        (self.tau.grad,) = torch.autograd.grad(loss, (self.tau,))
        self.optimizer.step()

    def finish_epoch(self, loss: float) -> None:
        self.losses = (self.losses[0] if self.epoch else loss, loss)
        self.epoch += 1

    def save(self, path: Path, identity: str) -> None:
        moments = self.optimizer.state[self.tau]
        tensors = {"tau": self.tau.detach(), **moments, "losses": torch.tensor(self.losses, dtype=torch.float64)}
        notes = {"identity": identity, "epoch": str(self.epoch)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save({name: t.cpu() for name, t in tensors.items()}, notes))

    def restore(self, path: Path, identity: str) -> None:
        """Go on from what was saved of the same search; anything else there is left to be overwritten."""
        if not path.exists():
            return
        try:
            with safe_open(path, framework="pt", device=str(self.tau.device)) as file:
                notes, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            log.warning("%s cannot be read (%s); the search starts anew", path, error)
            return
        if notes.get("identity") != identity:
            log.warning("%s is of a search with other settings, prompts or weights; the search starts anew", path)
            return
        self.tau.data.copy_(tensors.pop("tau"))
        self.losses = tuple(tensors.pop("losses").tolist())
        self.epoch = int(notes["epoch"])
        self.optimizer.state[self.tau] = {**tensors, "step": tensors["step"].cpu()}
        log.info("resuming the search at epoch %d", self.epoch)


def _batches(n: int, options: ProbingOptions, epoch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tensor_split(-(-n // options.batch_size))


def _by_site(values: Tensor, widths: Mapping[str, int]) -> dict[str, Tensor]:
    return dict(zip(widths, values.split(list(widths.values())), strict=True))


def _identity(
    sublayer: Sublayer, data: ProbeData, options: ProbingOptions, x: Tensor, replacements: Mapping[str, Tensor]
) -> str:
    """A hash of all that a search depends on."""
    weights = sublayer.model.get_submodule(sublayer.name).state_dict()
    digest = hashlib.sha256(json.dumps(asdict(options), sort_keys=True).encode())
    for tensor in (x, data.label, data.position, *weights.values(), *replacements.values()):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _frozen(model: Transformer) -> Iterator[None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
