"""From a ranking of nodes to the smallest node set found that reaches the target loss."""

import dataclasses
import logging
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from sparsetrain.config import ConfigError, PruneConfig
from sparsetrain.model import Transformer
from sparsetrain.pruning import node_masks
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.evaluate import (
    Calibration,
    all_answer_logits,
    calibrate,
    node_effects,
    task_score,
)
from sparsetrain.pruning.graph import NodeSet, n_edges, n_nodes, without_dangling
from sparsetrain.tasks import TaskData

log = logging.getLogger(__name__)

METHODS = {"node_masks": node_masks.rank_nodes}


@dataclass(frozen=True)
class Cut:
    """A node set and how it does on the prompts it was chosen on."""

    nodes: NodeSet
    loss: float
    calibration: Calibration
    reached: bool


def find(
    model: Transformer, data: TaskData, ablation: Ablation, config: PruneConfig, method: str = "node_masks"
) -> tuple[Cut, PruneConfig]:
    """The smallest node set found that reaches the target loss on `data`, and the settings that gave it.

    Raises:
        ConfigError: the method is unknown, or a search is asked for without Optuna.
    """
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if config.search_trials:
        return _search(model, data, ablation, config, method)
    log.info("learning masks, %d steps", config.steps)
    tau = METHODS[method](model, data, ablation, config)
    cut = bisect(model, data, ablation, tau, config)
    log.info("cut at %d nodes: loss %.3f, target %s", n_nodes(cut.nodes), cut.loss, "met" if cut.reached else "missed")
    return (clean(model, data, ablation, cut, config) if cut.reached else cut), config


def bisect(model: Transformer, data: TaskData, ablation: Ablation, tau: dict[str, Tensor], config: PruneConfig) -> Cut:
    """Cut a ranking of nodes at the size where the calibrated task loss just reaches the target.

    Source: Gao et al. 2025, A.5. The loss need not be monotone in the size: sizes are doubled until one reaches the
    target, then halved into. Where none does, the best size tried is returned, with `reached` false.
    """

    def cut(n: int) -> Cut:
        return _score(model, data, ablation, node_masks.top_nodes(tau, n, config.tie_qk), config)

    best = cut(0)
    if best.reached:
        return best
    n_all = sum(len(t) for t in tau.values())
    low = 0
    for high in [*(2**i for i in range(n_all.bit_length()) if 2**i < n_all), n_all]:
        tried = cut(high)
        if tried.loss < best.loss:
            best = tried
        if tried.reached:
            break
        low = high
    while best.reached and high - low > 1:
        middle = (low + high) // 2
        tried = cut(middle)
        if tried.reached:
            best, high = tried, middle
        else:
            low = middle
    return best


def clean(model: Transformer, data: TaskData, ablation: Ablation, cut: Cut, config: PruneConfig) -> Cut:
    """Drop dangling nodes, then, if asked, every node that the target does not need.

    Learnt masks leave nodes that do nothing (Gao et al. 2025, footnote 9, removed them by hand). Nodes are tried
    once each, in order of the rise in loss without them; a tied query and key channel are tried together.
    """
    cut = _without_dangling(model, data, ablation, cut, config)
    if not config.clean:
        return cut
    progress = tqdm(desc="cleaning", unit=" nodes", total=2 * n_nodes(cut.nodes), disable=None)
    some = data.take(slice(0, 64))  # enough to order them by
    effects = node_effects(model, some, cut.nodes, ablation, cut.calibration, progress.update)
    for site, channel in sorted(effects, key=effects.__getitem__):
        progress.update()
        if not cut.nodes[site][channel]:
            continue  # gone with the other half of its pair
        fewer = {s: mask.clone() for s, mask in cut.nodes.items()}
        for s in _together(site, config.tie_qk):
            fewer[s][channel] = False
        tried = _score(model, data, ablation, fewer, config)
        if tried.reached:
            cut = tried
    progress.close()
    return _without_dangling(model, data, ablation, cut, config)


def _score(model: Transformer, data: TaskData, ablation: Ablation, nodes: NodeSet, config: PruneConfig) -> Cut:
    logits = all_answer_logits(model, data, nodes, ablation)
    calibration = calibrate(logits, data)
    loss = task_score(logits, data, calibration)[0]
    return Cut(nodes, loss, calibration, loss <= config.target_loss)


def _without_dangling(model: Transformer, data: TaskData, ablation: Ablation, cut: Cut, config: PruneConfig) -> Cut:
    tidy = without_dangling(model, cut.nodes)
    if n_nodes(tidy) == n_nodes(cut.nodes):
        return cut
    tried = _score(model, data, ablation, tidy, config)
    return tried if tried.reached else cut


def _together(site: str, tie_qk: bool) -> list[str]:
    if tie_qk and site.rpartition(".")[2] in "qk":
        return [site[:-1] + "q", site[:-1] + "k"]
    return [site]


def _search(
    model: Transformer, data: TaskData, ablation: Ablation, config: PruneConfig, method: str
) -> tuple[Cut, PruneConfig]:
    """Optuna's TPE over the mask training's settings; fewest edges at the target wins, else the lowest loss."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("search_trials needs Optuna; pip install 'sparsetrain[sweep]', or search_trials=0") from None

    found: list[tuple[tuple[float, float], Cut, PruneConfig]] = []

    def objective(trial: optuna.Trial) -> float:
        tried = dataclasses.replace(
            config,
            search_trials=0,
            count_penalty=trial.suggest_float("count_penalty", 1e-6, 1e-2, log=True),
            lr=trial.suggest_float("lr", 3e-4, 1e-1, log=True),
            temperature=trial.suggest_float("temperature", 0.1, 10, log=True),
            init_mean=trial.suggest_float("init_mean", 0.0, 0.5),
            weight_decay=trial.suggest_float("weight_decay", 1e-5, 1e-1, log=True),
            beta2=1 - trial.suggest_float("inverse_beta2", 1e-3, 0.3, log=True),
        )
        cut, _ = find(model, data, ablation, tried, method)
        edges = n_edges(model, cut.nodes)
        found.append(((not cut.reached, edges if cut.reached else cut.loss), cut, tried))
        return edges if cut.reached else 1e6 * (1 + cut.loss)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=config.seed))
    centre = {"count_penalty": config.count_penalty, "lr": config.lr, "temperature": config.temperature,
              "init_mean": config.init_mean, "weight_decay": config.weight_decay,
              "inverse_beta2": 1 - config.beta2}  # fmt: skip
    study.enqueue_trial(centre)
    study.optimize(objective, n_trials=config.search_trials)
    _, cut, used = min(found, key=lambda item: item[0])
    return cut, used
