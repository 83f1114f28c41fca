"""The whole stage on a trained tiny run: files, measures, controls, and answers to what cannot be done."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import sparsetrain
from sparsetrain.analysis.circuit_page import write_page
from sparsetrain.analysis.formation_page import write_formation_page
from sparsetrain.checkpoint import checkpoints
from sparsetrain.config import ConfigError, load_config
from sparsetrain.prune_config import PruneConfig
from sparsetrain.pruning import graph, mask_training
from sparsetrain.pruning.channel_edges import ChannelGraph
from sparsetrain.pruning.circuit import Circuit, describe, list_edges, load_circuit
from sparsetrain.pruning.formation import over_training
from sparsetrain.pruning.measures import score_tasks
from sparsetrain.pruning.prune import Unreached, prune
from sparsetrain.tasks import TaskError

QUICK = ["node_masks.steps=40", "node_masks.batch_pairs=8", "train_pairs=16", "heldout_pairs=16",
         "reference_tokens=512", "random_sets=3"]  # fmt: skip
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
    assert found.edges == list_edges(ChannelGraph(model), graph.kept_edges(model, found.nodes))
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
    answer = prune(tiny_run, task, load_config(PruneConfig, [*QUICK, "target_loss=0", "node_masks.steps=3"]))
    assert isinstance(answer, Unreached)
    assert answer.best_loss > 0
    assert "above the target" in answer.why or "no size of circuit" in answer.why
    folder = tiny_run / "circuits" / "self_or_none" / "node_masks"
    assert json.loads((folder / "unreached.json").read_text())["best_loss"] == answer.best_loss
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert summary["circuit"]["why"] == answer.why, "no circuit that would mislead"


def test_an_unreachable_target_leaves_an_earlier_circuit_alone(found, tiny_run, task):
    prune(tiny_run, task, load_config(PruneConfig, [*QUICK, "target_loss=0", "node_masks.steps=3"]))
    assert load_circuit(tiny_run / "circuits" / "self_or_none" / "node_masks").node_names() == found.node_names()


def test_scores_of_tasks_or_why_there_are_none(tiny_run):
    done, impossible = score_tasks(tiny_run, n_pairs=4, names=["for_while", "class_init"])
    assert (done.name, impossible.name) == ("for_while", "class_init")
    assert done.loss > 0 and 0 <= done.accuracy <= 1 and done.examples
    assert impossible.loss is None and 0 < len(impossible.reason) < 150


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_a_circuit_too(tiny_run, task):
    found = prune(tiny_run, task, load_config(PruneConfig, [*QUICK, "target_loss=0.6"]), device="cuda")
    assert isinstance(found, Circuit)
    assert found.measures["train_loss"] <= 0.6


def test_an_unknown_task_is_refused(tiny_run):
    with pytest.raises(TaskError, match="nearest names"):
        prune(tiny_run, "single_quote", load_config(PruneConfig, QUICK))


def test_the_command_writes_the_page_of_a_file_task_from_anywhere(
    tiny_run, task, tmp_path, monkeypatch, capsys, caplog
):
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
    again = ["prune", str(tmp_path / "run"), "--task", str(tmp_path / "mine.jsonl"), *QUICK, "target_loss=0"]
    assert main([*again, "node_masks.steps=3"]) == 1
    assert "no circuit of mine reaches 0.0" in capsys.readouterr().out
    assert "found with other settings (" in caplog.text and "target_loss was 0.6" in caplog.text


SMALL = {
    "edge_masks": ["edge_masks.steps=60", "edge_masks.batch=8"],
    "topk_masks": ["topk_masks.steps=60", "topk_masks.batch=8"],
    "attribution": ["attribution.estimator=gates", "attribution.gate_points=3"],
    "acdc": ["acdc.n_taus=4"],
}


# ACDC takes a run of all prompts for each edge, and the channel graph has thousands; test_acdc has it on a small one.
EVERY = [
    (method, kind) for method in SMALL for kind in ("channel", "component") if (method, kind) != ("acdc", "channel")
]


@pytest.mark.parametrize(("method", "kind"), EVERY)
def test_every_method_of_edges_runs_through_the_stage(method, kind, tiny_run, task):
    name = f"{method}-{kind}"
    enough = "size=8" if kind == "component" else "clean_evaluations=60"  # bigrams alone do the task: no edge is needed
    settings = [*QUICK, *SMALL[method], enough, f"graph={kind}", f"name={name}", "target_loss=0.65", "nonsense=false",
                "alternative_runs=20"]  # fmt: skip
    found = prune(tiny_run, task, load_config(PruneConfig, settings), method)
    assert isinstance(found, Circuit), found
    folder = tiny_run / "circuits" / "self_or_none" / name
    read = load_circuit(folder)
    assert (read.graph, read.method, read.edges) == (kind, method, found.edges)
    assert read.measures == found.measures
    m = found.measures
    assert m["n_edges"] == len(found.edges) and m["units"] == "edges"
    assert set(found.effects) == {edge.name for edge in found.edges}
    assert m["curve"]["faithfulness"][-1] == pytest.approx(1, abs=1e-4)
    assert (folder / "mib.json").exists() == (kind == "component")
    if found.edges:
        alternatives = json.loads((folder / "alternatives.json").read_text())
        assert len(alternatives["circuits"]) == m["alternatives"]["n"]
    assert not list(folder.parent.glob(".*unfinished"))
    assert write_page(tiny_run, folder).exists()


def test_a_killed_search_goes_on_and_one_with_other_settings_begins_anew(tiny_run, task, monkeypatch):
    monkeypatch.setattr(mask_training, "SAVE_EVERY", 5)
    settings = [*QUICK, *SMALL["edge_masks"], "graph=component", "size=8", "name=stopped", "nonsense=false",
                "alternative_runs=0"]  # fmt: skip
    save = mask_training._save

    def save_and_die(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    def killed():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(mask_training, "_save", save_and_die)
            prune(tiny_run, task, load_config(PruneConfig, settings), "edge_masks")

    killed()
    anew = prune(tiny_run, task, load_config(PruneConfig, [*settings, "edge_masks.steps=20"]), "edge_masks")
    assert anew.settings["cost"]["seconds"] > 0
    killed()
    goes_on = prune(tiny_run, task, load_config(PruneConfig, settings), "edge_masks")
    assert goes_on.settings["cost"]["seconds"] is None, "what the killed process took is not known"
    assert "went on" in describe(goes_on)
    assert not list((tiny_run / "circuits" / "self_or_none").glob(".*unfinished"))


def test_a_circuit_of_a_given_size(tiny_run, task):
    settings = [*QUICK, *SMALL["attribution"], "graph=component", "size=5", "nonsense=false", "alternative_runs=0",
                "effect_units=4"]  # fmt: skip
    found = prune(tiny_run, task, load_config(PruneConfig, settings), "attribution")
    assert len(found.edges) == 5
    assert found.effects == {}, "five are more than effect_units"
    greedy = prune(tiny_run, task, load_config(PruneConfig, [*settings, "select=greedy"]), "attribution")
    assert len(greedy.edges) == 5
    ends = {edge.target.split("<")[0] for edge in greedy.edges}
    assert "logits" in ends and ends <= {"logits", *(edge.source for edge in greedy.edges)}, "grown from the logits"
    nothing = load_config(PruneConfig, [*QUICK, *SMALL["attribution"], "graph=component", "nonsense=false", "name=none",
                                        "target_loss=0.69", "alternative_runs=0"])  # fmt: skip
    empty = prune(tiny_run, task, nothing, "attribution")
    assert empty.edges == []
    page = write_page(tiny_run, tiny_run / "circuits" / "self_or_none" / "none")
    assert "The circuit has no edge" in page.read_text()


def test_a_probing_task_has_a_circuit_and_its_page_too(tiny_run):
    settings = [*QUICK, *SMALL["attribution"], "graph=component", "size=2", "nonsense=false", "alternative_runs=0"]
    found = prune(tiny_run, "squares_mod_5", load_config(PruneConfig, settings), "attribution")
    page = write_page(tiny_run, tiny_run / "circuits" / "squares_mod_5" / "attribution").read_text()
    assert found.measures["train_loss"] > found.measures["target_loss"]
    assert "as it was asked for, misses the target of 0.15" in page


def test_what_a_method_cannot_do_is_said(tiny_run, task):
    for settings, method, words in (
        (["graph=component", "split_embedding=true"], "attribution", "split_embedding needs model.positions=learned"),
        (
            ["attribution.estimator=eap", "metric=kl"],
            "attribution",
            "must have a gradient .*, got zero from kl",
        ),
        ([], "pruner", "method must be one of node_masks, edge_masks, topk_masks, attribution, acdc .*probing"),
        (["name=a/../b"], "attribution", "name must be a folder's name without a path, got 'a/../b'"),
        (["graph=component", "acdc.lowest_tau=2"], "acdc", "lowest_tau must be at most acdc.highest_tau = 1.0, got 2"),
        (["graph=component"], "node_masks", "graph must be channel with node_masks, got component"),
        (["node_masks.search_trials=2"], "acdc", "search_trials must be 0 with another method, got 2 with acdc"),
    ):
        with pytest.raises(ConfigError, match=words):
            prune(tiny_run, task, load_config(PruneConfig, [*QUICK, *settings]), method)


def test_the_circuits_of_all_kept_checkpoints(tiny_run, task, tmp_path):
    task = shutil.copy(task, tmp_path)
    settings = [*QUICK, *SMALL["attribution"], "graph=component", "target_loss=0.65", "nonsense=false",
                "alternative_runs=0", "clean_evaluations=0", "name=formed"]  # fmt: skip
    config = load_config(PruneConfig, settings)
    file = over_training(tiny_run, task, config, "attribution")
    rows = json.loads(file.read_text())
    assert [row["step"] for row in rows] == [int(at.name[5:]) for at in checkpoints(tiny_run)]
    last = prune(tiny_run, task, config, "attribution")
    assert rows[-1]["reached"] and rows[-1]["n_edges"] == last.measures["n_edges"], "the last checkpoint is the model"
    kept = {f: f.stat().st_mtime_ns for f in file.parent.rglob("*.json") if f != file}
    assert json.loads(over_training(tiny_run, task, config, "attribution").read_text()) == rows
    assert {f: f.stat().st_mtime_ns for f in kept} == kept, "nothing is done twice"
    assert "target not reached" in write_formation_page(file).read_text()
    shutil.rmtree(next(file.parent.glob("step_*")))
    assert json.loads(over_training(tiny_run, task, config, "attribution").read_text()) == rows, "done again"
    Path(task).write_text("".join(Path(task).read_text().splitlines(keepends=True)[:-1]))
    before = {f: f.stat().st_mtime_ns for f in file.parent.rglob("circuit.json")}
    over_training(tiny_run, task, config, "attribution")
    assert before and all(f.stat().st_mtime_ns > then for f, then in before.items())
    other = dataclasses.replace(config, target_loss=0.0)
    file = over_training(tiny_run, task, other, "attribution")
    assert not any(row["reached"] for row in json.loads(file.read_text())), "nothing of the other target is left"
