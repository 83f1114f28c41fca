"""The command line as its user meets it."""

import re
import subprocess
import sys

import pytest

from sparsetrain import cli
from sparsetrain.cli import main
from sparsetrain.config import RunConfig, known_keys
from sparsetrain.prune_config import ProbingOptions, PruneConfig
from sparsetrain.pruning.methods import METHODS
from sparsetrain.tasks import TASKS


def test_print_config_resolves_files_and_overrides(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("optim:\n  lr: 0.5\n")
    assert main(["train", str(tmp_path / "c.yaml"), "model.d_model=64", "--print-config"]) == 0
    out = capsys.readouterr().out
    assert "lr: 0.5" in out
    assert "d_model: 64" in out


def test_overrides_may_stand_after_options(capsys):
    overrides = ["node_masks.steps=7", "node_masks.lr=0.5"]
    assert main(["prune", "nowhere", "--print-config", "--task", "for_while", *overrides]) == 0
    out = capsys.readouterr().out
    assert "steps: 7" in out
    assert "lr: 0.5" in out
    for wrong in (["prune", "nowhere", "--task", "for_while", "--stepz"], ["tasks", "nowhere", "steps=7"]):
        with pytest.raises(SystemExit):
            main(wrong)
    assert "unrecognized arguments: steps=7" in capsys.readouterr().err


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert all(f"{key}=" in out for key, _ in known_keys(RunConfig))


def test_help_of_prune_lists_every_method_and_its_keys(capsys):
    assert set(cli.METHODS) == {*METHODS, "probing"}
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    out = capsys.readouterr().out
    assert all(method in out.split("keys, given as")[0] for method in cli.METHODS)
    circuits, probing = out.split("keys of --method probing")
    assert all(f" {key}=" in circuits for key, _ in known_keys(PruneConfig))
    assert all(f" {key}=" in probing for key, _ in known_keys(ProbingOptions))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "model.d_modle=3"], "did you mean model.d_model?"),
        (["train", "nowhere.yaml"], "cannot read the config nowhere.yaml"),
        (["tasks", "nowhere"], "must be a run directory with a model or a checkpoint"),
        (["prune", "nowhere", "--task", "for_while"], "must be a run directory with a model or a checkpoint"),
        (["prune", "nowhere", "--task", "for_while", "node_masks.step=3"], "did you mean node_masks.steps?"),
        (["prune", "nowhere", "--task", "for_while", "--method", "eap"], "topk_masks, acdc, probing, got 'eap'"),
        (["prune", "nowhere", "--task", "reflexive", "--method", "probing", "--over-training"], "method of circuits"),
        (
            ["page", "nowhere", "--task", "for_while"],
            "--circuit must be one of those in nowhere/circuits/for_while, which",
        ),
        (
            ["transfer", "nowhere", "--task", "for_while"],
            "--circuit must be one of those in nowhere/circuits/for_while",
        ),
    ],
)
def test_errors_are_one_message_and_a_status(arguments, words, capsys):
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert words in err
    assert "Traceback" not in err


def test_tasks_prints_every_task_with_examples(tiny_run, capsys):
    assert main(["tasks", str(tiny_run), "--pairs", "4", "--examples"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^(\w+) {2}", out, re.M) == ["task", *TASKS]
    assert "->" in out
    assert "chance: loss 0.693" in out


def test_prepare_says_where_and_how_much(tiny, capsys):
    assert main(["prepare", *tiny]) == 0
    assert "'train':" in capsys.readouterr().out


def test_a_reader_that_has_enough_is_no_error():
    command = [sys.executable, "-m", "sparsetrain", "train", "--print-config"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # before anything is written
        told = process.stderr.read()
    assert (process.returncode, told) == (141, "")
