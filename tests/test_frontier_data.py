"""What of a sweep's rows is compared, and what is refused."""

import json
import math

import numpy as np
import pytest
from made_sweep import FAILED, IMPOSSIBLE, OPEN, model_rows, write_rows

from sparsetrain.analysis.frontier_data import FrontierError, read_study
from sparsetrain.analysis.frontier_means import summarise
from sparsetrain.analysis.frontier_text import cautions, introduction
from sparsetrain.sweeping.points import expand
from sparsetrain.sweeping.sweep_config import SWEEP, load_sweep, sweep_to_yaml


def test_seeds_make_a_setting_and_outcomes_are_told_apart(tmp_path):
    study = read_study([write_rows(
        tmp_path,
        model_rows(3.0, {"a": 10, "b": 20, "c": None, "d": IMPOSSIBLE}, width=64),
        model_rows(3.2, {"a": 30, "b": FAILED, "c": OPEN, "d": IMPOSSIBLE}, width=64, seed=1),
        model_rows(4.0, {"a": 1, "b": 2, "c": 3, "d": IMPOSSIBLE}, width=8, n_nonzero=4000),
    )])  # fmt: skip
    first, second = study.settings
    assert (first.name, first.seeds, first.val_loss, first.dense) == ("width=64", [0, 1], pytest.approx(3.1), False)
    assert second.dense
    assert study.tasks == ["a", "b", "c"] and study.left_out == {"d": "no such words"}
    assert np.exp(first.log_edges(study.tasks)) == pytest.approx(
        np.array([[10, 20, np.nan], [30, np.nan, np.nan]]), nan_ok=True
    )
    assert first.has_outcome(study.tasks).tolist() == [[True, True, True], [True, False, False]]
    assert np.exp(second.log_nonsense(["a", "c"])) == pytest.approx(np.array([[4, 12]]))
    assert study.missing == [
        "_width-64_seed-1: prune: died",
        "_width-64_seed-1: no outcome of b, c",
    ]


def test_points_of_the_config_that_have_no_row_are_missing(tmp_path):
    config = load_sweep([f"out={tmp_path}", "name=s", "grid.model.d_model=[64,128]"])
    folder = write_rows(tmp_path / "s", model_rows(3.0, {"a": 10}))
    first, second = expand(config)
    rows = folder / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"point": "_seed-0"', f'"point": "{first.id}"'))
    (folder / SWEEP).write_text(sweep_to_yaml(config))
    assert read_study([folder]).missing == [f"{second.id}: not trained yet"]


def test_a_config_that_cannot_be_read_from_here_does_not_stand_in_the_way(tmp_path):
    folder = write_rows(tmp_path / "s", model_rows(3.0, {"a": 10}))
    (folder / SWEEP).write_text("seeds: [0, 1]\ntasks: [mine.jsonl]\n")
    [told] = read_study([folder]).missing
    assert "which points it has cannot be told from here: tasks must be built-in names" in told


def test_a_sweep_may_be_the_working_folder(tmp_path, monkeypatch):
    config = load_sweep([f"out={tmp_path}", "name=s", "seeds=[0,1]"])
    (write_rows(tmp_path / "s", model_rows(3.0, {"a": 10})) / SWEEP).write_text(sweep_to_yaml(config))
    monkeypatch.chdir(tmp_path / "s")
    assert read_study(["."]).missing == [f"{point.id}: not trained yet" for point in expand(config)]


def test_points_of_a_sweep_that_was_moved_or_has_no_row_yet_are_missing_too(tmp_path):
    (tmp_path / "new").mkdir()
    config = load_sweep(["out=elsewhere", "name=old", "seeds=[0,1]"])
    (tmp_path / "new" / SWEEP).write_text(sweep_to_yaml(config))
    study = read_study([write_rows(tmp_path / "new"), write_rows(tmp_path / "s", model_rows(3.0, {"a": 10}))])
    assert study.missing == [f"{point.id}: not trained yet" for point in expand(config)]


def test_values_are_named_as_they_were_meant(tmp_path):
    (setting,) = read_study(
        [write_rows(tmp_path, model_rows(3.0, {"a": 5}, share=0.1 + 0.2, lr=1e-9, of="q"))]
    ).settings
    assert setting.name == "share=0.3 lr=1e-09 of=q"


def test_a_weak_model_does_not_narrow_the_tasks_and_is_told(tmp_path):
    able = [model_rows(3.0, {"a": 1, "b": 2, "c": 3}, width=i) for i in range(4)]
    study = read_study([write_rows(tmp_path, *able, model_rows(4.0, {"a": 1, "b": None, "c": None}, width=9))])
    told = " ".join(cautions(study, summarise(study), []))
    assert study.common == ["a", "b", "c"]
    assert "are 3 of the 3 that some model reaches" in told and "1 of 5 settings miss one and stand at the" in told
    study = read_study([write_rows(tmp_path / "able", *able)])
    assert "The same tasks for all" not in " ".join(cautions(study, summarise(study), []))


