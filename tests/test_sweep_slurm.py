"""Sweeps through Slurm: what is sent, and how it is waited for, with a stand-in for the cluster that really runs it."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from sweep_processes import QUICK, at_work, facts, family, half_way, resumed_at, until

from sparsetrain.config import ConfigError
from sparsetrain.sweeping import slurm_engine
from sparsetrain.sweeping.points import expand
from sparsetrain.sweeping.run import plan, sweep
from sparsetrain.sweeping.slurm_engine import Slurm
from sparsetrain.sweeping.sweep_config import load_sweep
from sparsetrain.sweeping.worker import Worker

pytest.importorskip("submitit")
LONGER = ["train.steps=100", "train.checkpoint_every=20", "train.eval_every=50", "run.threads=null"]
SLURM = ["engine.kind=slurm", "engine.at_once=2", "engine.minutes=30"]


@pytest.fixture(scope="module")
def slurm(sweep_place):
    """A folder of the stand-in, whose commands are found first."""
    folder = sweep_place / "slurm"
    (folder / "bin").mkdir(parents=True)
    for name in ("sbatch", "srun", "sacct", "scontrol"):
        file = folder / "bin" / name
        file.write_text(f"#!{sys.executable}\n" + (Path(__file__).parent / "fake_slurm.py").read_text())
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("FAKE_SLURM", str(folder))
        yield folder


@pytest.fixture(scope="module")
def arguments(sweep_place, sweep_base):
    base, *rest = sweep_base
    return [base[:-1] + "".join(f', "{item}"' for item in LONGER) + "]", *rest, *QUICK]


@pytest.fixture(scope="module")
def worker(sweep_place):
    with Worker() as started:
        yield started


def test_the_script_says_what_a_point_needs(slurm, arguments):
    needs = ["engine.cpus=4", "engine.gpus=1", "engine.memory=1.5", "engine.partition=long", "engine.sbatch=account=me"]
    config = load_sweep([*arguments, *SLURM, *needs, "seeds=[0,1,2]", "name=sent"])
    (slurm / "end").write_text("CANCELLED")
    config.options.folder.mkdir(parents=True)
    with Slurm(config) as engine:
        engine.submit(expand(config))
    (script,) = slurm.glob("script-*")
    lines = script.read_text().splitlines()
    told = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {
        "partition=long", "cpus-per-task=4", "gpus-per-node=1", "mem=1536M", "time=30", "array=0-2%2", "account=me",
        "job-name=sent", "requeue", "signal=USR2@90", "open-mode=append",
    } <= told  # fmt: skip
    assert lines[-1].startswith("srun ") and "submitit.core._submit" in lines[-1]
    assert all(point.config.run.threads == 4 for point in expand(config))
    ids = json.loads((config.options.folder / "slurm.json").read_text())
    assert sorted(ids.values()) == ["1000_0", "1000_1", "1000_2"]
    until(lambda: all((slurm / f"state-{id}").read_text() == "CANCELLED" for id in ids.values()))
    (slurm / "end").unlink()


def test_a_driver_that_is_killed_waits_again_and_jobs_that_are_go_on(slurm, arguments, worker):
    """One job's machine dies, another job is told to make room: both are put in the queue again."""
    mine = [*arguments, *SLURM, "seeds=[0,1]", "name=killed"]
    config = load_sweep(mine)
    first, second = expand(config)
    driver = subprocess.Popen([sys.executable, "-m", "sparsetrain", "sweep", *mine], stderr=subprocess.DEVNULL)
    until((config.options.folder / "slurm.json").exists)
    driver.kill()
    driver.wait()
    ids = json.loads((config.options.folder / "slurm.json").read_text())
    until(lambda: half_way(first))
    (slurm / f"requeue-{ids[first.id]}").touch()
    for pid in family(int((slurm / f"pid-{ids[first.id]}").read_text())):
        os.kill(pid, signal.SIGKILL)
    until(lambda: half_way(second))
    for pid in family(int((slurm / f"pid-{ids[second.id]}").read_text()))[1:]:  # not the shell, as Slurm does
        os.kill(pid, signal.SIGUSR2)
    rows = sweep(config, worker=worker)
    whole = sweep(load_sweep([*arguments, "seeds=[0,1]", "name=whole"]), worker=worker)
    assert facts(rows) == facts(whole)
    assert len(list(slurm.glob("script-*"))) == 2, "what was in the queue should not have been sent again"
    assert [len(resumed_at(point)) for point in (first, second)] == [1, 1]
    assert at_work(first.folder) is None


