"""A sweep of tiny models, run by real processes: what is recorded, left alone, or fails, and what a kill costs."""

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest

from sparsetrain.analysis.frontier import write_frontier
from sparsetrain.checkpoint import load_run
from sparsetrain.config import ConfigError, load_config
from sparsetrain.prune_config import PruneConfig
from sparsetrain.pruning.prune import prune
from sparsetrain.sweeping.complete import under_way
from sparsetrain.sweeping.points import expand
from sparsetrain.sweeping.progress import Progress
from sparsetrain.sweeping.records import Job, jobs, recorded
from sparsetrain.sweeping.rows import point_rows, read_rows
from sparsetrain.sweeping.run import plan, sweep
from sparsetrain.sweeping.stages import COLUMNS, run_stage
from sparsetrain.sweeping.sweep_config import load_sweep
from sparsetrain.sweeping.worker import Worker

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


@pytest.fixture(scope="module")
def place(sweep_place):
    (sweep_place / "my_measures.py").write_text(MEASURES)
    return sweep_place


@pytest.fixture(scope="module")
def base(sweep_base) -> list[str]:
    return [*sweep_base, f"prune={json.dumps(QUICK)}"]


@pytest.fixture(scope="module")
def worker(place):
    """One process for all sweeps: it takes seconds to start."""
    with Worker() as started:
        yield started


@pytest.fixture(scope="module")
def arguments(base) -> list[str]:
    return [*base, "name=all", "arms.good=[]", "arms.bad=[optim.lr=1e38]", "seeds=[0,1]",
            "measures=[my_measures:depth,my_measures:killed]"]  # fmt: skip


@pytest.fixture(scope="module")
def tables():
    """Whether there was a table when each point of the sweep was over."""
    return []


@pytest.fixture(scope="module")
def rows(place, arguments, worker, tables):
    """The rows of a sweep of which one arm cannot be trained, and one measure kills its process."""

    def finished(self, *of_a_point):
        tables.append((place / "sweeps/all/table.md").exists())
        told(self, *of_a_point)

    told = Progress.finished
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "finished", finished)
        return sweep(load_sweep(arguments), worker=worker)


def good(rows):
    return [row for row in rows if row["arm"] == "good"]


def test_a_row_holds_what_the_run_directory_says(place, arguments, rows):
    assert rows == read_rows("sweeps/all")
    assert expand(load_sweep(["sweeps/all/sweep.yaml"])) == expand(load_sweep(arguments))
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


def test_a_table_is_there_while_the_sweep_runs(rows, tables):
    assert tables == [False, True, True, True]


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


def test_the_frontier_writes_the_pages_of_circuits_first(place, rows, tmp_path, capsys):
    copy = shutil.copytree("sweeps/all", tmp_path / "all")
    broken, whole = (copy / "points" / row["point"] / "circuits/mine/node_masks" for row in good(rows))
    (broken / "circuit.json").write_text("{}")
    write_frontier([copy], pages=True)
    assert f"{broken}: no page: " in capsys.readouterr().err
    assert not (broken / "circuit.html").exists()
    page = whole / "circuit.html"
    assert page.exists() and f'"{page.relative_to(copy)}"' in (copy / "frontier.html").read_text()
    page.unlink()
    config = whole.parents[2] / "model/config.yaml"
    config.write_text(config.read_text().replace("argparse.py", "gone.py"))
    write_frontier([copy], pages=True)
    told = capsys.readouterr().err
    assert f"{whole}: no page: " in told and "gone.py" in told


def _touched(place) -> dict[str, int]:
    return {str(f): f.stat().st_mtime_ns for f in (place / "sweeps/all/points").rglob("*") if f.is_file()}


def test_what_is_done_or_failed_is_left_alone(place, arguments, rows, worker):
    before = _touched(place)
    assert sweep(load_sweep(arguments), worker=worker) == rows
    assert _touched(place) == before


def test_retry_runs_again_what_failed_and_nothing_else(place, arguments, rows, worker):
    (spared,) = (row for row in good(rows) if row["seed"] == 1)
    folder = place / "sweeps/all/points" / spared["point"]
    (folder / "spare").touch()
    before = _touched(place)
    again = sweep(load_sweep([*arguments, "arms.bad=null"]), True, worker)
    assert [row["error"] is None for row in again] == [False, True]
    assert again[1] == {**spared, "spared": 1, "error": None}
    changed = {file for file, at in _touched(place).items() if before.get(file) != at}
    assert {os.path.basename(file) for file in changed} == {"log.txt", "jobs.json"}


def test_another_prune_config_prunes_again_and_keeps_the_models(place, arguments, rows, worker):
    other = sweep(load_sweep([*arguments, "arms.bad=null", "seeds=[0]", "measures=[]",
                              f"prune={json.dumps([*QUICK, 'node_masks.steps=10'])}"]), worker=worker)  # fmt: skip
    assert other[0]["val_loss"] == good(rows)[0]["val_loss"]
    assert other[0]["train_seconds"] == good(rows)[0]["train_seconds"]
    circuit = json.loads((place / "sweeps/all/points" / other[0]["point"] / "circuits/mine/node_masks/circuit.json")
                         .read_text())  # fmt: skip
    assert circuit["settings"]["prune"]["node_masks"]["steps"] == 10


def test_a_circuit_is_what_prune_alone_finds(place, rows):
    row = good(rows)[0]
    alone = prune(
        place / "sweeps/all/points" / row["point"], "mine.jsonl", load_config(PruneConfig, [*QUICK, "name=b"])
    )
    assert alone.measures["task_loss"] == row["task_loss"]


