"""What the pictures of a frontier show, and how they are drawn beside the page."""

import xml.etree.ElementTree as ElementTree

import pytest
from made_sweep import model_rows, write_rows

from sparsetrain.analysis.frontier_data import read_study
from sparsetrain.analysis.frontier_lines import all_lines
from sparsetrain.analysis.frontier_means import summarise
from sparsetrain.analysis.frontier_panels import panels
from sparsetrain.analysis.frontier_picture import pictures, write_pictures
from sparsetrain.files import WriteError


def grid(width, density, loss, edges, seed=0):
    values = {"model.d_model": width, "sparsity.density": density}
    counts = {"n_nonzero": round(width * 100 * density), "n_params": width * 100}
    return model_rows(loss, edges, **counts, arm="dense" if density == 1 else "", seed=seed, **values)


def shown(folder, *models):
    study = read_study([write_rows(folder, *models)])
    ways = all_lines(study)
    for line in (line for lines in ways.values() for line in lines):
        line["colour"] = "#111827"
    return panels(study, summarise(study), ways)


def titles(values):
    return [panel["title"] for panel in values["panels"]]


def test_lines_of_equal_l0_have_a_panel_only_where_one_joins_two_points(tmp_path):
    large, small = (64, 0.25, 3.1, {"a": 8, "b": 4}), (128, 0.125, 3.0, {"a": 2, "b": 5})  # 1,600 nonzeros each
    others = [grid(64, 0.5, 3.2, {"a": 16, "b": 2}), grid(64, 1, 3.3, {"a": 64, "b": 9})]
    both = shown(tmp_path / "both", grid(*large), grid(*small), *others)
    assert titles(both) == ["lines of equal size", "lines of equal L0"]
    alone = shown(tmp_path / "alone", grid(*large), *others)
    assert titles(alone) == ["lines of equal size"]
    missed = shown(tmp_path / "missed", grid(*large), grid(*small[:3], {"a": None, "b": 5}), *others)
    assert titles(missed) == ["lines of equal size"], "one of the two misses a task"


def test_points_have_the_mean_that_is_shown_first(tmp_path):
    seeds = [grid(64, 0.5, 3.0 + seed / 10, {"a": 4, "b": 9}, seed=seed) for seed in range(2)]
    values = shown(tmp_path, *seeds, grid(64, 0.25, 3.2, {"a": 4, "b": 4}), grid(64, 0.125, 3.5, {"a": 4, "b": None}))
    both, front, missed = values["points"]
    assert values["y_label"].endswith("geometric mean over the same 2 of 2 tasks)")
    assert both["edges"] == pytest.approx(6) and both["nonsense"] == pytest.approx(24), "nonsense needs 4 times"
    assert both["loss"] == pytest.approx(3.05) and both["loss_interval"] == pytest.approx((3.0, 3.1))
    assert both["label"] == "density=0.5, 4/4" and missed["label"] == "density=0.125, 1/2"
    assert front["front"] and missed["edges"] is missed["nonsense"] is None


def test_settings_that_miss_a_task_are_named_in_the_picture(tmp_path):
    able = [grid(64, density, 4 - density, {"a": 4, "b": 9}) for density in (0.6, 0.5, 0.4)]
    missing = [grid(64, density, 3.3 + density / 100, {"a": 4, "b": None}) for density in (0.25, 0.125)]
    write_pictures([tmp_path], shown(tmp_path, *able, *missing))
    texts = [node.text for node in ElementTree.parse(tmp_path / "frontier.svg").iter() if node.tag.endswith("}text")]
    assert {"density=0.5, 2/2", "density=0.25, 1/2", "density=0.125, 1/2", "miss a task"} <= {*texts}


def test_a_picture_that_cannot_be_written_is_an_error_when_the_page_is_done(tmp_path):
    values = shown(tmp_path, grid(64, 0.5, 3.0, {"a": 4}))
    (tmp_path / "frontier.svg").mkdir()
    done = []
    with pytest.raises(WriteError, match="could not write .*frontier.svg"), pictures([tmp_path], values):
        done.append("page")
    assert done and (tmp_path / "frontier.png").exists()


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(WriteError, match="KeyError: 'panels'"), pictures([tmp_path], {"points": []}):
        pass
