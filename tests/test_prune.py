"""The whole stage on a trained tiny run: files, measures, controls, and answers to what cannot be done."""

import json

import pytest
import torch

import sparsetrain
from sparsetrain.config import PruneConfig, load_config
from sparsetrain.pruning import graph
from sparsetrain.pruning.circuit import Circuit, edges_between, load_circuit
from sparsetrain.pruning.measures import score_tasks
from sparsetrain.pruning.prune import Unreached, prune
from sparsetrain.tasks import TASKS, TaskError

QUICK = ["steps=40", "train_pairs=16", "heldout_pairs=16", "batch_pairs=8", "reference_tokens=512", "random_sets=3"]
NAMES = ("name", "path", "data", "value", "key", "line", "text", "file", "node", "code", "func", "args", "list", "word")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task the tiny model can be pruned for: the last token alone decides (bigrams know it)."""
    file = tmp_path_factory.mktemp("tasks") / "self_or_none.jsonl"
    rows = [
        {"positive": f"    def {n}(self):\n        return self", "negative": f"    def {n}(self):\n        if",
         "positive_answer": ".", "negative_answer": " "}
        for n in [prefix + name for prefix in ("", "get_", "_") for name in NAMES]
    ]  # fmt: skip
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(file)


@pytest.fixture(scope="module")
def found(tiny_run, task) -> Circuit:
    circuit = prune(tiny_run, task, load_config(PruneConfig, [*QUICK, "target_loss=0.6"]))
    assert isinstance(circuit, Circuit), circuit
    return circuit


def test_measures_and_files_agree(found, tiny_run):
    folder = tiny_run / "circuits" / "self_or_none" / "node_masks"
    assert json.loads((folder / "metrics.json").read_text()) == found.measures
    read = load_circuit(folder)
    assert read.node_names() == found.node_names()
    assert read.edges == found.edges
    assert read.calibration == found.calibration
    assert read.effects == found.effects
    assert list(read.nodes) == list(found.nodes)
    assert all(torch.equal(read.ablation.values[s], found.ablation.values[s]) for s in found.nodes)
    m = found.measures
    assert m["n_nodes"] == len(found.node_names())
    assert m["n_edges"] == len(found.edges)
    assert m["train_loss"] <= 0.6
    assert {"kl", "agreement", "completeness_loss", "random_ablation_loss", "random_circuit_loss", "full_model_loss",
            "task_loss", "task_accuracy", "nonsense"} <= m.keys()  # fmt: skip
    assert set(found.effects) == set(found.node_names())


def test_edges_are_weights_of_the_model(found, tiny_run):
    model, _ = sparsetrain.load(tiny_run)
    assert found.edges == edges_between(model, found.nodes)
    assert len(found.edges) == graph.n_edges(model, found.nodes)
    parameters = dict(model.named_parameters())
    for edge in found.edges:
        assert edge.weight != 0
        assert (parameters[edge.matrix] == edge.weight).any()
        for end in (edge.source, edge.target):
            site, _, channel = end.rpartition(":")
            assert found.nodes[site][int(channel)]


def test_the_same_search_gives_the_same_circuit(found, tiny_run, task):
    again = prune(tiny_run, task, load_config(PruneConfig, [*QUICK, "target_loss=0.6"]))
    assert again.measures == found.measures
    assert again.node_names() == found.node_names()


def test_the_summary_names_the_last_circuit(found, tiny_run):
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert summary["circuit"]["task"] == "self_or_none"
    keys = {"task", "task_loss", "task_accuracy", "n_nodes", "n_edges", "kl", "completeness_loss",
            "random_ablation_loss", "full_model_loss"}  # fmt: skip
    assert keys <= summary["circuit"].keys()
    assert {"val_loss", "density", "n_nonzero", "tokens", "seconds"} <= summary.keys()


def test_an_unreachable_target_is_an_answer(tiny_run, task):
    answer = prune(tiny_run, task, load_config(PruneConfig, [*QUICK, "target_loss=0", "steps=3"]))
    assert isinstance(answer, Unreached)
    assert answer.best_loss > 0
    assert "above the target" in answer.why or "no size of circuit" in answer.why
    folder = tiny_run / "circuits" / "self_or_none" / "node_masks"
    assert json.loads((folder / "unreached.json").read_text())["best_loss"] == answer.best_loss
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert summary["circuit"]["why"] == answer.why, "no circuit that would mislead"


def test_an_unreachable_target_leaves_an_earlier_circuit_alone(found, tiny_run, task):
    prune(tiny_run, task, load_config(PruneConfig, [*QUICK, "target_loss=0", "steps=3"]))
    assert load_circuit(tiny_run / "circuits" / "self_or_none" / "node_masks").node_names() == found.node_names()


def test_scores_cover_every_task_or_say_why_not(tiny_run):
    scores = list(score_tasks(tiny_run, n_pairs=4))
    assert [s.name for s in scores] == list(TASKS)
    for s in scores:
        assert 0 < len(s.reason) < 150 if s.loss is None else (s.loss > 0 and 0 <= s.accuracy <= 1)
    assert any(s.loss is not None and s.examples for s in scores)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_a_circuit_too(tiny_run, task):
    found = prune(tiny_run, task, load_config(PruneConfig, [*QUICK, "target_loss=0.6"]), device="cuda")
    assert isinstance(found, Circuit)
    assert found.measures["train_loss"] <= 0.6


def test_an_unknown_task_is_refused(tiny_run):
    with pytest.raises(TaskError, match="nearest names"):
        prune(tiny_run, "single_quote", load_config(PruneConfig, QUICK))


def test_the_command_writes_the_page_of_a_file_task_from_anywhere(tiny_run, task, tmp_path, monkeypatch, capsys):
    """The page finds the task's file again through the circuit."""
    import shutil

    from sparsetrain.cli import main

    shutil.copytree(tiny_run, tmp_path / "run")
    shutil.copy(task, tmp_path / "mine.jsonl")
    monkeypatch.chdir(tmp_path)
    assert main(["prune", "run", "--task", "mine.jsonl", *QUICK, "target_loss=0.6", "nonsense=false"]) == 0
    assert (tmp_path / "run" / "circuits" / "mine" / "node_masks" / "circuit.html").exists()
    monkeypatch.chdir("/")
    assert main(["page", str(tmp_path / "run"), "--task", "mine"]) == 0
    assert "circuit of mine" in capsys.readouterr().out