def test_a_directory_with_another_run_is_refused_before_anything_runs(place, base, worker):
    config = load_sweep([*base, "name=taken", "arms.good=[]"])
    (point,) = expand(config)
    point.folder.mkdir(parents=True)
    (point.folder / "config.yaml").write_text("optim:\n  lr: 0.5\n")
    with pytest.raises(ConfigError, match="holds a run that differs in .*optim.lr.*; move it away"):
        sweep(config, worker=worker)
    assert [file.name for file in point.folder.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "wrong, words",
    [
        ("method=acdcc", "method must be one of node_masks"),
        (
            "measures=[my_measures:width]",
            "that can be imported, got my_measures:width",
        ),
        ('base=["data.source=text","data.paths=[nowhere.py]"]', "nowhere.py"),
    ],
)
def test_what_only_the_worker_can_tell_is_told_before_anything_runs(place, base, worker, wrong, words):
    with pytest.raises(ConfigError, match=words):
        sweep(load_sweep([*base, "name=wrong", "seeds=[0,1]", wrong]), worker=worker)
    assert not (place / "sweeps/wrong/points").exists()


def test_the_plan_tells_it_too(place, base):
    with pytest.raises(ConfigError, match="method must be one of node_masks"):
        plan(load_sweep([*base, "name=wrong", "seeds=[0,1]", "method=acdcc"]))


def test_a_sweep_that_is_refused_leaves_what_an_earlier_one_wrote(place, arguments, rows, worker):
    folder = place / "sweeps/all"
    kept = {name: (folder / name).read_bytes() for name in ("rows.jsonl", "table.md", "sweep.yaml")}
    more = [*arguments, "seeds=[0,1,2]"]
    with pytest.raises(ConfigError, match="that can be imported, got my_measures:width"):
        sweep(load_sweep([*more, "measures=[my_measures:width]"]), worker=worker)
    with open(folder / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="must be run by one command at a time"):
            sweep(load_sweep(more), worker=worker)
    assert {name: (folder / name).read_bytes() for name in kept} == kept


@pytest.mark.parametrize(
    "given, words",
    [
        ("None", "must give finite numbers .* by name, got None"),
        ("{'x': [1]}", "got {'x': "),
        ("{'x': 1e999}", "got {'x': inf"),
        ("{'val_loss': 9}", "val_loss"),
    ],
)
def test_a_measure_that_gives_no_numbers_or_takes_a_column_fails(tmp_path, monkeypatch, given, words):
    (tmp_path / "measure_of_mine.py").write_text(f"def mine(run):\n    return {given}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "measure_of_mine", raising=False)
    measure = "measure_of_mine:mine"
    with pytest.raises(ConfigError, match=words):
        run_stage(Job("measure", "measure", tmp_path, {}, {"measure": measure}))


def test_a_task_that_the_tokenizer_cannot_express_is_no_failure(place, base, rows):
    config = load_sweep([*base, "name=all", "arms.good=[]", "seeds=[0,1]", "tasks=[ioi]"])
    point = expand(config)[0]
    (job,) = (job for job in jobs(config, point) if job.stage == "prune")
    job.write(result=run_stage(job), seconds=1.0)
    assert job.record()["result"]["reached"] is False, "it counts as done, though nothing was made"
    (row,) = point_rows(config, point, recorded(config, point))
    assert (row["error"], row["full_model_loss_calibrated"], row["circuit"]) == (None, None, "node_masks")
    assert "a prompt has" in row["why"]


def test_the_columns_that_no_measure_may_take_are_those_of_rows(rows):
    own = {"depth", "spared"}
    assert {key for row in rows for key in row} - own <= COLUMNS


def _command(base, *arguments, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "sparsetrain", "sweep", *base, *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options)


def test_a_full_disk_is_a_recorded_failure(place, base, rows, worker):
    arguments = ["name=full", "arms.good=[]"]

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # a write beyond fails, as on a full disk

    full = _command(base, *arguments, preexec_fn=small_files)
    assert "could not write" in full.communicate()[1]
    assert full.returncode == 1
    (failed,) = read_rows("sweeps/full")
    assert "could not write" in failed["error"]
    (row,) = sweep(load_sweep([*base, *arguments]), True, worker)
    assert row["error"] is None


def test_a_job_whose_parent_is_killed_ends_and_is_not_done_twice(base, worker):
    config = load_sweep([*base, "name=orphan", "seeds=[0,1]", "arms.long=[train.steps=200]"])
    point = expand(config)[0]
    job, killed = next(jobs(config, point)), []

    def kill():
        if not killed and under_way(point):
            killed.append(worker.process.pid)
            worker.process.kill()

    assert worker.run(job, kill) is None
    assert killed and worker.process.pid != killed[0]
    assert job.record()["result"]["tokens"] == 200 * 4 * 32
    assert "resuming" not in (point.folder / "log.txt").read_text()


def test_runs_of_an_earlier_config_are_told(arguments, rows, place, worker, caplog, tmp_path):
    copy = shutil.copytree("sweeps/all", tmp_path / "all")
    fewer = load_sweep([*arguments, f"out={tmp_path}", "seeds=[0]", "arms.bad=null"])
    assert len(sweep(fewer, worker=worker)) == 1
    assert f"3 of the runs in {copy / 'points'} are of no point of this config" in caplog.text
