"""What the pictures of a frontier show, and how they are drawn beside the page."""

import sys
import xml.etree.ElementTree as ElementTree

import pytest
from made_sweep import FAILED, model_rows, write_rows

from sparsetrain.analysis.frontier_data import read_study
from sparsetrain.analysis.frontier_lines import all_lines
from sparsetrain.analysis.frontier_means import summarise
from sparsetrain.analysis.frontier_panels import panels
from sparsetrain.analysis.frontier_picture import MOST_KEYS, pictures, write_pictures
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


def texts(folder):
    return [node.text for node in ElementTree.parse(folder / "frontier.svg").iter() if node.tag.endswith("}text")]


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
    assert values["panels"][0]["labels"] == ["density=0.5, 4/4", "density=0.25, 2/2", "density=0.125, 1/2"]
    assert front["front"] and missed["missed"] and missed["edges"] is missed["nonsense"] is None


def test_settings_that_miss_a_task_are_named_in_the_picture(tmp_path):
    able = [grid(64, density, 5 - 5 * density, {"a": 4, "b": 9}) for density in (0.6, 0.5, 0.4)]
    missing = [grid(64, density, 3.3 + density / 100, {"a": 4, "b": None}) for density in (0.25, 0.125)]
    unfinished = grid(64, 0.2, 3.9, {"a": 4, "b": FAILED})
    write_pictures([tmp_path], shown(tmp_path, *able, *missing, unfinished))
    assert {"density=0.5, 2/2", "density=0.25, 1/2", "density=0.125, 1/2", "miss a task"} <= {*texts(tmp_path)}
    assert {"density=0.2, 1/1, 1 open", "not finished"} <= {*texts(tmp_path)}


def test_each_panel_names_what_varies_along_its_lines(tmp_path):
    cells = [(64, 0.5, 3.2), (64, 0.25, 3.3), (128, 0.25, 3.0), (128, 0.125, 3.1)]
    by_size, by_l0 = shown(tmp_path, *(grid(*cell, {"a": 5}) for cell in cells))["panels"]
    assert by_size["labels"][0] == "density=0.5, 1/1" and by_l0["labels"][0] == "d_model=64 density=0.5, 1/1"


def test_of_many_lines_some_have_a_key_and_what_is_no_line_always(tmp_path):
    """Lines of which nothing is drawn have none."""
    missed = [grid(64 * 2**i, 0.5, 4.5 + i / 10, {"a": 4, "b": None}) for i in range(8)]
    drawn = [grid(100 * 2**i, 0.5, 3.5 + i / 100, {"a": 4 + i, "b": 9}) for i in range(12)]
    write_pictures([tmp_path], shown(tmp_path, *missed, *drawn))
    keys = [text for text in texts(tmp_path) if text.endswith(" weights")]
    assert len(keys) == MOST_KEYS and keys[0] == "10k weights" and keys[-1] == "20.5M weights"
    assert {"miss a task", "nonsense circuits", "n/n: tasks reached, all seeds"} <= {*texts(tmp_path)}


def test_names_are_no_mathematics_and_letters_that_the_font_lacks_are_told(tmp_path, capfd):
    """A pair of $ would be read as TeX."""
    arms = [model_rows(3.0 + i, {"a": 4}, arm=arm, width=i) for i, arm in enumerate(("c$_$", "模型"))]
    with pictures([tmp_path], shown(tmp_path, *arms)):
        pass
    assert any("c$_$" in text for text in texts(tmp_path))
    assert "missing from font" in capfd.readouterr().err


def test_modules_of_the_working_folder_do_not_stand_in_the_way(tmp_path, monkeypatch):
    values = shown(tmp_path, grid(64, 0.5, 3.0, {"a": 4}))
    (tmp_path / "sparsetrain").mkdir()
    for name in ("random.py", "sparsetrain/__init__.py"):
        (tmp_path / name).write_text("raise SystemExit('a module of the user')")
    monkeypatch.chdir(tmp_path)
    with pictures([tmp_path], values):
        pass
    assert (tmp_path / "frontier.svg").exists()


def test_a_picture_that_cannot_be_written_is_an_error_when_the_page_is_done(tmp_path):
    values = shown(tmp_path, grid(64, 0.5, 3.0, {"a": 4}))
    (tmp_path / "frontier.svg").mkdir()
    done = []
    with pytest.raises(WriteError, match="could not write .*frontier.svg"), pictures([tmp_path], values):
        done.append("page")
    assert done and (tmp_path / "frontier.png").exists()


def test_a_process_that_fails_says_why(tmp_path, monkeypatch):
    with (
        pytest.raises(RuntimeError, match="ended with 1:(.|\n)*KeyError: 'panels'"),
        pictures([tmp_path], {"points": []}),
    ):
        pass
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    with pytest.raises(WriteError, match="could not start a process"), pictures([tmp_path], {}):
        pass
