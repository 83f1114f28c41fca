"""A search that adapts: the next draw, by Optuna's tree of Parzen estimators, from what the draws so far gave.

There is no database: whenever a draw is asked for, the study is made anew of the draws in their order and of the rows
of their points.
"""

import logging
import math
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from sparsetrain.config import ConfigError
from sparsetrain.sweeping.draws import Draw, known_draws, note_draws, rounded
from sparsetrain.sweeping.engines import required
from sparsetrain.sweeping.points import Point, expand
from sparsetrain.sweeping.records import is_impossible
from sparsetrain.sweeping.sweep_config import Sweep

log = logging.getLogger(__name__)
Row = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """A draw and what it gave.

    Attributes:
        draw: the value of each key.
        values: of the objectives; None where one of its points failed, or where it contradicts the config.
        over: whether all its points are over.
    """

    draw: Draw
    values: tuple[float, ...] | None
    over: bool


class Search:
    """The draws of a sweep while it runs, noted as they come.

    Args:
        config: the sweep; `search.sampler` is tpe.

    Raises:
        ConfigError: Optuna is not installed.
    """

    def __init__(self, config: Sweep):
        required("optuna", "search.sampler=tpe")
        self.config, self.draws = config, known_draws(config)

    @property
    def n_left(self) -> int:
        """Draws that are still to be made."""
        return self.config.options.n_samples - len(self.draws)

    def next_points(self, points: list[Point], rows: dict[str, list[Row] | None]) -> list[Point]:
        """Draw until there are points that were not drawn before; none if there have been enough draws.

        Args:
            points: those of all draws so far.
            rows: of each, by its id; None while it is not over.
        """
        while self.n_left:
            self.draws.append(next_draw(self.config, trials(self.config, self.draws, points, rows)))
            note_draws(self.config, self.draws)
            if new := [point for point in self._points_of(self.draws[-1]) if point.id not in rows]:
                return new
        return []

    def _points_of(self, draw: Draw) -> list[Point]:
        """The points of a draw; none where it contradicts the config, which a sampler cannot know."""
        try:
            return expand(self.config, [draw])
        except ConfigError as error:
            log.info("draw %d counts as failed: %s", len(self.draws), error)
            return []


def trials(config: Sweep, draws: list[Draw], points: list[Point], rows: dict[str, list[Row] | None]) -> list[Trial]:
    """What each draw gave, from the rows of its points; None in place of rows where a point is not over."""
    there = [row for of in rows.values() for row in of or ()]
    most = max((row["n_nonzero"] or 0 for row in there), default=0)
    possible = {row["task"] for row in there if row["task"] and not is_impossible(row)}
    return [_trial(config, draw, [rows[p.id] for p in points if p.values == draw], most, possible) for draw in draws]


def _trial(config: Sweep, draw: Draw, rows: list[list[Row] | None], most: int, possible: set[str]) -> Trial:
    if None in rows:
        return Trial(draw, None, over=False)
    values = [objectives(config, of, most, possible) for of in rows if of is not None]
    if not values or None in values:
        return Trial(draw, None, over=True)
    return Trial(draw, tuple(fmean(of_seeds) for of_seeds in zip(*values, strict=True)), over=True)  # type: ignore[arg-type]


def next_draw(config: Sweep, trials: list[Trial]) -> Draw:
    """The draw after some others: of the seed, their number, and what they gave.

    A draw whose points are not over counts as a bad one meanwhile (a constant liar), so that draws that are asked for
    together are not alike. One that failed counts for nothing.

    Source: Bergstra et al. 2011; for two objectives Ozaki et al. 2022; both as Optuna has them.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = _space(config)
    sampler = optuna.samplers.TPESampler(
        n_startup_trials=config.options.search.startup, constant_liar=True,
        seed=1_000_003 * config.options.sample_seed + len(trials),
    )  # fmt: skip
    study = optuna.create_study(directions=["minimize"] * len(config.options.search.objective), sampler=sampler)
    for trial in trials:
        state = TrialState.RUNNING if not trial.over else TrialState.COMPLETE if trial.values else TrialState.FAIL
        study.add_trial(create_trial(state=state, values=trial.values, params=trial.draw, distributions=space))
    drawn = study.ask(space).params
    of = config.samples
    return {
        key: value if of[key][0] in ("integer", "choice") else rounded(value, *of[key][1:])
        for key, value in drawn.items()
    }


def _space(config: Sweep) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made = {
        "uniform": FloatDistribution, "log_uniform": partial(FloatDistribution, log=True), "integer": IntDistribution,
        "choice": lambda *values: CategoricalDistribution(values),
    }  # fmt: skip
    return {key: made[kind](*of) for key, (kind, *of) in config.samples.items()}


def objectives(config: Sweep, rows: list[Row], most: int, possible: set[str]) -> tuple[float, ...] | None:
    """What a point gave, in the order of `search.objective`; None if it failed.

    Edges are the mean of logarithms over tasks, which orders points as the geometric mean does and weighs them evenly
    along a front. A task that is not reached counts with `most` edges, the nonzeros of the largest model so far: no
    circuit has more, so that no point gains by leaving a task out, be it that its context is too short. A task counts
    for nothing where it is not among the `possible` ones, those that some point can be asked.
    """
    found = []
    for name in config.options.search.objective:
        value = _log_edges(rows, most, possible) if name == "edges" else rows[0]["val_loss"] if rows else None
        if value is None or not math.isfinite(value):
            return None
        found.append(value)
    return tuple(found)


def _log_edges(rows: list[Row], most: int, possible: set[str]) -> float | None:
    if any(row["error"] for row in rows):
        return None
    edges = [row["n_edges"] if row["reached"] else most for row in rows if row["task"] in possible]
    return fmean(math.log(max(1, n)) for n in edges) if edges else None
