"""A sweep of tiny models, run by real processes: what is recorded, left alone, or fails, and what a kill costs."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from sparsetrain.checkpoint import load_run
from sparsetrain.config import ConfigError, load_config
from sparsetrain.prune_config import PruneConfig
from sparsetrain.pruning.prune import prune
from sparsetrain.sweeping.points import expand
from sparsetrain.sweeping.rows import read_rows
from sparsetrain.sweeping.run import sweep
from sparsetrain.sweeping.sweep_config import load_sweep

NAMES = ("name", "path", "data", "value", "key", "line", "text", "file", "node", "code", "func", "args", "list", "word")
QUICK = ["target_loss=0.69", "node_masks.steps=20", "node_masks.batch_pairs=8", "train_pairs=16", "heldout_pairs=16",
         "reference_tokens=512", "random_sets=2", "nonsense=false", "clean_evaluations=50"]  # fmt: skip
MEASURES = """
import json, os, signal

def depth(run):
    return {"depth": len(list(run.glob("checkpoints/*")))}

def killed(run):
    if not (run / "spare").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return {"spared": 1}
"""
COSTS = ("train_seconds", "train_peak_bytes", "discovery_seconds", "discovery_peak_bytes")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny):
    """A folder with a task and measures of the user's own, in which the processes of sweeps run."""
    folder = tmp_path_factory.mktemp("sweep")
    rows = [
        {"positive": f"    def {n}(self):\n        return self", "negative": f"    def {n}(self):\n        if",
         "positive_answer": ".", "negative_answer": " "}
        for n in [prefix + name for prefix in ("", "get_", "_") for name in NAMES]
    ]  # fmt: skip
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_measures.py").write_text(MEASURES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder


@pytest.fixture(scope="module")
def base(tiny) -> list[str]:
    shared = [item for item in tiny if not item.startswith("run.out=")]
    return [f"base={json.dumps(shared)}", f"prune={json.dumps(QUICK)}", "tasks=[mine.jsonl]"]


@pytest.fixture(scope="module")
def arguments(base) -> list[str]:
    return [*base, "name=all", "arms.good=[]", "arms.bad=[optim.lr=1e38]", "seeds=[0,1]",
            "measures=[my_measures:depth,my_measures:killed]"]  # fmt: skip


@pytest.fixture(scope="module")
def rows(place, arguments):
    """The rows of a sweep of which one arm cannot be trained, and one measure kills its process."""
    return sweep(load_sweep(arguments))


def good(rows):
    return [row for row in rows if row["arm"] == "good"]


def test_a_row_holds_what_the_run_directory_says(place, arguments, rows):
    assert rows == read_rows("sweeps/all")
    assert [(row["arm"], row["seed"], row["task"]) for row in good(rows)] == [("good", 0, "mine"), ("good", 1, "mine")]
    for row, point in zip(good(rows), (p for p in expand(load_sweep(arguments)) if p.arm == "good"), strict=True):
        model, _, config = load_run(point.folder)
        assert config == point.config
        assert row["point"] == point.id
        assert row["n_nonzero"] == sum(
            int((p != 0).sum()) for name, p in model.named_parameters() if p.dim() == 2 and "bigram" not in name
        )
        assert row["val_loss"] == json.loads((point.folder / "summary.json").read_text())["val_loss"]
        assert row["tokens"] == 20 * 4 * 32
        assert row["depth"] == 2
        circuit = json.loads((point.folder / "circuits/mine/node_masks/metrics.json").read_text())
        assert row["reached"] is True
        assert all(row[key] == circuit[key] for key in ("n_edges", "n_nodes", "task_loss", "completeness_loss", "kl"))
        assert row["discovery_seconds"] > 0 and row["train_peak_bytes"] > 1e8
    assert good(rows)[0]["val_loss"] != good(rows)[1]["val_loss"]


def test_failures_are_recorded_with_their_words_and_do_not_stop_the_rest(place, rows):
    for row in rows:
        if row["arm"] == "bad":
            assert row["error"].startswith("train: TrainingError: ")
            assert (row["val_loss"], row["task"]) == (None, None)
        else:
            assert "measure-my_measures.killed: killed by SIGKILL; memory may have run out" in row["error"]
        assert "Error" in (place / "sweeps/all/points" / row["point"] / "log.txt").read_text() or row["arm"] == "good"
    table = (place / "sweeps/all/table.md").read_text()
    assert "| bad | 2 |" in table and "| good | 2 |" in table


def _touched(place) -> dict[str, int]:
    return {str(f): f.stat().st_mtime_ns for f in (place / "sweeps/all/points").rglob("*") if f.is_file()}


def test_what_is_done_or_failed_is_left_alone(place, arguments, rows):
    before = _touched(place)
    assert sweep(load_sweep(arguments)) == rows
    assert _touched(place) == before