def test_a_job_that_slurm_ends_is_a_recorded_failure_and_is_sent_again_with_retry(slurm, arguments, worker):
    config = load_sweep([*arguments, *SLURM, "seeds=[0]", "grid.optim.lr=[0.01]", "name=ended"])
    (slurm / "end").write_text("TIMEOUT")
    (row,) = sweep(config, worker=worker)
    (slurm / "end").unlink()
    assert "train: its Slurm job 1002 ended as TIMEOUT; see " in row["error"]
    assert sweep(config, worker=worker) == [row]
    (slurm / "disk").write_text("40000")
    (row,) = sweep(config, True, worker)
    (slurm / "disk").unlink()
    assert row["error"].startswith("train: ") and "could not write" in row["error"]


def test_a_damaged_list_of_jobs_is_an_error_with_a_remedy(slurm, arguments):
    config = load_sweep([*arguments, *SLURM, "seeds=[0]", "grid.optim.lr=[0.01]", "name=damaged"])
    config.options.folder.mkdir(parents=True)
    (config.options.folder / "slurm.json").write_text("{half")
    with pytest.raises(ConfigError, match=r"slurm\.json must hold the jobs .* move it away"):
        Slurm(config)


def test_no_more_points_run_at_once_than_asked_for_however_many_arrays_there_are(slurm, arguments, monkeypatch):
    """Arrays begin one after the other, those of a command that is given again after what is still there."""
    monkeypatch.setattr(slurm_engine, "LONGEST_ARRAY", 2)
    config = load_sweep([*arguments, *SLURM, "seeds=[0,1,2]", "name=many"])
    config.options.folder.mkdir(parents=True)
    (slurm / "end").write_text("CANCELLED")
    with Slurm(config) as engine:
        engine.submit(expand(config))
        first, second = sorted({id.partition("_")[0] for _, id in engine.waiting.values()})
    waits = [f"--dependency=afterany:{first}\n" in (slurm / f"script-{id}").read_text() for id in (first, second)]
    assert waits == [False, True]
    until(lambda: all(file.read_text() == "CANCELLED" for file in slurm.glob(f"state-{second}*")))
    (slurm / "end").unlink()


def test_the_plan_says_the_engine_and_knows_nothing_of_other_machines(slurm, arguments):
    text = plan(load_sweep([*arguments, *SLURM, "engine.partition=long", "seeds=[7,8]", "name=planned"]))
    assert "engine: slurm, partition long; 2 at once, each with 1 CPUs; how long it takes is not known yet" in text


def test_a_gpu_that_no_point_declares_is_not_asked_for(slurm, arguments):
    with pytest.raises(ConfigError, match="engine.gpus must be above 0 where run.device is cuda, got 0"):
        plan(load_sweep([*arguments, *SLURM, "grid.run.device=[cuda]", "name=gpu"]))


def test_a_machine_without_slurm_is_refused(arguments, worker, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match='engine.kind=slurm: Could not detect "srun"'):
        sweep(load_sweep([*arguments, *SLURM, "seeds=[0,1]", "name=none"]), worker=worker)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"engine.kind=slurm needs submitit, .*'sparsetrain\[slurm\]'"):
        sweep(load_sweep([*arguments, *SLURM, "seeds=[0,1]", "name=none"]), worker=worker)
