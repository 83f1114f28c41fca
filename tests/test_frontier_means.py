"""The three means, their intervals and the front, worked out by hand."""

import math

import numpy as np
import pytest
from made_sweep import FAILED, OPEN, model_rows, write_rows

from sparsetrain.analysis.frontier_data import read_study
from sparsetrain.analysis.frontier_means import MEANS, Floor, _value, default_mean, draw, pareto, summarise


@pytest.fixture
def study(tmp_path):
    """An able model that also reaches the hard task, one that reaches the easy one alone, and one that does nothing."""
    return read_study([write_rows(
        tmp_path,
        model_rows(3.0, {"easy": 4, "hard": 100}, width=1), model_rows(3.1, {"easy": 16, "hard": 400}, width=1, seed=1),
        model_rows(3.5, {"easy": 6, "hard": None}, width=2, n_nonzero=900),
        model_rows(4.0, {"easy": None, "hard": None}, width=3),
    )])  # fmt: skip


def test_a_model_that_misses_the_hard_task_gains_by_its_own_mean_alone(study):
    able, unable, nothing = summarise(study)
    assert able["means"]["common"].mean == pytest.approx(8)  # sqrt(4 * 16)
    assert able["means"]["own"].mean == pytest.approx(40)  # (4 * 16 * 100 * 400) ** (1 / 4)
    assert unable["means"]["common"].mean == unable["means"]["own"].mean == pytest.approx(6)
    assert unable["means"]["bound"].mean == pytest.approx(math.sqrt(6 * 900)) and unable["means"]["bound"].at_least
    assert not able["means"]["bound"].at_least and able["means"]["bound"].mean == pytest.approx(40)
    assert [s["means"]["common"].pareto for s in (able, unable, nothing)] == [True, True, False]
    assert [s["means"]["bound"].pareto for s in (able, unable, nothing)] == [True, False, False]
    assert [(s["n_reached"], s["n_asked"]) for s in (able, unable, nothing)] == [(4, 4), (1, 2), (0, 2)]
    assert nothing["means"]["own"].mean is None and nothing["means"]["bound"].mean == pytest.approx(1000)
    assert able["floors"]["own"] == Floor(pytest.approx(4), 4, 4)
    assert able["floors"]["common"] == Floor(pytest.approx(4), 2, 2)
    assert nothing["floors"]["own"] == Floor(None, 0, 0)


def test_intervals_are_over_seeds_and_tasks(study):
    able, unable, _ = summarise(study)
    assert able["means"]["common"].interval == (pytest.approx(4), pytest.approx(16))  # one task, two seeds
    assert able["loss_interval"] == (pytest.approx(3.0), pytest.approx(3.1))
    low, high = able["means"]["own"].interval
    assert low == pytest.approx(4) and high == pytest.approx(400)
    assert unable["means"]["common"].interval is None and unable["loss_interval"] is None  # one task, one seed


def test_one_circuit_has_no_interval_whatever_else_was_asked(tmp_path):
    study = read_study([write_rows(tmp_path, model_rows(3.0, {"a": 40, "b": None, "c": None}))])
    own = summarise(study)[0]["means"]["own"]
    assert (own.mean, own.interval) == (pytest.approx(40), None)


def test_a_setting_that_is_not_finished_has_no_mean_it_cannot_have(tmp_path):
    folder = write_rows(tmp_path, model_rows(3.0, {"a": 4, "b": 9}, width=1),
                        model_rows(3.0, {"a": 4, "b": OPEN}, width=2))  # fmt: skip
    done, begun = summarise(read_study([folder]))
    assert done["means"]["common"].mean == pytest.approx(6)
    assert begun["means"]["common"].mean is None and begun["means"]["own"].mean == pytest.approx(4)
    assert (begun["n_asked"], begun["n_open"], begun["missed"]) == (1, 1, False)


def test_in_the_component_graph_nothing_bounds_a_task_that_is_not_reached(tmp_path):
    rows = model_rows(3.0, {"a": 4, "b": None})
    rows[0]["graph"] = "component"
    [found] = summarise(read_study([write_rows(tmp_path, rows)]))
    assert found["means"]["bound"].mean is None


