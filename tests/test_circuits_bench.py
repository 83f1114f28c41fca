"""The benchmark of known circuits: it judges rankings as it says, on the benchmark's programs and on a user's."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from sparsetrain.bench import circuits, circuits_report, known_circuits, run
from sparsetrain.bench.kernels import BenchError
from sparsetrain.cli import main
from sparsetrain.prune_config import EdgeMaskOptions, TopkMaskOptions
from sparsetrain.pruning.edges import batches, flat, n_edges, unflat

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def known():
    return {
        (circuit.name, circuit.ablation.kind): circuit
        for circuit in known_circuits.known_circuits([known_circuits.PROGRAMS / "hist.safetensors"])
    }


def prompts(circuit):
    return list(batches(circuit.graph, circuit.data, circuit.ablation, 256))


def scores_of(circuit, values):
    return unflat(circuit.graph, torch.as_tensor(values, dtype=torch.float32))


@pytest.mark.parametrize(
    "case", [("hist", "zero"), ("hist", "corrupted"), ("and", "corrupted"), ("quote_closing", "zero")]
)
def test_the_truth_is_judged_right_and_its_opposite_wrong(known, case):
    circuit = known[case]
    right = flat(circuit.graph, circuit.edges).float()
    found = circuits.judge(circuit, prompts(circuit), scores_of(circuit, right))
    assert found["auroc"] == 1 and found["top"] and found["exact"] and found["cleaned"]
    assert found["n_cut"] == found["n_hit"] == found["n_circuit"] == n_edges(circuit.edges)
    wrong = circuits.judge(circuit, prompts(circuit), scores_of(circuit, -right))
    assert wrong["auroc"] == 0 and not wrong["top"] and not wrong["exact"]
    assert wrong["cleaned"] and wrong["n_cleaned"] == found["n_cut"], (
        "cleaning mends a ranking where there is one circuit"
    )
    assert wrong["n_cut"] > found["n_cut"] and wrong["n_hit"] == found["n_cut"]


def test_a_tie_is_not_the_top_and_an_edge_too_many_is_not_exact(known):
    circuit = known["hist", "zero"]
    right = flat(circuit.graph, circuit.edges).float()
    last, other = int(right.nonzero()[-1]), int((right == 0).nonzero()[0])
    level = right.clone()
    level[other] = 1
    found = circuits.judge(circuit, prompts(circuit), scores_of(circuit, level))
    assert not found["top"] and 0.5 < found["auroc"] < 1
    above = 2 * right
    above[last], above[other] = 1, 1.5
    found = circuits.judge(circuit, prompts(circuit), scores_of(circuit, above))
    assert not found["exact"] and (found["n_cut"], found["n_hit"]) == (7, 6)


def test_of_or_one_branch_or_both_are_exact(known):
    circuit = known["or", "corrupted"]
    branch = flat(circuit.graph, circuit.alternatives[1]).float()
    assert circuits.judge(circuit, prompts(circuit), scores_of(circuit, branch))["exact"]
    both = flat(circuit.graph, circuit.edges).float()
    found = circuits.judge(circuit, prompts(circuit), scores_of(circuit, both))
    assert found["exact"] and found["auroc"] == 1 and found["n_cut"] == 5


def test_where_the_needed_edges_are_not_enough_only_the_ranking_is_judged(known):
    circuit = replace(known["hist", "zero"], error=1.0)
    found = circuits.judge(circuit, prompts(circuit), circuit.edges)
    assert found["exact"] is None and found["auroc"] == 1
    row = {**found, "method": "m", "seed": 0, "seconds": 1.0}
    assert "| hist, zero* | 6 of 13 |  |" in circuits_report.summary({"environment": ENVIRONMENT, "rows": [row]})


def test_the_cut_is_the_shortest_and_leaves_no_dangling_edge(known):
    circuit = known["and", "corrupted"]
    right = flat(circuit.graph, circuit.edges)
    scores = right.float()
    scores += 2 * flat(circuit.graph, known_circuits.named_edges(circuit.graph, [("tokens", "a0.h2<v>")])).float()
    cut = circuits.shortest(circuit.graph, prompts(circuit), scores_of(circuit, scores))
    assert torch.equal(flat(circuit.graph, cut), right)


def test_methods_are_run_with_every_seed_and_told_apart(known, tmp_path):
    methods = {
        "random": circuits.random_scores,
        "removal": lambda graph, data, ablation, seed: known["hist", "zero"].edges,
    }
    first = circuits.compare(methods, [known["hist", "zero"]], (0, 1), lambda _: None, tmp_path / "rows.jsonl")
    said = []
    rows = circuits.compare(methods, [known["hist", "zero"]], (0, 1, 2), said.append, tmp_path / "rows.jsonl")
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for s in range(3) for m in methods]
    assert rows[:4] == first and said == ["hist, zero: random, seed 2", "hist, zero: removal, seed 2"], "goes on"
    randoms = [row for row in rows if row["method"] == "random"]
    assert all(row["exact"] for row in rows if row not in randoms) and not any(row["exact"] for row in randoms)
    assert len({row["auroc"] for row in randoms}) > 1, "seeds differ"
    again = circuits.compare(methods, [known["hist", "zero"]], (0, 1, 2), lambda _: None, tmp_path / "others.jsonl")
    assert [row["auroc"] for row in again] == [row["auroc"] for row in rows]


def test_a_circuit_without_edges_is_left_out(tmp_path):
    files = [known_circuits.PROGRAMS / "length.safetensors"]
    said = []
    found = known_circuits.known_circuits(files, made=False)
    rows = circuits.compare({"random": circuits.random_scores}, list(found), (0,), said.append, tmp_path / "rows.jsonl")
    assert said == ["length, zero: random, seed 0"]
    assert [row["ablation"] for row in rows] == ["zero"]


ENVIRONMENT = {
    "device": "a", "threads": 1, "versions": {"torch": "1"}, "python": "3", "commit": "c", "date": "d",
}  # fmt: skip


def test_the_tables_say_means_over_seeds_beside_the_baseline():
    row = {"program": "hist", "ablation": "corrupted", "n_edges": 13, "n_circuit": 4, "n_cut": 4, "n_hit": 4}
    rows = [
        {
            **row,
            "method": "eap",
            "seed": seed,
            "auroc": auroc,
            "top": top,
            "exact": top,
            "cleaned": True,
            "seconds": seconds,
        }
        for seed, auroc, top, seconds in ((0, 0.5, False, 1.0), (1, 1.0, True, 5.0), (2, 0.9, True, 2.0))
    ]
    text = circuits_report.summary({"environment": ENVIRONMENT, "rows": rows})
    assert "| hist, corrupted | 4 of 13 | 0.667 |" in text
    assert "| hist, corrupted | 4 of 13 | 0.8 (0.62) |" in text
    assert "| hist, corrupted | 4 of 13 | 0.667 (0.00) |" in text
    assert "| hist, corrupted | 4 of 13 | 2 |" in text
    assert all(len(line.split()) == len(circuits_report.BASELINE_METHODS) for line in circuits_report.BASELINE.values())


def test_the_command_runs_a_users_programs_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    shutil.copy(known_circuits.PROGRAMS / "hist.safetensors", tmp_path / "mine" / "counts.safetensors")
    monkeypatch.setattr(circuits, "rankers", lambda: {"random": circuits.random_scores})
    out = tmp_path / "found.json"
    arguments = ["bench", "circuits", "--device", "cpu", "--programs", str(tmp_path / "mine"), "--out", str(out)]
    assert main(arguments) == 0
    assert "| hist, zero | 6 of 13 |" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert {row["program"] for row in rows} == {"hist"} and len(rows) == 6
    (tmp_path / "none").mkdir()
    assert main([*arguments[:5], str(tmp_path / "none"), "--out", str(out)]) == 1
    assert "--programs must be a .py file of programs" in capsys.readouterr().err
    with pytest.raises(BenchError, match="no --programs"):
        run.bench("circuits", CPU, out, publish=tmp_path, programs=tmp_path / "mine")


def test_every_method_of_the_benchmark_ranks_a_small_circuit(known, monkeypatch, tmp_path):
    circuit = known["add", "corrupted"]
    monkeypatch.setattr(circuits, "EdgeMaskOptions", lambda: EdgeMaskOptions(steps=100))
    monkeypatch.setattr(circuits, "TopkMaskOptions", lambda: TopkMaskOptions(steps=100))
    rows = circuits.compare(circuits.rankers(), [circuit], (0, 1), lambda _: None, tmp_path / "rows.jsonl")
    once = {row["method"] for row in rows} - {row["method"] for row in rows if row["seed"] == 1}
    assert once == set(circuits.DRAWS_NOTHING)
    by_method = {row["method"]: row for row in rows}
    assert by_method.keys() == circuits.rankers().keys()
    assert all(
        by_method[name]["top"] and by_method[name]["exact"] for name in (*circuits.DRAWS_NOTHING, "gates_checked")
    )
    assert by_method["topk_masks"]["auroc"] > 0.9
