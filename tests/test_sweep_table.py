"""Rows made of records, and tables made of rows."""

import pytest

from sparsetrain.sweeping.points import expand
from sparsetrain.sweeping.records import jobs, recorded
from sparsetrain.sweeping.rows import point_rows
from sparsetrain.sweeping.sweep_config import load_sweep
from sparsetrain.sweeping.table import mean_and_deviation, table

TRAINED = {"val_loss": 3.0, "n_nonzero": 100, "tokens": 10, "n_params": 400, "train_seconds": 5.0,
           "train_peak_bytes": 10}  # fmt: skip
FOUND = {"reached": True, "n_nodes": 4, "n_edges": 8, "task_loss": 0.2, "kl": 1.0}


def score(loss, reason=""):
    return {"loss": loss, "calibrated_loss": loss or 0.0, "accuracy": 1.0, "reason": reason}


def write(job, result):
    for name in job.makes[:1]:
        (job.folder / name).mkdir(parents=True)
    job.write(result=result, seconds=1.0)


@pytest.fixture
def swept(tmp_path):
    arguments = [f"out={tmp_path}", "grid.optim.lr=[0.1,0.2]", "tasks=[all]", "prune=[target_loss=0.3]", "seeds=[0,1]"]
    return load_sweep(arguments)


def test_tasks_that_are_not_done_are_rows_too_and_the_others_are_pruned(swept):
    point = expand(swept)[0]
    assert point_rows(swept, point, recorded(swept, point)) == []
    train, abilities = jobs(swept, point)
    write(train, TRAINED)
    write(abilities, {"for_while": score(0.1), "if_elif": score(0.5), "ioi": score(None, "no such words")})
    prune = list(jobs(swept, point))[2:]
    assert [job.name for job in prune] == ["prune-for_while"]
    write(prune[0], FOUND)
    rows = {row["task"]: row for row in point_rows(swept, point, recorded(swept, point))}
    assert rows["for_while"]["reached"] is True and rows["for_while"]["n_edges"] == 8
    assert rows["if_elif"]["why"] == "the full model's calibrated loss of 0.500 is above the target"
    assert (rows["if_elif"]["reached"], rows["ioi"]["reached"], rows["ioi"]["why"]) == (False, False, "no such words")
    assert all(row["val_loss"] == 3.0 and row["values"] == {"optim.lr": 0.1} for row in rows.values())


def test_a_record_counts_only_for_what_it_was_asked_and_with_what_it_made(swept):
    point = expand(swept)[0]
    train = next(jobs(swept, point))
    write(train, TRAINED)
    assert train.record()["result"] == TRAINED
    (point.folder / "model").rmdir()
    assert train.record() == {}
    train.file.write_text("{half")
    assert train.record() == {}


def row(seed, task, edges, arm="", **more):
    shared = {"sweep": "s", "point": "p", "arm": arm, "values": {"model.d_model": 64}, "seed": seed, **TRAINED}
    result = {"task": task, "method": "acdc", "reached": edges is not None, "n_edges": edges, "n_nodes": edges}
    return {**shared, "wiring": 2.0 + seed, "error": None, "full_model_loss_calibrated": 0.4, **result, **more}


def test_the_table_has_means_over_seeds_of_geometric_means_over_tasks():
    rows = [row(0, "a", 4), row(0, "b", 16), row(1, "a", 32), row(1, "b", None)]
    head, _, line = [text for text in table(rows).splitlines() if text.startswith("|")][:3]
    names, cells = ([cell.strip() for cell in text.strip("|").split("|")] for text in (head, line))
    shown = dict(zip(names, cells, strict=True))
    assert (shown["seeds"], shown["tasks reached"], shown["model.d_model"]) == ("2", "3 of 4", "64")
    assert shown["edges"] == "20 +- 17"  # sqrt(4 * 16) = 8 and 32
    assert shown["wiring"] == "2.5 +- 0.707"
    assert "| b |  | 64 | 1 of 2 | 16 |" in table(rows)


def test_a_failed_point_is_counted_and_gives_no_numbers():
    failed = {**row(1, None, None, error="train: died"), "val_loss": None}
    text = table([row(0, "a", 4), failed])
    assert "| 2 | 100 +- 0 | 3 |" in text and text.splitlines()[4].endswith("| 1 |")
    assert table([]) == "Nothing is done yet.\n"


@pytest.mark.parametrize(
    "values, text",
    [
        ([], ""),
        ([None], ""),
        ([3.14159], "3.14"),
        ([12345.6], "12346"),
        ([1, None, "few", 3], "2 +- 1.41"),
        ([0.1] * 3, "0.1 +- 0"),
    ],
)
def test_means_are_rounded(values, text):
    assert mean_and_deviation(values) == text


def test_a_task_that_no_model_can_be_asked_is_left_out_and_one_that_is_missed_says_how_the_full_model_does():
    impossible = {"reached": False, "full_model_loss_calibrated": None, "why": "no such words"}
    text = table([row(0, "a", 4), row(0, "b", None, full_model_loss_calibrated=0.6), row(0, "ioi", None, **impossible)])
    assert "- ioi was left out where no such words" in text and "| ioi |" not in text
    assert "| b |  | 64 | 0 of 1 |  |  |  | 0.6 |" in text and "1 of 2" in text
