"""The typed configuration of a run: every key, its default, unit, range and meaning live here alone.

Those of a search for a circuit live in `prune_config.py`, declared and read in the same way.
"""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

C = TypeVar("C")
EVERY_SITE = "model.abs_topk"  # as a key, all shares under it at once
STRONGEST = 60  # strength x length of the sheet by selection: exp(-60) of a weight is still a float32


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every problem found."""


def option(default: Any, meaning: str, unit: str = "", low: float | None = None, high: float | None = None):
    """Declare one key: its default, what it means, its unit and its closed range [low, high]."""
    meta = {"help": meaning, "unit": unit, "low": low, "high": high}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class RunOptions:
    name: str = option("run", "name of the run's folder")
    out: str = option("runs", "folder that holds all runs")
    seed: int = option(0, "seed of initialisation and of batch order", low=0)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to train; auto takes cuda if there is one")
    dtype: Literal["float32", "bfloat16"] = option("float32", "autocast type; weights stay float32")
    threads: int | None = option(
        None, "CPU threads; null: one or all, whichever is faster at the time, in bfloat16 all", low=1
    )
    compile: bool = option(False, "run the model through torch.compile")
    sharded: bool = option(
        False, "under torchrun each process holds a share of every weight (FSDP), for models that do not fit in one; "
        "false: each holds all (DDP)",
    )  # fmt: skip
    kernels: Literal["auto", "reference"] = option(
        "auto", "auto: sparse products where they pay, fused ops; reference: dense products and plain torch throughout"
    )


@dataclass(frozen=True)
class DataOptions:
    source: Literal["stdlib", "text", "json", "parquet", "hub", "none"] = option(
        "stdlib",
        "stdlib: Python source of this interpreter's standard library; hub: a Hugging Face data set; none: no corpus, "
        "as a model that was imported",
    )
    paths: list[str] = option([], "files, globs, or folders (.txt .md .py .rst; .json .jsonl; .parquet)")
    hub: str | None = option(None, "name of a Hugging Face data set, read as a stream")
    hub_subset: str | None = option(None, "configuration of the Hugging Face data set")
    hub_split: str = option("train", "split of the Hugging Face data set")
    text_column: str = option("text", "column that holds the text in json, parquet and hub data")
    val_fraction: float = option(0.05, "share of documents held out, chosen by content", "fraction", 0.001, 0.5)
    max_tokens: int | None = option(
        None, "stop reading at about this many tokens (256 documents at a time)", "tokens", low=1
    )
    tokenizer: str | None = option(None, "a tokenizer.json to use; null trains a byte-level BPE on the corpus")
    end_of_text: str = option("<|endoftext|>", "token that ends each document; a tokenizer that is named must have it")
    vocab_size: int = option(2048, "vocabulary of the BPE that is trained", "tokens", 257, 65536)
    tokenizer_characters: int = option(50_000_000, "text the BPE is trained on, at most", "characters", low=1000)
    cache: str = option("data", "folder that holds prepared corpora")


@dataclass(frozen=True)
class AbsTopKOptions:
    attn_in: float = option(
        0.25, "share kept after the norm before attention; model.abs_topk=SHARE sets all eight", "fraction", 0, 1
    )
    q: float = option(0.25, "share of query channels kept, over all heads together", "fraction", 0, 1)
    k: float = option(0.25, "share of key channels kept, over all heads together", "fraction", 0, 1)
    v: float = option(0.25, "share of value channels kept, over all heads together", "fraction", 0, 1)
    attn_out: float = option(0.25, "share of attention's write to the residual kept", "fraction", 0, 1)
    mlp_in: float = option(0.25, "share kept after the norm before the MLP", "fraction", 0, 1)
    mlp_act: float = option(0.25, "share of MLP neurons kept", "fraction", 0, 1)
    mlp_out: float = option(0.25, "share of the MLP's write to the residual kept", "fraction", 0, 1)


@dataclass(frozen=True)
class ModelOptions:
    n_layers: int = option(8, "blocks, each attention then MLP", low=1)
    d_model: int = option(256, "width of the residual stream", "channels", low=1)
    d_head: int = option(16, "width of a head; d_model / d_head heads", "channels", low=1)
    mlp_ratio: int = option(4, "MLP neurons per residual channel", low=1)
    n_ctx: int = option(256, "tokens in a training sequence", "tokens", low=2)
    activation: Literal["gelu", "gelu_tanh", "relu"] = option(
        "gelu", "nonlinearity of the MLP; gelu_tanh: GPT-2's approximation"
    )
    norm: Literal["rms", "layer", "none"] = option("rms", "norm before attention, MLP and unembedding; layer: GPT-2's")
    causal: bool = option(True, "each position sees what comes before it alone; false: for models that are loaded")
    bias: bool = option(True, "biases in the four linear maps of a block")
    bigram: bool = option(True, "dense table of bigram logits, added to the output")
    sink: bool = option(True, "a learnt logit per head in the softmax's denominator")
    positions: Literal["none", "learned", "concat"] = option(
        "none", "learned: added to the embedding; concat: read-only channels beside the residual"
    )
    d_pos: int = option(32, "width of concatenated positions", "channels", low=1)
    norm_eps: float = option(1.1920929e-7, "epsilon of the norm (float32's machine epsilon)", low=0)
    abs_topk: AbsTopKOptions = field(default_factory=AbsTopKOptions)


@dataclass(frozen=True)
class SparsityOptions:
    density: float = option(0.0625, "nonzero share of each matrix at the end; 1 trains dense", "fraction", 0, 1)
    embedding_density: float | None = option(
        None, "the same for embedding and unembedding (and sparse biases); null: density", "fraction", 0, 1
    )
    biases: Literal["dense", "sparse"] = option("dense", "sparse: biases are projected too")
    min_alive: int = option(4, "nonzeros kept in each neuron and attention channel; 0 turns it off", low=0)
    gradient: Literal["dense", "candidates"] = option(
        "dense", "entries that are trained: all (the paper's rule), or for each matrix some candidates (see the next)"
    )
    candidates: float = option(4.0, "candidates per nonzero of a matrix", low=1)
    refill_every: int = option(50, "steps between choices of new candidates", "steps", low=1)
    refill_share: float = option(
        0.25, "share of a batch (of its first part) whose dense gradient chooses them; at least a sequence", "", 0, 1
    )
    anneal: Literal["linear", "exponential"] = option("linear", "how density falls from 1 to its target")
    anneal_start: float = option(0.01, "when density starts to fall", "share of steps", 0, 1)
    anneal_stop: float = option(0.5, "when density has reached its target", "share of steps", 0, 1)
    embedding_anneal: Literal["own", "late"] = option(
        "own", "own: embeddings fall over the same window; late: only once their budget is reached"
    )


@dataclass(frozen=True)
class LocalityOptions:
    """Short wires (BIMT): nodes have places on a sheet, and long weights are dear. See sparsetrain/locality/."""

    pressure: Literal["none", "loss", "proximal", "selection"] = option(
        "none", "what makes long wires dear: a term of the loss, a proximal step after Adam's, or the projection, "
        "which then keeps the greatest |w| exp(-strength x length)",
    )  # fmt: skip
    strength: float | None = option(
        None, "how strong it is; null: 1e-4 (loss), 3 (proximal), 4 (selection)", low=0, high=160
    )
    length: Literal["wire", "mean"] = option("wire", "mean: all wires are of equal length, which leaves L1 (a control)")
    gap: float = option(
        0.0, "length of a wire between two layers beside its own, for the loss and the proximal step", low=0
    )
    biases: bool = option(False, "the loss charges a bias one gap")
    sheet: int = option(1, "dimensions of the sheet that nodes lie on", low=1, high=2)
    tokens: bool = option(True, "tokens have places; without them their matrices count for nothing")
    relayout_every: int = option(
        100, "steps between new places for all nodes; 0: they stay where they began", "steps", low=0
    )
    ramp: float = option(0.1, "when the strength is whole; until then `weak` of it", "share of steps", 0, 1)
    rest: float = option(0.75, "from when it is `weak` of it again", "share of steps", 0, 1)
    weak: float = option(0.1, "share of the strength before ramp and after rest", "fraction", 0, 1)

    def problems(self) -> list[str]:
        """Settings that contradict each other, or would do nothing."""
        found = []
        if self.rest < self.ramp:
            found.append(f"locality.rest must be at least locality.ramp = {self.ramp}, got {self.rest}")
        if self.biases and not (self.pressure == "loss" and self.gap > 0):
            found.append(
                "locality.biases must be false unless pressure is loss and gap above 0, which a bias is charged"
            )
        if self.pressure == "selection":
            most = STRONGEST / self.sheet
            if self.length == "mean":
                found.append(
                    "locality.length must be wire where pressure is selection, got mean, which chooses nothing"
                )
            if self.gap:
                found.append(
                    f"locality.gap must be 0 where pressure is selection, got {self.gap}, which chooses nothing"
                )
            if self.strength is not None and self.strength > most:
                found.append(
                    f"locality.strength must be at most {most:g} where pressure is selection and sheet {self.sheet}, "
                    f"got {self.strength}; float32 has no room for exp(-strength x length) beyond"
                )
        return found


@dataclass(frozen=True)
class OptimOptions:
    lr: float = option(0.0128, "peak learning rate, before the schedule", low=0)
    warmup: float = option(0.01, "linear warm-up", "share of steps", 0, 1)
    sharkfin: bool = option(True, "multiply the learning rate by sqrt(final L0 / L0 now)")
    gradient: Literal["normalise", "clip", "none"] = option(
        "normalise", "RMS of all gradients: set to 1 always, only if above 1, or left alone"
    )
    beta1: float = option(0.9, "Adam's first decay", low=0, high=0.999999)
    beta2: float = option(0.95, "Adam's second decay", low=0, high=0.999999)
    eps: float = option(0.1, "Adam's epsilon; sized for gradients of RMS 1", low=0)
    weight_decay: float = option(0.1, "decay of matrices, after the projection, times the learning rate", low=0)


@dataclass(frozen=True)
class TrainOptions:
    steps: int = option(10_000, "optimiser steps", "steps", low=1)
    batch_size: int = option(64, "sequences in a step", "sequences", low=1)
    stride: int = option(
        1, "sequences begin at multiples of this many tokens; for documents that are all as long", "tokens", low=1
    )
    accumulate: int = option(1, "parts a batch is split into to save memory", low=1)
    checkpoint_activations: bool = option(False, "recompute blocks in the backward pass to save memory")
    eval_every: int = option(500, "steps between evaluations on held-out text", "steps", low=1)
    eval_batches: int = option(20, "batches in an evaluation", low=1)
    log_every: int = option(10, "steps between lines of metrics", "steps", low=1)
    histogram_every: int = option(1000, "steps between histograms of weights", "steps", low=1)
    checkpoint_every: int = option(500, "steps between checkpoints", "steps", low=1)
    keep_checkpoints: int = option(2, "newest checkpoints that are kept", low=1)


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    run: RunOptions = field(default_factory=RunOptions)
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    sparsity: SparsityOptions = field(default_factory=SparsityOptions)
    locality: LocalityOptions = field(default_factory=LocalityOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    train: TrainOptions = field(default_factory=TrainOptions)

    @property
    def run_dir(self) -> Path:
        return Path(self.run.out) / self.run.name

    def problems(self) -> list[str]:
        """What no single key can tell: the combinations that cannot be trained."""
        found = []
        m, s, d, t = self.model, self.sparsity, self.data, self.train
        if m.d_model % m.d_head:
            found.append(f"model.d_model must be a multiple of model.d_head = {m.d_head}, got {m.d_model}")
        if s.anneal_stop < s.anneal_start:
            found.append(
                f"sparsity.anneal_stop must be at least sparsity.anneal_start = {s.anneal_start}, got {s.anneal_stop}"
            )
        if s.density == 0 or s.embedding_density == 0:
            found.append("sparsity.density and sparsity.embedding_density must be above 0, got 0")
        elif int(s.density * m.d_model) < s.min_alive and s.density < 1:
            found.append(
                f"sparsity.min_alive must be at most density x d_model = {s.density * m.d_model:g}, "
                f"got {s.min_alive}; lower it, since the floor is paid from the same budget"
            )
        for f in fields(m.abs_topk):
            share, width = getattr(m.abs_topk, f.name), m.d_model * (m.mlp_ratio if f.name == "mlp_act" else 1)
            if int(share * width) < 1:
                found.append(
                    f"model.abs_topk.{f.name} must keep at least one of {width} channels, got {share}; 1 turns it off"
                )
        found += self.locality.problems()
        if self.run.sharded and s.gradient != "dense":
            found.append(f"sparsity.gradient must be dense where run.sharded is true, got {s.gradient}")
        if self.run.sharded and self.locality.pressure != "none":
            found.append(f"locality.pressure must be none where run.sharded is true, got {self.locality.pressure}")
        if t.batch_size % t.accumulate:
            found.append(
                f"train.batch_size must be a multiple of train.accumulate = {t.accumulate}, got {t.batch_size}"
            )
        if d.source == "hub" and not d.hub:
            found.append("data.hub must name a Hugging Face data set when data.source is hub, got null")
        if d.source in ("text", "json", "parquet") and not d.paths:
            found.append(f"data.paths must list files, folders or globs when data.source is {d.source}, got none")
        return found


def load_config(kind: type[C], arguments: Sequence[str]) -> C:
    """Build a config of `kind` from YAML files and `key=value` overrides, in the order given.

    Args:
        kind: one of this package's config dataclasses, e.g. RunConfig.
        arguments: YAML files that exist, or else overrides if they have a `=`.

    Returns:
        The resolved config; keys not mentioned have their defaults.

    Raises:
        ConfigError: a file cannot be read; a key is unknown (the nearest known one is named); a value has the
            wrong type or is out of range; keys contradict each other. All problems are listed at once.
    """
    leaves: dict[str, Any] = {}
    for item in arguments:
        leaves.update(read_item(item))
    return _build(kind, leaves)


def config_from_dict(kind: type[C], values: Mapping[str, Any], whole: bool = True) -> C:
    """Build a config from nested plain values, as `config_to_yaml` writes them; same checks as load_config.

    Unless `whole`, keys may contradict each other: others may be set later.
    """
    return _build(kind, dict(_flatten(values)), whole)


def config_to_yaml(config: Any) -> str:
    """The whole config as YAML text that `load_config` reads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def config_to_dict(config: Any) -> dict[str, Any]:
    """The whole config as nested plain values, lists not to be written to."""
    return {key: config_to_dict(value) if is_dataclass(value) else value for key, value in vars(config).items()}


