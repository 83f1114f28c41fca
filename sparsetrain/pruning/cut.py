"""From a ranking of units, nodes or edges, to the smallest circuit found that reaches the target loss."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from sparsetrain.config import ConfigError, PruneConfig
from sparsetrain.pruning import space
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.evaluate import Calibration, calibrate, task_score
from sparsetrain.pruning.space import Space, Unit, Units, n_units
from sparsetrain.tasks import TaskData

log = logging.getLogger(__name__)

ORDER_PROMPTS = 64  # prompts that the order of cleaning is measured on


@dataclass(frozen=True)
class Cut:
    """A set of units and how it does on the prompts it was chosen on."""

    kept: Units
    loss: float
    calibration: Calibration
    reached: bool


@dataclass(frozen=True)
class Problem:
    """One search: where circuits are cut from, for which prompts, under which ablation, with which settings."""

    space: Space
    data: TaskData
    ablation: Ablation
    config: PruneConfig

    def score(self, kept: Units) -> Cut:
        """How well a set of units does the task, calibrated."""
        logits = self.space.logits(self.data, kept, self.ablation)
        calibration = calibrate(logits, self.data)
        loss = task_score(logits, self.data, calibration)[0]
        return Cut(kept, loss, calibration, loss <= self.config.target_loss)


@dataclass(frozen=True)
class Method:
    """How units are ranked: greater scores are kept longer, or greater magnitudes where scores are signed effects."""

    rank: Callable[[Problem], dict[str, Tensor]]
    by_magnitude: bool = False


def find(problem: Problem, method: Method) -> tuple[Cut, dict[str, Tensor], PruneConfig]:
    """The smallest circuit found that reaches the target loss, the scores it was cut by, and the settings used.

    Raises:
        ConfigError: a search over settings is asked for without Optuna.
    """
    if problem.config.node_masks.search_trials:
        return _search(problem, method)
    scores = method.rank(problem)
    ranking = {group: score.abs() for group, score in scores.items()} if method.by_magnitude else scores
    if problem.config.size is not None:
        cut = problem.score(problem.space.top(ranking, problem.config.size))
        return dataclasses.replace(cut, reached=True), scores, problem.config
    cut = bisect(problem, ranking)
    log.info("cut at %d units: loss %.3f, target %s", n_units(cut.kept), cut.loss, "met" if cut.reached else "missed")
    return (clean(problem, cut) if cut.reached else cut), scores, problem.config


def bisect(problem: Problem, ranking: dict[str, Tensor]) -> Cut:
    """Cut a ranking at the size where the calibrated task loss just reaches the target.

    Source: Gao et al. 2025, A.5. The loss need not be monotone in the size: sizes are doubled until one reaches the
    target, then halved into. Where none does, the best size tried is returned, with `reached` false.
    """

    def cut(n: int) -> Cut:
        return problem.score(problem.space.top(ranking, n))

    best = cut(0)
    if best.reached:
        return best
    n_all = n_units(problem.space.everything)
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


def clean(problem: Problem, cut: Cut) -> Cut:
    """Drop dangling units, then, if asked, every unit that the target does not need.

    Learnt masks leave nodes that do nothing (Gao et al. 2025, footnote 9, removed them by hand). Units are tried
    once each, in order of the rise in loss without them; a tied query and key channel are tried together.
    """
    cut = _connected(problem, cut)
    if not problem.config.clean:
        return cut
    progress = tqdm(desc="cleaning", unit=" units", total=2 * n_units(cut.kept), disable=None)
    some = dataclasses.replace(problem, data=problem.data.take(slice(0, ORDER_PROMPTS)))
    rises = effects(some, cut, progress.update)
    for unit in sorted(rises, key=rises.__getitem__):
        progress.update()
        if not cut.kept[unit[0]][unit[1]]:
            continue  # gone with the other half of its pair
        tried = problem.score(space.without(cut.kept, problem.space.together(unit)))
        if tried.reached:
            cut = tried
    progress.close()
    return _connected(problem, cut)


def effects(problem: Problem, cut: Cut, progress: Callable[[int], object] = lambda done: None) -> dict[Unit, float]:
    """How much the circuit's task loss rises when one more unit is ablated, for each of its units."""

    def loss(kept: Units) -> float:
        return task_score(problem.space.logits(problem.data, kept, problem.ablation), problem.data, cut.calibration)[0]

    base = loss(cut.kept)
    found = {}
    for unit in space.units(cut.kept):
        found[unit] = loss(space.without(cut.kept, [unit])) - base
        progress(1)
    return found


def _connected(problem: Problem, cut: Cut) -> Cut:
    tidy = problem.space.connected(cut.kept)
    if n_units(tidy) == n_units(cut.kept):
        return cut
    tried = problem.score(tidy)
    return tried if tried.reached else cut


def _search(problem: Problem, method: Method) -> tuple[Cut, dict[str, Tensor], PruneConfig]:
    """Optuna's TPE over the node masks' settings; fewest edges at the target wins, else the lowest loss."""
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "node_masks.search_trials needs Optuna; pip install 'sparsetrain[sweep]', or set it to 0"
        ) from None

    found: list[tuple[tuple[float, float], tuple]] = []
    options = problem.config.node_masks

    def objective(trial: optuna.Trial) -> float:
        tried = dataclasses.replace(
            options,
            search_trials=0,
            count_penalty=trial.suggest_float("count_penalty", 1e-6, 1e-2, log=True),
            lr=trial.suggest_float("lr", 3e-4, 1e-1, log=True),
            temperature=trial.suggest_float("temperature", 0.1, 10, log=True),
            init_mean=trial.suggest_float("init_mean", 0.0, 0.5),
            weight_decay=trial.suggest_float("weight_decay", 1e-5, 1e-1, log=True),
            beta2=1 - trial.suggest_float("inverse_beta2", 1e-3, 0.3, log=True),
        )
        config = dataclasses.replace(problem.config, node_masks=tried)
        result = find(dataclasses.replace(problem, config=config), method)
        cut = result[0]
        n_edges = n_units(problem.space.edges(cut.kept))
        found.append(((not cut.reached, n_edges if cut.reached else cut.loss), result))
        return n_edges if cut.reached else 1e6 * (1 + cut.loss)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=problem.config.seed))
    centre = {"count_penalty": options.count_penalty, "lr": options.lr, "temperature": options.temperature,
              "init_mean": options.init_mean, "weight_decay": options.weight_decay,
              "inverse_beta2": 1 - options.beta2}  # fmt: skip
    study.enqueue_trial(centre)
    study.optimize(objective, n_trials=options.search_trials)
    return min(found, key=lambda item: item[0])[1]
