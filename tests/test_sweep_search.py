"""A search that adapts: what is drawn of what, what a draw is worth, and that a kill changes neither."""

import json
import math
import sys

import pytest

from sparsetrain.config import ConfigError
from sparsetrain.sweeping.draws import at_random
from sparsetrain.sweeping.points import expand
from sparsetrain.sweeping.run import sweep
from sparsetrain.sweeping.search import Trial, next_draw, objectives, trials
from sparsetrain.sweeping.sweep_config import load_sweep
from sparsetrain.sweeping.worker import Worker

SAMPLES = ["samples.optim.lr=[log_uniform,1e-3,1e-1]", "samples.model.n_layers=[integer,1,3]"]
TPE = [*SAMPLES, "n_samples=30", "search.sampler=tpe", "search.startup=5"]


def searched(*more):
    return load_sweep(
        ["base=[model.d_model=32,model.d_head=8,sparsity.density=0.25]", "tasks=[for_while]", *TPE, *more]
    )


def best_at(config, lr, n):
    """Draws one after the other, worth the distance of their learning rate from one that is best."""
    done = []
    while len(done) < n:
        random = len(done) < config.options.search.startup
        draw = at_random(config, len(done)) if random else next_draw(config, done)
        done.append(Trial(draw, (abs(math.log(draw["optim.lr"] / lr)),), over=True))
    return [trial.draw for trial in done]


@pytest.mark.parametrize("lr", [2e-3, 5e-2])
def test_draws_come_nearer_to_what_is_best_and_stay_in_their_ranges(lr):
    drawn = best_at(searched("search.objective=val_loss"), lr, 30)
    off = [abs(math.log(draw["optim.lr"] / lr)) for draw in drawn]
    assert sum(off[-10:]) < sum(off[:10]) / 2
    assert all(1e-3 <= draw["optim.lr"] <= 1e-1 and draw["model.n_layers"] in (1, 2, 3) for draw in drawn)


def test_a_choice_is_of_the_values_given():
    config = searched("search.objective=val_loss", "samples.model.d_model=[choice,32,64,256]")
    done = [Trial(at_random(config, i), (float(i),), over=True) for i in range(6)]
    widths = {next_draw(config, done[:i])["model.d_model"] for i in range(6)} | {t.draw["model.d_model"] for t in done}
    assert widths == {32, 64, 256}


def test_a_draw_follows_from_seed_number_and_what_was_found():
    config, other = searched("search.objective=val_loss"), searched("search.objective=val_loss", "sample_seed=1")
    assert best_at(config, 2e-3, 12) == best_at(config, 2e-3, 12)
    assert best_at(config, 2e-3, 12)[:5] != best_at(other, 2e-3, 12)[:5]
    found = [Trial(at_random(config, i), (float(i),), over=True) for i in range(8)]
    assert next_draw(config, found) != next_draw(config, [*found, Trial(found[-1].draw, None, over=False)])


def test_a_failed_draw_counts_for_nothing_and_one_under_way_keeps_others_away():
    config = searched("search.objective=val_loss")
    found = [
        Trial(at_random(config, i), (abs(math.log(at_random(config, i)["optim.lr"] / 2e-3)),), True) for i in range(10)
    ]
    failed = Trial({"optim.lr": 2e-3, "model.n_layers": 1}, None, over=True)
    running = Trial({"optim.lr": 2e-3, "model.n_layers": 1}, None, over=False)
    with_failed, with_running = (
        [next_draw(config, [*found, *[trial] * n]) for n in range(1, 9)] for trial in (failed, running)
    )

    def off(draws):
        return sum(abs(math.log(draw["optim.lr"] / 2e-3)) for draw in draws)

    assert off(with_running) > off(with_failed)


def row(task, reached, n_edges=None, calibrated=0.1, error=None, n_nonzero=1000, val_loss=3.0):
    shared = {"val_loss": val_loss, "n_nonzero": n_nonzero, "error": error, "task": task}
    return {**shared, "reached": reached, "n_edges": n_edges, "full_model_loss_calibrated": calibrated}


@pytest.mark.parametrize(
    "rows, edges",
    [
        ([row("a", True, 10), row("b", True, 1000)], 100),
        ([row("a", True, 10), row("b", False)], math.sqrt(10 * 5000)),  # not reached: as the largest model
        ([row("a", True, 10), row("b", False, calibrated=None)], 10),  # the tokenizer cannot express it
        ([row("a", True, 0)], 1),
    ],
)
def test_edges_are_a_geometric_mean_over_tasks_and_a_task_left_out_is_no_gain(rows, edges):
    possible = {row["task"] for row in rows if row["full_model_loss_calibrated"] is not None}
    assert objectives(searched(), rows, 5000, possible) == pytest.approx((3.0, math.log(edges)))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row(None, None, val_loss=None, error="train: died")],
        [row("a", True, 10), row("b", None, error="killed")],
        [row("b", False, calibrated=None)],
        [row("a", True, 10, val_loss=math.nan)],
    ],
)
def test_a_point_that_failed_has_no_value(rows):
    assert objectives(searched(), rows, 5000, {"a"}) is None