def test_the_mean_that_is_shown_first(tmp_path, study):
    assert default_mean(study) == "common"
    third = [model_rows(3.0, {task: 1 if task == name else None for task in "abc"}, width=ord(name)) for name in "abc"]
    assert default_mean(read_study([write_rows(tmp_path / "none", *third)])) == "bound"


def test_what_is_only_a_bound_is_never_on_the_front(tmp_path):
    """The truth may lie above any other, however low the bound."""
    folder = write_rows(tmp_path, model_rows(3.0, {"a": 50, "b": 50}, width=1),
                        model_rows(2.0, {"a": 1, "b": None}, n_nonzero=4, width=2))  # fmt: skip
    sure, unsure = (s["means"]["bound"] for s in summarise(read_study([folder])))
    assert (unsure.mean, unsure.at_least) == (pytest.approx(2), True)
    assert (sure.pareto, unsure.pareto) == (True, False)


def test_a_setting_whose_hard_task_failed_is_not_on_the_front_of_means_it_would_raise(tmp_path):
    models = model_rows(3.0, {"a": 5, "b": FAILED}, width=1), model_rows(3.5, {"a": 9, "b": 90}, width=2)
    found = summarise(read_study([write_rows(tmp_path, *models)]))
    fronts = [{name: value.pareto for name, value in f["means"].items()} for f in found]
    assert fronts == [dict.fromkeys(MEANS, False), dict.fromkeys(MEANS, True)]


def test_two_points_at_one_place_are_both_on_the_front():
    assert pareto([(3, 10), (3, 10), (3, 11), (4, np.inf), (4, np.inf)]) == [True, True, False, False, False]


def test_a_circuit_without_edges_counts_as_one_edge(tmp_path):
    [found] = summarise(read_study([write_rows(tmp_path, model_rows(3.0, {"a": 0, "b": 16}))]))
    assert found["means"]["own"].mean == pytest.approx(4)


def test_resampled_means_vary_as_means_do():
    values = np.array([1.0, 2.0, 6.0])
    means = values @ draw(np.random.default_rng(0), 3)
    assert means.var() == pytest.approx(values.var(ddof=1) / 3, rel=0.1)
    assert draw(np.random.default_rng(0), 1).tolist() == [[1.0] * len(means)]


def test_the_front():
    points = [(3, 10), (2, 20), (2, 30), (4, 10), (5, 9), (1, math.inf)]
    assert pareto(points) == [True, True, False, False, True, False]


@pytest.mark.parametrize("n_tasks, n_seeds, held", [(4, 2, 0.89), (13, 5, 0.94)])
def test_an_interval_holds_the_truth_as_often_as_the_method_says(n_tasks, n_seeds, held):
    """Drawn anew each time: effects of tasks, of seeds, and of both together; the truth is 0, an edge's logarithm."""
    rng = np.random.default_rng(0)
    n, found, parts = 400, 0, ((1, (1, n_tasks)), (0.3, (n_seeds, 1)), (0.5, (n_seeds, n_tasks)))
    for _ in range(n):
        logs = sum(rng.normal(0, spread, shape) for spread, shape in parts)
        low, high = _value(logs, {n_tasks: draw(rng, n_tasks)}, draw(rng, n_seeds)).interval
        found += low <= 1 <= high
    assert found / n == pytest.approx(held, abs=0.04)


def test_a_loss_has_one_standard_error_to_both_sides(tmp_path):
    rows = [row for seed, loss in enumerate((3.0, 3.3, 3.6)) for row in model_rows(loss, {"a": 4}, seed=seed)]
    [found] = summarise(read_study([write_rows(tmp_path, rows)]))
    assert found["loss_interval"] == pytest.approx((3.3 - 0.3 / math.sqrt(3), 3.3 + 0.3 / math.sqrt(3)))


def test_the_same_rows_give_the_same_numbers(study):
    assert summarise(study) == summarise(study)
