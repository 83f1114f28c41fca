"""Killed at random times, and then run again, a sweep has the rows of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

from sweep_processes import QUICK, facts, family

from sparsetrain.sweeping.points import expand
from sparsetrain.sweeping.run import sweep
from sparsetrain.sweeping.sweep_config import load_sweep
from sparsetrain.sweeping.worker import Worker

ARGUMENTS = ["seeds=[0,1]", *QUICK]


def killed(arguments: list[str], folder, seconds: float, all_at_once: bool) -> None:
    """Start a sweep and kill it some time after it has recorded something new, or else when it has ended."""
    command = [sys.executable, "-m", "sparsetrain", "sweep", *arguments]
    victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    n_before = n_recorded(folder)
    while victim.poll() is None and n_recorded(folder) == n_before:
        time.sleep(0.05)
    time.sleep(seconds)
    for pid in family(victim.pid) if victim.poll() is None and all_at_once else [victim.pid]:
        with suppress(ProcessLookupError):  # it may have ended by itself since it was looked for
            os.kill(pid, signal.SIGKILL)
    victim.wait()


def n_recorded(points) -> int:
    return sum(len(json.loads(file.read_text())) for file in points.glob("*/jobs.json"))


def test_the_rows_are_those_of_a_sweep_that_was_not_killed(sweep_place, sweep_base):
    arguments, rng = [*sweep_base, *ARGUMENTS], random.Random(5)
    points = sweep_place / "sweeps/killed/points"
    for all_at_once, latest in ((False, 1.5), (True, 0.3)):  # a little later all might be done
        killed([*arguments, "name=killed"], points, rng.uniform(0, latest), all_at_once)
    n_left = 4 - n_recorded(points)
    assert expand(load_sweep([str(points.parent / "sweep.yaml")])) == expand(load_sweep([*arguments, "name=killed"]))
    with Worker() as worker:
        rows, whole = (sweep(load_sweep([*arguments, f"name={name}"]), worker=worker) for name in ("killed", "whole"))
    assert n_left > 0, "the kills came too late to show anything"
    assert len(whole) == 2 and all(row["error"] is None and row["reached"] for row in whole)
    assert facts(rows) == facts(whole)