def test_retry_runs_again_what_failed_and_nothing_else(place, arguments, rows):
    (spared,) = (row for row in good(rows) if row["seed"] == 1)
    folder = place / "sweeps/all/points" / spared["point"]
    (folder / "spare").touch()
    before = _touched(place)
    again = sweep(load_sweep([*arguments, "arms.bad=null"]), retry=True)
    assert [row["error"] is None for row in again] == [False, True]
    assert again[1] == {**spared, "spared": 1, "error": None}
    changed = {file for file, at in _touched(place).items() if before.get(file) != at}
    assert {os.path.basename(file) for file in changed} == {"log.txt", "measure-my_measures.killed.json"}


def test_another_prune_config_prunes_again_and_keeps_the_models(place, arguments, rows):
    other = sweep(load_sweep([*arguments, "arms.bad=null", "seeds=[0]", "measures=[]",
                              f"prune={json.dumps([*QUICK, 'node_masks.steps=10'])}"]))  # fmt: skip
    assert other[0]["val_loss"] == good(rows)[0]["val_loss"]
    assert other[0]["train_seconds"] == good(rows)[0]["train_seconds"]
    circuit = json.loads((place / "sweeps/all/points" / other[0]["point"] / "circuits/mine/node_masks/circuit.json")
                         .read_text())  # fmt: skip
    assert circuit["settings"]["prune"]["node_masks"]["steps"] == 10


def test_a_circuit_is_what_prune_alone_finds(place, base):
    (row,) = sweep(load_sweep([*base, "name=alone", "arms.good=[]"]))
    there = place / "sweeps/alone/points" / row["point"]
    alone = prune(there, "mine.jsonl", load_config(PruneConfig, [*QUICK, "name=again"]))
    assert alone.measures["task_loss"] == row["task_loss"]


def test_every_task_that_the_model_does_is_pruned_and_the_others_are_counted(place, base):
    rows = sweep(load_sweep([*base, "name=every", "arms.good=[]", "tasks=all"]))
    pruned = {row["task"]: row for row in rows if row.get("method")}
    scores = json.loads(next((place / "sweeps/every/points").glob("*/jobs/abilities.json")).read_text())["result"]
    able = {task for task, s in scores.items() if s["loss"] is not None and s["calibrated_loss"] <= 0.69}
    assert set(pruned) == able and 0 < len(able) < len(scores) == len(rows)
    assert all(row["reached"] is False and row["why"] for row in rows if row["task"] not in able)


def test_a_directory_with_another_run_is_refused_before_anything_runs(place, base):
    config = load_sweep([*base, "name=taken", "arms.good=[]"])
    (point,) = expand(config)
    point.folder.mkdir(parents=True)
    (point.folder / "config.yaml").write_text("optim:\n  lr: 0.5\n")
    with pytest.raises(ConfigError, match="holds a run that differs in .*optim.lr.*; move it away"):
        sweep(config)
    assert [file.name for file in point.folder.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "wrong, words",
    [
        ("method=acdcc", "method must be one of node_masks"),
        (
            "measures=[my_measures:width]",
            "that can be imported, got my_measures:width",
        ),
        ("base=[data.source=text,data.paths=[nowhere.py]]", "nowhere.py"),
    ],
)
def test_what_only_the_worker_can_tell_is_told_before_anything_runs(place, base, wrong, words):
    with pytest.raises(ConfigError, match=words):
        sweep(load_sweep([*base, "name=wrong", "seeds=[0,1]", wrong]))
    assert not (place / "sweeps/wrong/points").exists()


def _command(base, *arguments, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "sparsetrain", "sweep", *base, *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options)


def test_a_full_disk_is_a_recorded_failure(place, base):
    arguments = ["name=full", "arms.good=[]"]

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # a write beyond fails, as on a full disk

    full = _command(base, *arguments, preexec_fn=small_files)
    assert "could not write" in full.communicate()[1]
    assert full.returncode == 1
    (failed,) = read_rows("sweeps/full")
    assert "could not write" in failed["error"]
    (row,) = sweep(load_sweep([*base, *arguments]), retry=True)
    assert row["error"] is None


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [pid, *(p for child in file.read().split() for p in _family(int(child)))]


def test_killed_at_random_a_sweep_goes_on_to_the_same_rows(place, base):
    arguments = ["grid.model.d_model=[16,32]", "seeds=[0,1]", "tasks=[mine.jsonl,for_while]"]
    rng = random.Random(5)
    for n in range(3):
        victim = _command(base, "name=killed", *arguments)
        recorded = len(list((place / "sweeps/killed/points").glob("*/jobs/*")))
        while len(list((place / "sweeps/killed/points").glob("*/jobs/*"))) == recorded and victim.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1.5))
        for pid in _family(victim.pid)[: None if n % 2 else 1]:  # all at once, or the first alone
            os.kill(pid, signal.SIGKILL)
        victim.communicate()
        assert victim.returncode == -signal.SIGKILL
    killed = sweep(load_sweep([*base, "name=killed", *arguments]))
    whole = sweep(load_sweep([*base, "name=whole", *arguments]))

    def facts(rows):
        return [{key: value for key, value in row.items() if key not in (*COSTS, "sweep")} for row in rows]

    assert len(whole) == 8 and all(row["error"] is None for row in whole)
    assert facts(killed) == facts(whole)
