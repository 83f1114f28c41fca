"""The typed configuration of a search for a circuit: every key of `sparsetrain prune`, by method."""

from dataclasses import dataclass, field
from typing import Literal

from sparsetrain.config import option


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


@dataclass(frozen=True)
class TopkMaskOptions:
    """One score per edge, learnt with masks of every size; published defaults but for steps and batch."""

    steps: int = option(1000, "optimiser steps (published: 5000)", "steps", low=1)
    batch: int = option(32, "prompts in a step (published: 1)", "prompts", low=1)
    lr: float = option(0.05, "Adam's learning rate of the scores", low=0)
    temperature: float = option(0.5, "width of the sigmoid that makes masks of scores", low=1e-6)
    starts: int = option(2, "trainings, each from the last ranking upside down; the best is kept (published: 1)", low=1)


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


@dataclass(frozen=True)
class AcdcOptions:
    """Thresholds of automatic circuit discovery (Conmy et al. 2023)."""

    lowest_tau: float = option(1e-6, "least threshold of a ranking", "units of the metric", low=1e-12)
    highest_tau: float = option(1.0, "greatest threshold of a ranking", "units of the metric", low=1e-12)
    n_taus: int = option(31, "thresholds of a ranking, evenly spaced in the logarithm", low=1)


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
    seed: int = option(0, "seed of prompts, of the method, and of random sets", low=0)
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
