"""The benchmark of searches for nodes: its rivals do the same, what is wrong is not timed, the table follows."""

import json

import pytest
import torch

from sparsetrain.bench import pruning
from sparsetrain.bench.kernels import BenchError
from sparsetrain.cli import main
from sparsetrain.linear import Linear
from sparsetrain.pruning.replay import Replay

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def case():
    return pruning._case(2, 32, 0.1, CPU)


def test_each_try_lacks_one_node_of_a_set_that_lost_every_second(case):
    sizes = [sum(int(mask.sum()) for mask in kept.values()) for kept in case.tries]
    assert sizes[0] == pruning.N_NODES and len(sizes) == pruning.N_TRIES + 1
    assert sizes[1:] == [pruning.N_NODES - 1 - i // 2 for i in range(pruning.N_TRIES)]


def test_both_models_have_the_weights_and_the_density_that_is_named(case):
    for a, b in zip(case.dense.parameters(), case.sparse.parameters(), strict=True):
        assert torch.equal(a, b)
    for linear in (m for m in case.dense.modules() if isinstance(m, Linear)):
        assert linear.active is None
        assert int(linear.weight.count_nonzero()) == pytest.approx(0.1 * linear.weight.numel(), abs=1)


def test_masks_are_learnt_alike(case):
    whole, ours = (run() for run in pruning._steps(case).values())
    assert whole.keys() == ours.keys()
    for site in whole:
        torch.testing.assert_close(whole[site], ours[site], atol=1e-3, rtol=0)


def test_what_is_wrong_is_not_timed(case, monkeypatch):
    pruning._check(case)
    true = Replay.logits
    monkeypatch.setattr(Replay, "logits", lambda self, nodes: 1.01 * true(self, nodes))
    with pytest.raises(BenchError, match="logits must be those of whole runs"):
        pruning._check(case)


def test_the_command_writes_rows_and_says_their_ratios(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pruning, "N_TRIES", 2)
    assert not main(["bench", "pruning", "--quick", "--device", "cpu", "--out", str(tmp_path / "b.json")])
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [(row["what"], row["n"]) for row in rows] == [(pruning.RUN, 3), (pruning.STEP, pruning.N_STEPS)]
    text = capsys.readouterr().out
    for row in rows:
        ratios = sorted(w / o for w, o in zip(*(row["seconds"][k] for k in (pruning.WHOLE, pruning.OURS)), strict=True))
        assert f"| {row['what']} |" in text
        assert f"{sum(ratios) / 2:.2f} ({ratios[0]:.2f} to {ratios[1]:.2f})" in text
