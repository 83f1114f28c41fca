"""From a ranking of units, nodes or edges, to the smallest circuit found that reaches a target."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from sparsetrain.config import ConfigError
from sparsetrain.prune_config import PruneConfig
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.evaluate import Calibration, calibrate, task_score
from sparsetrain.pruning.space import Space, Unit, Units, n_units, units, without
from sparsetrain.tasks import TaskData

log = logging.getLogger(__name__)

ORDER_PROMPTS = 64  # prompts that the order of cleaning is measured on
TELL_SECONDS = 30.0  # between lines of the log where there is no terminal for a bar
ORDER_SHARE = 0.25  # of the evaluations that cleaning may take, spent on that order at most

Loss = Callable[[Units], float]  # less is better


@dataclass(frozen=True)
class Cut:
    """A set of units, its loss, whether that is at most the target, and how many sets were tried to find it."""

    kept: Units
    loss: float
    reached: bool
    n_evaluations: int = 0
    calibration: Calibration = Calibration()


@dataclass(frozen=True)
class Problem:
    """One search: where circuits are cut from, for which prompts, under which ablation, with which settings."""

    space: Space
    data: TaskData
    ablation: Ablation
    config: PruneConfig
    state: Path | None = None  # folder that a long ranking keeps its state in

    def score(self, kept: Units) -> tuple[float, Calibration]:
        """The calibrated task loss of a set of units, and the calibration."""
        logits = self.space.logits(self.data, kept, self.ablation)
        calibration = calibrate(logits, self.data)
        return task_score(logits, self.data, calibration)[0], calibration


@dataclass(frozen=True)
class Method:
    """How units are ranked: greater scores are kept longer, or greater magnitudes where scores are signed effects."""

    rank: Callable[[Problem], dict[str, Tensor]]
    by_magnitude: bool = False

    def worth(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """What units are kept by: the greatest are kept longest."""
        return {group: score.abs() for group, score in scores.items()} if self.by_magnitude else scores


def find(problem: Problem, method: Method) -> tuple[Cut, dict[str, Tensor], PruneConfig]:
    """The smallest circuit found that reaches the target loss, the scores it was cut by, and the settings used.

    Raises:
        ConfigError: a search over settings is asked for without Optuna.
    """
    config, space = problem.config, problem.space
    if config.node_masks.search_trials:
        return _search(problem, method)
    scores = method.rank(problem)
    ranking = method.worth(scores)
    if config.size is not None:
        kept = space.top(ranking, config.size)
        loss, calibration = problem.score(kept)
        return Cut(kept, loss, True, 1, calibration), scores, config
    cut = smallest(
        space, ranking, lambda kept: problem.score(kept)[0], config.target_loss, config.clean_evaluations,
        lambda kept: _by_effect(problem, kept, ranking),
    )  # fmt: skip
    met = "met" if cut.reached else "missed"
    log.info(
        "%d %s after %d tries: loss %.3f, target %s", n_units(cut.kept), space.units, cut.n_evaluations, cut.loss, met
    )
    return dataclasses.replace(cut, calibration=problem.score(cut.kept)[1]), scores, config


def smallest(
    space: Space, ranking: dict[str, Tensor], loss: Loss, target: float, clean_evaluations: int = 2000,
    order: Callable[[Units], list[Unit]] | None = None,
) -> Cut:  # fmt: skip
    """Cut a ranking at the size that just reaches the target, then drop every unit that the target does not need.

    Learnt masks leave units that do nothing (Gao et al. 2025, footnote 9, removed them by hand).

    Args:
        space: of the units.
        ranking: for each unit, greater where it matters more.
        loss: of a set of units; no number (NaN) reaches no target.
        target: the loss that is to be reached.
        clean_evaluations: how many sets may be evaluated to drop units one by one; 0 leaves the ranking's own set.
        order: of the units of a set, those to drop first; None: from the end of the ranking.

    Returns:
        The smallest set found. Where nothing reaches the target, the best size tried. Where no unit is needed, the set
        without units, reached.
    """
    count = _Counted(loss, target)
    cut = bisect(lambda n: count(space.top(ranking, n)), n_units(space.everything))
    if cut.reached and n_units(cut.kept):
        cut = _connected(space, cut, count)
        if clean_evaluations:
            cut = clean(
                space, cut, (order or (lambda kept: worst_first(kept, ranking)))(cut.kept), count, clean_evaluations
            )
            cut = _connected(space, cut, count)
    return dataclasses.replace(cut, n_evaluations=count.n)


def bisect(cut: Callable[[int], Cut], n_all: int) -> Cut:
    """The smallest size that reaches the target, or the best tried: sizes are doubled, then halved into.

    The loss need not be monotone in the size, so a smaller one may reach it too.

    Source: Gao et al. 2025, A.5.
    """
    best = cut(0)
    if best.reached:
        return best
    low = 0
    for high in [*(2**i for i in range(n_all.bit_length()) if 2**i < n_all), n_all]:
        tried = cut(high)
        best = tried if tried.reached or not best.loss <= tried.loss else best
        if tried.reached:
            break
        low = high
    else:
        return best
    while high - low > 1:
        middle = (low + high) // 2
        tried = cut(middle)
        if tried.reached:
            best, high = tried, middle
        else:
            low = middle
    return best


def clean(space: Space, cut: Cut, order: list[Unit], loss: "_Counted", most: int) -> Cut:
    """Drop units while the target holds, until none can go alone or `most` sets were evaluated.

    Units are tried in `order`, half of them at once, then half of what did not go, down to single ones; a set with
    few units to drop, or few to keep, takes few evaluations.
    """
    stop = loss.n + most
    before = -1
    while n_units(cut.kept) not in (0, before) and loss.n < stop:
        before = n_units(cut.kept)
        progress = _Progress("cleaning", space.units, before)
        waiting = [[unit for unit in order if cut.kept[unit[0]][unit[1]]]]
        while waiting and loss.n < stop:
            chunk = [unit for unit in waiting.pop() if cut.kept[unit[0]][unit[1]]]  # some went with the half of a pair
            tried = loss(without(cut.kept, [other for unit in chunk for other in space.together(unit)]))
            if tried.reached:
                cut = tried
            elif len(chunk) > 1:
                middle = len(chunk) // 2
                waiting += [chunk[middle:], chunk[:middle]]
                chunk = []  # of which nothing is known yet
            progress.update(len(chunk), f"{n_units(cut.kept)} left, {stop - loss.n} tries at most")
        progress.bar.close()
    return cut


def worst_first(kept: Units, ranking: dict[str, Tensor]) -> list[Unit]:
    """The units of a set from the end of the ranking on."""
    return sorted(units(kept), key=lambda unit: ranking[unit[0]][unit[1]].item())


class _Progress:
    """A bar on standard error; where that is no terminal, a line of the log now and then."""

    def __init__(self, what: str, unit: str, total: int):
        self.bar = tqdm(desc=what, unit=f" {unit}", total=total, disable=None, leave=False)
        self.what, self.of, self.n, self.told = what, f"{total} {unit}", 0, time.monotonic()

    def update(self, n: int, more: str = "") -> None:
        """So many more are done."""
        self.n += n
        self.bar.update(n)
        if self.bar.disable and time.monotonic() - self.told >= TELL_SECONDS:
            self.told = time.monotonic()
            log.info("%s: %d of %s looked at%s", self.what, self.n, self.of, more and f", {more}")


class _Counted:
    """A loss as a Cut, and how often it was asked for."""

    def __init__(self, loss: Loss, target: float):
        self.loss, self.target, self.n = loss, target, 0

    def __call__(self, kept: Units) -> Cut:
        self.n += 1
        value = self.loss(kept)
        return Cut(kept, math.inf if math.isnan(value) else value, value <= self.target)


def _connected(space: Space, cut: Cut, loss: _Counted) -> Cut:
    """The circuit without dangling units, where the target holds without them."""
    tidy = space.connected(cut.kept)
    if n_units(tidy) == n_units(cut.kept):
        return cut
    tried = loss(tidy)
    return tried if tried.reached else cut


def _by_effect(problem: Problem, kept: Units, ranking: dict[str, Tensor]) -> list[Unit]:
    """The units by what the loss on some prompts rises without them; by their rank where that would take too long."""
    if n_units(kept) > ORDER_SHARE * problem.config.clean_evaluations:
        return worst_first(kept, ranking)
    some = dataclasses.replace(problem, data=problem.data.take(slice(0, ORDER_PROMPTS)))
    rises = effects(some, kept, problem.score(kept)[1])
    return sorted(rises, key=rises.__getitem__)


def effects(problem: Problem, kept: Units, calibration: Calibration) -> dict[Unit, float]:
    """How much a circuit's task loss rises when one more unit is ablated, for each of its units."""

    def loss(some: Units) -> float:
        return task_score(problem.space.logits(problem.data, some, problem.ablation), problem.data, calibration)[0]

    base = loss(kept)
    progress, rises = _Progress("without each", problem.space.units, n_units(kept)), {}
    for unit in units(kept):
        rises[unit] = loss(without(kept, [unit])) - base
        progress.update(1)
    progress.bar.close()
    return rises


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
        state = problem.state and problem.state / f"trial_{trial.number}"
        if state:
            state.mkdir(exist_ok=True)
        result = find(dataclasses.replace(problem, config=config, state=state), method)
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
