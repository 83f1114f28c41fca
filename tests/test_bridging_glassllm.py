"""The whole way to a model of somebody else's: imported, sampled from, bridged to, and a circuit carried to it."""

import json
import math
import shlex
import shutil
import warnings
from pathlib import Path

import pytest

from sparsetrain.cli import main

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("transformers")
pytest.importorskip("glassllm")

CONFIG = Path(__file__).parents[1] / "configs" / "bridge-glassllm.yaml"
SMALL = (
    "model.d_model=32", "model.d_head=8", "sparsity.min_alive=2", "train.steps=6", "train.batch_size=4",
    "train.eval_batches=1", "train.log_every=2", "train.eval_every=6", "train.histogram_every=6",
    "data.val_fraction=0.2", "run.threads=1",
)  # fmt: skip
QUICK = (
    "size=40", "train_pairs=4", "heldout_pairs=3", "reference_tokens=512", "random_sets=1", "nonsense=false",
    "node_masks.steps=4", "node_masks.batch_pairs=4", "clean_evaluations=0",
)  # fmt: skip
EXCLAIMED = ("Oh dear", "What a strange thing", "Come here", "Nonsense", "I know that", "Not at all", "Off with it")
SINGLE, DOUBLE, CLOSED = "\u2018", "\u201c", "\u2019"  # quotation marks


def commands() -> list[list[str]]:
    """Those at the head of the config."""
    return [shlex.split(line)[2:] for line in CONFIG.read_text().splitlines() if line.startswith("#   sparsetrain")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the commands of the config were given, on a smaller scale."""
    folder = tmp_path_factory.mktemp("glassllm")
    shutil.copytree(CONFIG.parent, folder / "configs")
    imported, sampled, bridged = commands()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(imported) == 0
        assert main([x.replace("1000000", "5000") for x in sampled]) == 0
        assert main([*bridged, *SMALL]) == 0
        yield folder


def test_the_corpus_is_read_by_the_model_as_it_was_written(place):
    """Which it would not be with other tokens: its own text is what it holds likeliest."""
    report = json.loads((place / "runs/bridge-glassllm/bridges/dense/report.json").read_text())
    assert 3.0 < report["dense_loss"] < 3.6


def test_the_report_has_all_sites_and_finite_numbers(place):
    report = json.loads((place / "runs/bridge-glassllm/bridges/dense/report.json").read_text())
    assert len(report["pairs"]) == 9 and report["pairs"][-1]["dense"] == "final_resid"
    assert all(math.isfinite(value) for row in report["pairs"] for value in row.values() if isinstance(value, float))
    assert all(row["explained_to_dense"] <= 1 for row in report["pairs"])


def test_a_circuit_of_a_task_in_its_tokens_is_carried_to_it(place, capsys):
    """What closes after an exclamation in single quotes; in double quotes, at this place, somebody goes on."""
    rows = [
        {"positive": f"\n{SINGLE}{words}!", "positive_answer": CLOSED,
         "negative": f"\n{DOUBLE}{words}!", "negative_answer": " I"}
        for words in EXCLAIMED
    ]  # fmt: skip
    (place / "exclaimed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = "runs/bridge-glassllm"
    assert main(["prune", run, "--task", "exclaimed.jsonl", *QUICK, "--device", "cpu"]) == 0
    assert main(["transfer", run, "--task", "exclaimed", "--device", "cpu"]) == 0
    found = json.loads((place / run / "bridges/dense/transfer/exclaimed/node_masks/transfer.json").read_text())
    assert found["dense_model"]["does_the_task"] and found["dense_model"]["logit_difference"] > 1
    assert found["nodes"] and found["share"]["patch"]["value"] > 0.5
    assert "nodes that read the residual" in capsys.readouterr().out
