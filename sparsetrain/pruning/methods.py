"""The methods that rank nodes or edges, by name, each as `prune` asks it."""

import logging
from pathlib import Path
from types import ModuleType

from torch import Tensor

from sparsetrain.pruning import acdc, attribution, edge_masks, node_masks, topk_masks
from sparsetrain.pruning.cut import Method, Problem
from sparsetrain.pruning.edges import EdgeSet
from sparsetrain.pruning.objective import METRICS
from sparsetrain.pruning.space import n_units

log = logging.getLogger(__name__)


def _state_file(problem: Problem, name: str) -> Path | None:
    return None if problem.state is None else problem.state / name


def _node_masks(problem: Problem) -> dict[str, Tensor]:
    config = problem.config
    log.info("learning masks, %d steps", config.node_masks.steps)
    return node_masks.rank_nodes(
        problem.space.model, problem.data, problem.ablation, config.node_masks, config.tie_qk, config.seed,
        _state_file(problem, "node_masks.safetensors"),
    )  # fmt: skip


def _attribution(problem: Problem) -> dict[str, Tensor]:
    config = problem.config
    log.info("scoring %d edges by %s", n_units(problem.space.everything), config.attribution.estimator)
    return attribution.rank(
        problem.space.of, problem.data, problem.ablation, METRICS[config.metric], config.attribution, config.seed
    )


def _edge_ranking(module: ModuleType, name: str, options: str, suffix: str) -> Method:
    """A method of edges that is long enough to keep its state."""

    def rank(problem: Problem) -> EdgeSet:
        config = problem.config
        log.info("ranking %d edges by %s", n_units(problem.space.everything), name)
        return module.rank(
            problem.space.of, problem.data, problem.ablation, METRICS[config.metric], getattr(config, options),
            config.seed, _state_file(problem, f"{name}.{suffix}"),
        )  # fmt: skip

    return Method(rank)


METHODS = {
    "node_masks": Method(_node_masks),
    "edge_masks": _edge_ranking(edge_masks, "edge_masks", "edge_masks", "safetensors"),
    "topk_masks": _edge_ranking(topk_masks, "topk_masks", "topk_masks", "safetensors"),
    "attribution": Method(_attribution, by_magnitude=True),
    "acdc": _edge_ranking(acdc, "acdc", "acdc", "json"),
}
