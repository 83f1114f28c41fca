"""The typed configuration of a run: every key, its default, unit, range and meaning live here alone."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

C = TypeVar("C")


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
    threads: int | None = option(None, "CPU threads; null: one or all, whichever is faster at the time", low=1)
    compile: bool = option(False, "run the model through torch.compile")
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
    vocab_size: int = option(2048, "vocabulary of the BPE that is trained", "tokens", 257, 65536)
    tokenizer_characters: int = option(50_000_000, "text the BPE is trained on, at most", "characters", low=1000)
    cache: str = option("data", "folder that holds prepared corpora")


@dataclass(frozen=True)
class AbsTopKOptions:
    attn_in: float = option(0.25, "share kept after the norm before attention", "fraction", 0, 1)
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
        if t.batch_size % t.accumulate:
            found.append(
                f"train.batch_size must be a multiple of train.accumulate = {t.accumulate}, got {t.batch_size}"
            )
        if d.source == "hub" and not d.hub:
            found.append("data.hub must name a Hugging Face data set when data.source is hub, got null")
        if d.source in ("text", "json", "parquet") and not d.paths:
            found.append(f"data.paths must list files, folders or globs when data.source is {d.source}, got none")
        return found


@dataclass(frozen=True)
class ProbingOptions:
    """One search for the neurons that compute a variable; defaults are those of Lepori et al. 2023."""

    variable: str | None = option(None, "which variable of the task; null: its first")
    sublayer: str = option("blocks.0.attn", "the attention or the MLP of a block, as blocks.0.attn or blocks.2.mlp")
    position: int = option(-1, "the token that is probed, counted from the prompt's end: -1 is its last", high=-1)
    ablation: Literal["zero", "mean_data", "mean_task"] = option("zero", "what replaces a neuron that is masked")
    epochs: int = option(90, "passes over the training prompts", low=1)
    batch_size: int = option(500, "prompts in a step", "prompts", low=2)
    lr: float = option(1e-3, "AdamW's learning rate", low=0)
    count_penalty: float = option(1e-4, "loss per neuron kept; 1e-6 for each of its weights there", "nats", low=0)
    final_temperature: float = option(200, "what mask parameters are multiplied by at the end; 1 at the start", low=1)
    train_pairs: int = option(2000, "prompt pairs masks are learnt on; a prompt that recurs counts once", low=2)
    heldout_pairs: int = option(2000, "prompt pairs the measures are taken on", low=2)
    reference_tokens: int = option(65_536, "corpus tokens that means are taken over", "tokens", low=1)
    random_sets: int = option(5, "random neuron sets of the same size, of each kind", low=1)
    controls: bool = option(True, "also search for shuffled labels and for variables that the answer does not need")
    seed: int = option(0, "seed of prompts, batches, exemplars, random sets and shuffles", low=0)


@dataclass(frozen=True)
class EdgeMaskOptions:
    """Edge Pruning: hard concrete masks. Defaults that are not the published ones: see edge_masks.py."""

    steps: int = option(1000, "optimiser steps (published: 3000)", "steps", low=1)
    batch: int = option(32, "prompts in a step", "prompts", low=1)
    lr: float = option(0.1, "Adam's learning rate of the masks (published: 0.8)", low=0)
    price: float = option(1e-3, "least cost of an open edge, in shares of what an average edge is worth", low=1e-9)
    gain: float = option(100.0, "how fast the price's logarithm rises while too many edges are open", "per run", low=0)
    init_mean: float = option(5.0, "mean of the initial log alpha (published: 10)")
    init_std: float = option(0.01, "their standard deviation", low=0)
    bound: float = option(5.0, "log alpha stays within +- this; at 5 a gate is closed, or open, 97 times in 100", low=0)
    seed: int = option(0, "seed of masks, gates and prompts", low=0)


@dataclass(frozen=True)
class TopkMaskOptions:
    """One score per edge, learnt with masks of every size; published defaults but for steps and batch."""

    steps: int = option(1000, "optimiser steps (published: 5000)", "steps", low=1)
    batch: int = option(32, "prompts in a step (published: 1)", "prompts", low=1)
    lr: float = option(0.05, "Adam's learning rate of the scores", low=0)
    temperature: float = option(0.5, "width of the sigmoid that makes masks of scores", low=1e-6)
    seed: int = option(0, "seed of sizes and prompts", low=0)


@dataclass(frozen=True)
class AttributionOptions:
    """How edges are scored by gradients; steps are the published ones."""

    estimator: Literal["eap", "eap_ig_inputs", "eap_ig_activations", "gates", "gates_checked", "exact"] = option(
        "gates_checked", "gates: gradients integrated over the edges' gates; gates_checked: the best then patched"
    )
    ig_steps: int = option(5, "points between a replacement and an activation, of eap_ig_*", "runs", low=1)
    gate_points: int = option(11, "points of the integral over the gates", "runs", low=1)
    check_runs: int = option(32, "what gates_checked spends on patching, in runs of all prompts", "runs", low=1)
    batch_prompts: int = option(32, "prompts in one forward pass", "prompts", low=1)
    seed: int = option(0, "seed of resampled replacements and of the prompts that are patched", low=0)


@dataclass(frozen=True)
class AcdcOptions:
    """Thresholds of automatic circuit discovery (Conmy et al. 2023)."""

    lowest_tau: float = option(1e-6, "least threshold of a ranking", "units of the metric", low=1e-12)
    highest_tau: float = option(1.0, "greatest threshold of a ranking", "units of the metric", low=1e-12)
    n_taus: int = option(31, "thresholds of a ranking, evenly spaced in the logarithm", low=1)
    seed: int = option(0, "seed of resampled replacements", low=0)


@dataclass(frozen=True)
class NodeMaskOptions:
    steps: int = option(400, "optimiser steps", "steps", low=1)
    batch_pairs: int = option(32, "prompt pairs in a step", "pairs", low=1)
    lr: float = option(3e-3, "learning rate, falling linearly to 0", low=0)
    count_penalty: float = option(1e-4, "loss per node kept", "nats", low=0)
    temperature: float = option(1.0, "width of the surrogate gradient of the step function", low=1e-6)
    init_mean: float = option(0.1, "mean of the initial mask parameters", low=-1, high=1)
    init_std: float = option(0.01, "their standard deviation", low=0)
    beta2: float = option(0.95, "AdamW's second decay", low=0, high=0.999999)
    weight_decay: float = option(1e-3, "AdamW's decay of the mask parameters", low=0)
    search_trials: int = option(0, "trials of an Optuna search over these settings; 0: none", low=0)


@dataclass(frozen=True)
class PruneConfig:
    """One search for the circuit of a task; defaults are the centres of Gao et al. 2025, Table 2, where it has one."""

    name: str | None = option(None, "folder of the circuit under circuits/<task>/; null: the method")
    target_loss: float = option(0.15, "task loss the circuit must reach", "nats per prompt", low=0)
    size: int | None = option(None, "units (nodes or edges) to keep, in place of as few as reach the target", low=1)
    graph: Literal["auto", "channel", "component"] = option(
        "auto", "what edges are: weights between channels, or paths between heads and MLPs; auto: channel for a "
        "weight-sparse model; node_masks always takes channels",
    )  # fmt: skip
    split_embedding: bool = option(False, "component graph: tokens and learned positions are sources of their own")
    select: Literal["top", "greedy"] = option(
        "top", "which edges a size takes: those of greatest score, or grown from the logits (component graph)"
    )
    ablation: Literal["mean_data", "mean_task", "mean_position", "zero", "resample", "corrupted"] = option(
        "mean_data", "what replaces what is outside the circuit: means over the training corpus, over the task's "
        "prompts, or at each of their positions; zero; activations from elsewhere in the corpus, or of the partner",
    )  # fmt: skip
    metric: Literal["task_loss", "logit_difference", "probability_difference", "kl", "squared_error", "projection"] = (
        option("task_loss", "what edges are ranked by; see sparsetrain/pruning/objective.py")
    )
    tie_qk: bool = option(True, "nodes: keep a query channel if and only if its key channel is kept")
    train_pairs: int = option(256, "prompt pairs the circuit is found on", "pairs", low=2)
    heldout_pairs: int = option(256, "prompt pairs the measures are taken on", "pairs", low=2)
    clean_evaluations: int = option(
        2000, "circuits tried at the end to drop units that the target does not need; 0: none", "circuits", low=0
    )
    reference_tokens: int = option(65_536, "corpus tokens that means are taken over", "tokens", low=1)
    random_sets: int = option(10, "random circuits the circuit is compared with", low=1)
    nonsense: bool = option(True, "also search a circuit for the same prompts with nonsense answers")
    seed: int = option(0, "seed of prompts and random sets, and of node_masks; other methods have their own", low=0)
    effect_units: int = option(
        1000, "greatest number of units whose effects on the held-out loss are measured one by one", "units", low=0
    )
    alternative_runs: int = option(
        200, "circuits of edges tried to find other minimal ones beside the one that was found; 0: none", low=0
    )
    node_masks: NodeMaskOptions = field(default_factory=NodeMaskOptions)
    edge_masks: EdgeMaskOptions = field(default_factory=EdgeMaskOptions)
    topk_masks: TopkMaskOptions = field(default_factory=TopkMaskOptions)
    attribution: AttributionOptions = field(default_factory=AttributionOptions)
    acdc: AcdcOptions = field(default_factory=AcdcOptions)


def load_config(kind: type[C], arguments: Sequence[str]) -> C:
    """Build a config of `kind` from YAML files and `key=value` overrides, in the order given.

    Args:
        kind: one of this package's config dataclasses, e.g. RunConfig.
        arguments: items with `=` are overrides, the others are YAML files.

    Returns:
        The resolved config; keys not mentioned have their defaults.

    Raises:
        ConfigError: a file cannot be read; a key is unknown (the nearest known one is named); a value has the
            wrong type or is out of range; keys contradict each other. All problems are listed at once.
    """
    leaves: dict[str, Any] = {}
    for item in arguments:
        leaves.update(_override(item) if "=" in item else _yaml_leaves(Path(item)))
    return _build(kind, leaves)


def config_from_dict(kind: type[C], values: Mapping[str, Any]) -> C:
    """Build a config from nested plain values, as `config_to_yaml` writes them; same checks as load_config."""
    return _build(kind, dict(_flatten(values)))


def config_to_yaml(config: Any) -> str:
    """The whole config as YAML text that `load_config` reads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def config_to_dict(config: Any) -> dict[str, Any]:
    """The whole config as nested plain values."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


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


def _override(item: str) -> dict[str, Any]:
    key, _, text = item.partition("=")
    try:
        # OmegaConf's own reader, so that 1e-3 is a number (plain YAML 1.1 reads it as a string).
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index]
    except yaml.YAMLError as error:
        raise ConfigError(f"{key} must be a YAML value, got {text!r} ({error.__class__.__name__})") from None
    return dict(_flatten({key: value}))


def _yaml_leaves(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"the config {path} must hold keys and values, got a {type(loaded).__name__}")
    return dict(_flatten(loaded))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _build(kind: type[C], leaves: Mapping[str, Any]) -> C:
    known = dict(known_keys(kind))
    tree = OmegaConf.structured(kind)
    for section in (tree, *(tree[f.name] for f in fields(kind) if is_dataclass(f.type))):
        _allow_writes(section)
    problems = []
    for key, value in leaves.items():
        if key not in known:
            problems.append(f"unknown key {key} = {value!r}{_nearest(key, known)}")
            continue
        try:
            OmegaConf.update(tree, key, value)
        except OmegaConfBaseException as error:
            reason = "" if get_origin(known[key].type) is Literal else f" ({_first_line(error)})"  # it lists them again
            problems.append(f"{key} must be {_type_name(known[key].type)}, got {value!r}{reason}")
    try:
        problems += _out_of_range(tree, known)
        config = None if problems else OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:  # an interpolation without its target, or a value left as ???
        problems.append(f"{error.full_key}: {_first_line(error)}")
    if problems or (problems := getattr(config, "problems", list)()):
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