def value_of(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, key.split("."), config)


def known_keys(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, dataclass field) for every leaf of a config dataclass."""
    for f in fields(kind):
        if is_dataclass(f.type):
            yield from known_keys(f.type, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f


def describe_keys(kind: type) -> str:
    """A text that lists every key with its type, default, unit or range, and meaning."""
    lines = []
    for key, f in known_keys(kind):
        default = f.default if f.default is not MISSING else f.default_factory()
        shown = "null" if default is None else default
        low, high = f.metadata["low"], f.metadata["high"]
        bounds = "" if low is None and high is None else f"{'' if low is None else low}..{'' if high is None else high}"
        extent = " ".join(x for x in (f.metadata["unit"], bounds) if x)
        lines.append(f"  {key}={shown}  ({_type_name(f.type)}{', ' + extent if extent else ''})")
        lines.append(f"      {f.metadata['help']}")
    return "\n".join(lines)


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


def read_item(item: str) -> dict[str, Any]:
    """The values that one argument sets, by dotted key.

    Raises:
        ConfigError: it is neither a YAML file that can be read nor an override.
    """
    return _override(item) if "=" in item and not os.path.isfile(item) else _yaml_leaves(Path(item))  # may be too long


def _override(item: str) -> dict[str, Any]:
    key, _, text = item.partition("=")
    try:
        # OmegaConf's own reader, so that 1e-3 is a number (plain YAML 1.1 reads it as a string).
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{key} must be a YAML value, got {text!r} ({error.__class__.__name__})") from None
    return dict(_flatten({key: value}))


def _yaml_leaves(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"the config {path} must hold keys and values, got a {type(loaded).__name__}")
    return dict(_flatten(loaded))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" == EVERY_SITE and not isinstance(value, Mapping):
            yield from every_site(value).items()
        else:
            yield f"{prefix}{key}", value


def every_site(share: Any) -> dict[str, Any]:
    """One share for all sites of AbsTopK, by their keys."""
    return {f"{EVERY_SITE}.{f.name}": share for f in fields(AbsTopKOptions)}


def _build(kind: type[C], leaves: Mapping[str, Any], whole: bool = True) -> C:
    known = dict(known_keys(kind))
    tree = OmegaConf.structured(kind)
    for section in (tree, *(tree[f.name] for f in fields(kind) if is_dataclass(f.type))):
        _allow_writes(section)
    problems = []
    for key, value in leaves.items():
        if key not in known:
            problems.append(f"unknown key {key} = {value!r}{_nearest(key, known)}")
            continue
        several = "list[" in str(known[key].type)
        try:
            OmegaConf.update(tree, key, [value] if several and isinstance(value, (str, int, float)) else value)
        except OmegaConfBaseException as error:
            reason = "" if get_origin(known[key].type) is Literal else f" ({_first_line(error)})"  # it lists them again
            reason += f"; write {key}=[A, B]" * several
            problems.append(f"{key} must be {_type_name(known[key].type)}, got {value!r}{reason}")
    try:
        problems += _out_of_range(tree, known)
        config = None if problems else OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:  # an interpolation without its target, or a value left as ???
        problems.append(f"{error.full_key}: {_first_line(error)}")
    if problems or (whole and (problems := getattr(config, "problems", list)())):
        raise ConfigError("\n".join(problems))
    return config  # type: ignore[return-value]


def _allow_writes(section: Any) -> None:
    """Frozen dataclasses become read-only trees, which would refuse the merge."""
    OmegaConf.set_readonly(section, False)
    for key in section:
        if OmegaConf.is_dict(section[key]):
            _allow_writes(section[key])


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    """Suggest the known key whose full name, or whose last part, is closest."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        by_leaf = {name.rpartition(".")[2]: name for name in known}
        close = [by_leaf[x] for x in difflib.get_close_matches(key.rpartition(".")[2], by_leaf, n=1, cutoff=0.5)]
    return f"; did you mean {close[0]}?" if close else "; --help lists all keys"


def _out_of_range(tree: Any, known: Mapping[str, Any]) -> Iterator[str]:
    for key, f in known.items():
        value, low, high = OmegaConf.select(tree, key), f.metadata["low"], f.metadata["high"]
        if value is None or isinstance(value, (str, bool)):
            continue
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
            yield f"{key} must be {bounds}, got {value}"
