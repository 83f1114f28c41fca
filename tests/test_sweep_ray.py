"""Sweeps through a real Ray on this machine: the rows of the serial engine, also where processes are killed."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from sweep_processes import QUICK, at_work, facts, family, half_way, parent, resumed_at, until

from sparsetrain.config import ConfigError
from sparsetrain.sweeping.complete import under_way
from sparsetrain.sweeping.points import expand
from sparsetrain.sweeping.records import read_records
from sparsetrain.sweeping.run import plan, sweep
from sparsetrain.sweeping.sweep_config import load_sweep
from sparsetrain.sweeping.worker import Worker

pytest.importorskip("ray")
LONGER = ["train.steps=150", "train.checkpoint_every=20", "train.eval_every=50", "run.threads=null"]
RAY = ["engine.kind=ray", "engine.at_once=2"]


@pytest.fixture(scope="module")
def arguments(sweep_place, sweep_base):
    base, *rest = sweep_base
    return [base[:-1] + "".join(f', "{item}"' for item in LONGER) + "]", *rest, *QUICK]


def test_points_whose_processes_are_killed_go_on_and_the_rows_are_those_of_the_serial_engine(arguments):
    config = load_sweep([*arguments, "seeds=[0,1]", "name=killed", *RAY])
    first, second = expand(config)
    n_at_once = []

    def kill():
        until(lambda: at_work(first.folder) or at_work(second.folder))
        early: int = at_work(first.folder) or at_work(second.folder)  # type: ignore[assignment]
        os.kill(early, signal.SIGSTOP)  # lest it be done before the other one begins
        until(lambda: under_way(first) and under_way(second))
        os.kill(early, signal.SIGCONT)
        n_at_once.append(2)
        left = {first.id: first, second.id: second}
        while left:  # whichever comes first
            until(lambda: any(map(half_way, left.values())))
            for point in filter(half_way, list(left.values())):
                pid: int = at_work(point.folder)  # type: ignore[assignment]
                os.kill(pid if point is first else parent(parent(pid)), signal.SIGKILL)  # the second: Ray's own process
                del left[point.id]

    killer = threading.Thread(target=kill)
    killer.start()
    rows = sweep(config)
    killer.join()
    with Worker() as worker:
        whole = sweep(load_sweep([*arguments, "seeds=[0,1]", "name=whole"]), worker=worker)
    assert facts(rows) == facts(whole)
    assert n_at_once == [2]
    assert [len(resumed_at(point)) for point in (first, second)] == [1, 1]
    assert all(point.config.run.threads == 1 for point in (first, second))


def test_ctrl_c_ends_in_good_order(arguments):
    base, *rest = arguments
    long = [base[:-1] + ', "train.steps=2000"]', *rest, "seeds=[0,1]", "name=stopped", *RAY]  # both train when it comes
    points = expand(load_sweep(long))
    command = [sys.executable, "-m", "sparsetrain", "sweep", *long]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until(lambda: all(half_way(point) for point in points))
    all_of_it = family(run.pid)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    told = run.communicate(timeout=120)[1]
    assert run.returncode == 130, told
    assert "Traceback" not in told
    assert not any(map(under_way, points))
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in all_of_it))
    for point in points:
        assert read_records(point.folder / "jobs.json") == {}
        assert list((point.folder / "checkpoints").glob("step_*")), "it should have saved one"


@pytest.fixture
def cluster():
    """The address of a cluster of this machine that is not the sweep's own."""
    address = f"127.0.0.1:{free_port()}"
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # a socket's path must be short
        there = [f"--port={address.split(':')[1]}", "--num-cpus=2", f"--temp-dir={folder}", "--include-dashboard=false"]
        with open(f"{folder}/told", "w") as told:
            command = [*ray, "start", "--head", "--block", "--disable-usage-stats", *there]
            open_to_all = {
                **os.environ,
                "RAY_AUTH_MODE": "disabled",
            }  # else `ray start` asks all for a token of its own
            head = subprocess.Popen(command, stdout=told, stderr=told, env=open_to_all)
        until(lambda: "Ray runtime started" in Path(f"{folder}/told").read_text())
        yield address
        head.terminate()
        head.wait()


def test_a_cluster_that_is_there_is_joined_and_left(sweep_place, sweep_base, cluster):
    joined = [sweep_base[0], "seeds=[0,1]", "name=joined", *RAY, f"engine.address={cluster}"]
    text = plan(load_sweep(joined))
    assert f"engine: ray, cluster at {cluster}; 2 at once, each with 1 CPUs" in text
    with pytest.raises(ConfigError, match="must be at most what a machine has"):
        plan(load_sweep([*joined, "engine.cpus=3"]))
    assert [(row["error"], row["val_loss"] > 0) for row in sweep(load_sweep(joined))] == [(None, True)] * 2


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("listens", [False, True])
def test_an_address_that_does_not_answer_is_refused_before_anything_runs(arguments, listens):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if listens:
            taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"engine.address must be a Ray cluster that answers, got {address}"):
            sweep(load_sweep([*arguments, "seeds=[0,1]", "name=nowhere", *RAY, f"engine.address={address}"]))
    assert not (expand(load_sweep([*arguments, "seeds=[0,1]", "name=nowhere"]))[0].folder).exists()


def test_what_is_not_installed_is_named_with_its_extra(arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"engine.kind=ray needs ray, .* pip install 'sparsetrain\[sweep\]'"):
        sweep(load_sweep([*arguments, "seeds=[0,1]", "name=none", *RAY]))