def test_a_context_that_is_too_short_for_a_task_is_no_gain():
    config = searched("search.objective=edges")
    draws = [at_random(config, i) for i in range(2)]
    points = expand(config, draws)
    rows = {points[0].id: [row("a", True, 10), row("b", False, calibrated=None)],
            points[1].id: [row("a", True, 10), row("b", True, 20)]}  # fmt: skip
    short, long = trials(config, draws, points, rows)
    assert short.values == pytest.approx([math.log(10 * 1000) / 2])
    assert long.values == pytest.approx([math.log(10 * 20) / 2])


def test_a_trial_is_the_mean_over_its_seeds_once_all_are_over():
    config = searched("seeds=[0,1]", "search.objective=[edges,val_loss]")
    draw = at_random(config, 0)
    points = expand(config, [draw])
    rows = {points[0].id: [row("a", True, 10)], points[1].id: None}
    assert trials(config, [draw], points, rows) == [Trial(draw, None, over=False)]
    rows[points[1].id] = [row("a", False, val_loss=4.0, n_nonzero=1000)]
    (trial,) = trials(config, [draw], points, rows)
    assert trial.over and trial.values == pytest.approx((math.log(100), 3.5))
    rows[points[1].id] = [row(None, None, val_loss=None, error="train: died")]
    assert trials(config, [draw], points, rows) == [Trial(draw, None, over=True)]


def test_the_first_draws_are_those_at_random_seeds_side_by_side():
    config = searched("seeds=[0,1]")
    points = expand(config)
    assert len(points) == 10 and [point.seed for point in points[:4]] == [0, 1, 0, 1]
    assert [point.values for point in points[::2]] == [at_random(config, i) for i in range(5)]


def test_a_draw_that_contradicts_the_config_makes_no_point_and_one_that_comes_again_no_second():
    config = searched("samples.model.d_head=[integer,7,8]")
    draws = [{"optim.lr": 0.01, "model.n_layers": 1, "model.d_head": d_head} for d_head in (8, 7, 8)]
    (point,) = expand(config, draws)
    found = trials(config, draws, [point], {point.id: [row("a", True, 10)]})
    assert [trial.values is None for trial in found] == [False, True, False]
    with pytest.raises(ConfigError, match=r"model.d_model must be a multiple of model.d_head"):
        expand(config, draws[1:2])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["grid.model.d_model=[32,64]"], "search.sampler=tpe must be without grid, .* got model.d_model"),
        (["arms.a=[]", "arms.b=[optim.eps=0.2]"], "must be without grid, several arms and dense, .* got b"),
        (["dense=[]"], "got dense"),
        (["search.objective=[val_loss,size]"], "search.objective must be of val_loss, edges"),
        (["search.objective=[]"], "search.objective must be of"),
        (["search.objective=[edges]", "tasks=[]"], r"search.objective=\[edges\] must have tasks"),
        (["engine.kind=slurm"], "engine.at_once must be set"),
        (["search.startup=0"], "search.startup must be at least 1"),
        (["search.sampler=grid"], "search.sampler must be random|tpe"),
    ],
)
def test_what_a_search_cannot_do_is_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        searched(*arguments)


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"search.sampler=tpe needs optuna, .*'sparsetrain\[sweep\]'"):
        sweep(searched(f"out={tmp_path}"))


class Stopped(Worker):
    """A worker that whoever waits is interrupted at, by Ctrl-C, at its n-th training."""

    def __init__(self, n: int):
        super().__init__()
        self.left = n

    def run(self, job, *arguments):
        self.left -= job.stage == "train"
        if not self.left:
            raise KeyboardInterrupt
        return super().run(job, *arguments)


def test_a_search_that_was_stopped_goes_on_with_the_same_points(sweep_place, sweep_base):
    base = sweep_base[0][:-1] + ', "train.steps=10"]'
    asked = [base, *TPE, "n_samples=5", "search.startup=2", "search.objective=val_loss"]
    with pytest.raises(KeyboardInterrupt), Stopped(4) as worker:
        sweep(load_sweep([*asked, "name=stopped"]), worker=worker)
    noted = json.loads((sweep_place / "sweeps/stopped/draws.json").read_text())["draws"]
    with Worker() as worker:
        rows, whole = (sweep(load_sweep([*asked, f"name={name}"]), worker=worker) for name in ("stopped", "whole"))
        assert sweep(load_sweep([*asked, "name=whole"]), worker=worker) == whole
    assert len(noted) == 4 and [row["values"] for row in rows[:4]] == noted
    assert [(row["point"], row["val_loss"]) for row in rows] == [(row["point"], row["val_loss"]) for row in whole]
    assert len(rows) == 5 and all(row["error"] is None for row in rows)