def test_a_task_that_is_too_long_for_some_is_not_reached_by_them_and_one_for_all_is_left_out(tmp_path):
    short = model_rows(4.0, {"a": 1, "long": IMPOSSIBLE, "longer": IMPOSSIBLE}, width=1)
    able = model_rows(3.0, {"a": 1, "long": 9, "longer": IMPOSSIBLE}, width=2)
    study = read_study([write_rows(tmp_path, short, able)])
    assert study.tasks == ["a", "long"] and study.left_out == {"longer": "no such words"}
    assert [summary["n_reached"] for summary in summarise(study)] == [1, 2]
    assert [summary["n_asked"] for summary in summarise(study)] == [2, 2]


def test_the_same_tasks_for_all_are_those_by_which_most_circuits_are_compared(tmp_path):
    able = model_rows(3.0, {"a": 1, "b": 2, "c": 3}, width=1)
    less = model_rows(3.1, {"a": 1, "b": 2, "c": None}, width=2)
    none = model_rows(5.0, {"a": None, "b": None, "c": None}, width=3)
    begun = model_rows(3.0, {"a": 1, "b": OPEN, "c": OPEN}, width=4)
    study = read_study([write_rows(tmp_path, able, less, none, begun)])
    assert study.common == ["a", "b"]  # 2 tasks of 2 settings, in place of 3 of one
    assert "3 tasks (2 of them the same for all)" in introduction(study)
    assert read_study([write_rows(tmp_path / "begun", begun, none[:1])]).common == ["a"]
    second = model_rows(3.0, {"a": 1, "b": None, "c": 3}, width=1, seed=1)  # a setting reaches what its seeds do
    assert read_study([write_rows(tmp_path / "seeds", able, second, less)]).common == ["a"]


def test_more_than_half_of_the_settings_have_to_reach_the_same_tasks(tmp_path):
    models = [model_rows(3.0, {"a": None if i == 0 else 1, "b": None if i < 4 else 1, "c": 1 if i == 0 else None},
                         width=i) for i in range(10)]  # fmt: skip
    assert read_study([write_rows(tmp_path, *models)]).common == ["a", "b"]  # 2 tasks of 6 settings for 1 of 9
    assert read_study([write_rows(tmp_path / "half", *models[:7])]).common == ["a"]  # 2 of 3 settings of 7 for 1 of 6
    third = [model_rows(3.0, {task: 1 if task == name else None for task in "abc"}, width=ord(name)) for name in "abc"]
    assert read_study([write_rows(tmp_path / "none", *third)]).common == []


def test_tasks_that_need_no_edge_in_any_model_compare_nothing(tmp_path):
    models = [model_rows(3.0, {"a": 0, "b": n}, width=n) for n in (0, 5)]
    study = read_study([write_rows(tmp_path, *models)])
    assert (study.common, study.trivial) == (["b"], ["a"])
    assert any(told.startswith("No model needs an edge for a,") for told in cautions(study, summarise(study), []))


def test_tasks_whose_nonsense_needs_no_edge_compare_nothing(tmp_path):
    rows = [row for n in (3, 5) for row in model_rows(3.0, {"a": n, "b": n}, width=n)]
    for row in rows:
        row["nonsense"] = {"reached": row["n_edges"] == 3, "n_edges": 0 if row["task"] == "a" else 1}
    study = read_study([write_rows(tmp_path, rows)])
    assert (study.common, study.trivial) == (["b"], ["a"])
    assert summarise(study)[0]["floors"]["own"].n_asked == 1


def test_losses_over_other_windows_are_told(tmp_path):
    models = [model_rows(3.0, {"a": 4}, **{"train.batch_size": n}) for n in (16, 64)]
    study = read_study([write_rows(tmp_path, *models)])
    assert any("differ in train.batch_size" in told for told in cautions(study, summarise(study), []))
    models = [[row | {"windows": {"model.n_ctx": n}} for row in model_rows(3.0, {"a": 4}, width=n)] for n in (64, 512)]
    study = read_study([write_rows(tmp_path / "of_the_runs", *models)])
    assert any("differ in model.n_ctx" in told for told in cautions(study, summarise(study), []))


