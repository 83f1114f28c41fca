"""The benchmark of whole steps: its arms are what they are called, and its tables follow from its rows."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsetrain.bench import rules, run, step, step_report
from sparsetrain.kernels import ops, reference

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    config = step.base(32, 1, 1 / 8, 2, 4)
    small = replace(config, model=replace(config.model, n_ctx=16), data=replace(config.data, vocab_size=300))
    small = replace(small, data=replace(small.data, max_tokens=20000, cache=str(tmp_path_factory.mktemp("data"))))
    patch = pytest.MonkeyPatch()
    patch.setattr(step, "_peak_bytes", lambda *_: 2**30)  # a process of its own, of a larger size
    said = []
    yield step.measure(small, CPU, said.append)
    patch.undo()
    assert any("profile" in line for line in said)


def test_every_arm_is_stepped_and_losses_of_the_same_model_agree(rows):
    assert [row["arm"] for row in rows] == list(step.arms(step.base(32, 1, 1 / 8, 2, 4)))
    by_arm = {row["arm"]: row for row in rows}
    for row in rows:
        assert len(row["losses"]) == 4 and len(row["seconds"]) == 3 and min(row["seconds"]) > 0
        assert sum(row["profile"].values()) > 0
    assert by_arm[step.OURS]["losses"] == pytest.approx(by_arm[step.RECIPE]["losses"], abs=1e-3)
    assert by_arm[step.TWIN]["losses"] == pytest.approx(by_arm[step.OURS]["losses"], abs=1e-3)
    assert by_arm[step.OURS]["nonzeros"] < by_arm["dense, equal width"]["nonzeros"]
    assert by_arm[step.OURS]["floor"] > 0


def test_the_table_says_how_many_times_faster_in_the_same_rounds(rows):
    rows = [{**row, "seconds": [1.0, 1.0]} for row in rows]
    rows[0]["seconds"] = [4.0, 6.0]
    environment = {
        "device": "a", "threads": 2, "versions": {"torch": "1", "triton": "2"}, "python": "3", "commit": "c",
        "date": "d",
    }  # fmt: skip
    text = step_report.summary({"environment": environment, "rows": rows})
    assert "| ours, dense gradient | 1000 (1000-1000) | 32 | 5 (4-6) | 1.00 |" in text
    assert "| dense-masked | 5000 (4000-6000) | 6 |  | 1.00 |" in text
    assert "Losses over the last 4 of 4 steps" in text and "another start" not in text


def test_the_released_selection_is_ours_but_for_ties():
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with ops.using("reference"), step._as_released():
        assert reference.abs_topk is step._topk_and_scatter
        theirs, weight = ops.abs_topk(x, 7), ops.project_(x.detach().clone(), 30, 2, 0)
    assert reference.abs_topk is not step._topk_and_scatter
    assert torch.equal(theirs, ops.abs_topk(x, 7))
    (grad,) = torch.autograd.grad(theirs, x, torch.ones_like(x))
    assert torch.equal(grad, (theirs != 0).float())
    assert torch.equal(weight, ops.project_(x.detach().clone(), 30, 2, 0))


def test_rules_are_trained_once_and_compared_seed_by_seed(tmp_path, monkeypatch):
    chosen = dict(list(rules.arms().items())[:2])
    monkeypatch.setattr(rules, "arms", lambda: chosen)
    monkeypatch.setattr(
        rules, "SMALL", (*rules.SMALL, "data.max_tokens=20000", f"data.cache={tmp_path}", "data.vocab_size=300")
    )
    text = run.bench("rules", CPU, tmp_path / "rules.json", quick=True)
    assert "| dense gradient, exponential |" in text
    found = json.loads((tmp_path / "rules.json").read_text())["rows"]
    assert [row["arm"] for row in found] == list(chosen)
    assert found[0]["curve"][-1] == [pytest.approx(found[0]["seconds"], abs=0.1), found[0]["val_loss"]]
    before = {f: f.stat().st_mtime_ns for f in Path(tmp_path / "rules").rglob("model.safetensors")}
    run.bench("rules", CPU, tmp_path / "rules.json", quick=True)
    assert before and before == {f: f.stat().st_mtime_ns for f in before}
    shutil.rmtree(tmp_path / "rules")


def test_loss_at_equal_time_is_what_had_been_reached():
    row = {"curve": [[1.0, 5.0], [2.0, 4.0], [3.0, 3.5]]}
    assert rules._loss_at(row, 2.5) == 4.0 and rules._loss_at(row, 9) == 3.5
    assert rules._seconds_to(row, 4.0) == 2.0 and rules._seconds_to(row, 1.0) is None
    assert rules._mean_or_never([1.0, None]) == "1 of 2 seeds reach it"