def test_circuits_that_fit_their_training_prompts_better_than_others_are_told(tmp_path):
    def told(name, *losses):
        rows = model_rows(3.0, dict.fromkeys("abc", 4))
        rows = [row | {"task_loss": loss} for row, loss in zip(rows, losses, strict=True)]
        study = read_study([write_rows(tmp_path / name, rows)])
        return [text for text in cautions(study, summarise(study), []) if "on held-out prompts" in text]

    [text] = told("most", 0.14, 0.2, 0.31)
    assert "2 of 3 are above it, with a median of 0.2 and at most 0.31" in text
    assert not told("few", 0.14, 0.15, 0.31)


def test_a_model_that_diverged_is_missing(tmp_path):
    study = read_study([write_rows(tmp_path, model_rows(3.0, {"a": 1}), model_rows(math.nan, {"a": 1}, width=2))])
    assert len(study.models) == 1 and study.missing == ["_width-2_seed-0: its held-out loss is nan"]


def test_two_sweeps_are_compared_and_one_is_not_counted_twice(tmp_path):
    a = write_rows(tmp_path / "a", model_rows(3.0, {"t": 5}, width=1))
    b = write_rows(tmp_path / "b", model_rows(3.0, {"t": 5, "u": 7}, width=1))
    study = read_study([a, b, a, tmp_path / "b" / ".." / "a"])
    assert len(study.settings) == len(study.models) == 2
    assert study.missing == ["_width-1_seed-0: no outcome of u"]


def test_what_cannot_be_drawn_is_refused(tmp_path):
    def refused(words, name, *models):
        with pytest.raises(FrontierError, match=words):
            read_study([write_rows(tmp_path / name, *models)])

    with pytest.raises(FrontierError, match=r"must hold the rows\.jsonl of a sweep"):
        read_study([tmp_path / "nowhere"])
    refused("must hold a trained model, got none", "empty")
    refused("must hold a trained model, got none", "failed", [{**model_rows(3.0, {})[0], "val_loss": None}])
    refused("must have tasks, got none with an outcome", "tasks", model_rows(3.0, {}))
    refused("lines with arm, error", "other", [{"loss": 1.0}])
    (row,) = model_rows(3.0, {"a": 5})
    for i, wrong in enumerate([{"n_edges": None}, {"task_loss": "low"}, {"val_loss": "3"}, {"n_nonzero": 0}]):
        refused("got another in line 2", f"wrong{i}", [row], [row | wrong])
    refused("got another in line 1", "unfinished", [{key: value for key, value in row.items() if key != "reached"}])
    other = model_rows(3.0, {"a": 5}, width=2)
    other[0]["target_loss"] = 0.3
    refused(
        r"target_loss must be the same for all circuits, got 0\.15, 0\.3", "target", model_rows(3.0, {"a": 5}), other
    )
    other[0] |= {"target_loss": 0.15, "graph": "component"}
    refused(
        "graph must be the same for all circuits, got channel, component", "graph", model_rows(3.0, {"a": 5}), other
    )
    other[0] |= {"graph": "channel", "size": 500}
    refused("must be cut at a target loss .* got circuits of 500 each", "size", model_rows(3.0, {"a": 5}), other)
    (tmp_path / "text" / "rows.jsonl").parent.mkdir()
    (tmp_path / "text" / "rows.jsonl").write_text("{half")
    with pytest.raises(FrontierError, match=r"must hold the rows\.jsonl"):
        read_study([tmp_path / "text"])


def test_what_older_rows_do_not_say_is_read_from_a_circuit(tmp_path):
    rows = model_rows(3.0, {"a": 5})
    for key in ("graph", "target_loss"):
        del rows[0][key]
    circuit = tmp_path / "points" / rows[0]["point"] / "circuits" / "a" / "acdc"
    study = read_study([write_rows(tmp_path, rows)])
    assert (study.graph, study.target_loss) == ("channel", None)
    circuit.mkdir(parents=True)
    (circuit / "metrics.json").write_text(json.dumps({"graph": "component", "target_loss": 0.05}))
    study = read_study([tmp_path])
    assert (study.graph, study.target_loss) == ("component", 0.05)


def test_models_of_other_corpora_or_tokenizers_are_refused(tmp_path):
    models = [model_rows(3.0, {"a": 5}, width=width) for width in (1, 2)]
    folder = write_rows(tmp_path, *models)
    files = [folder / "points" / rows[0]["point"] / "environment.json" for rows in models]
    for file, tokenizer in zip(files, "xy", strict=True):
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"corpus": {"tokenizer_sha256": tokenizer, "tokens": {"val": 9}}}))
    with pytest.raises(FrontierError, match="must share corpus and tokenizer.*_width-1_seed-0, _width-2_seed-0"):
        read_study([folder])
    files[1].write_bytes(files[0].read_bytes())
    assert len(read_study([folder]).models) == 2
