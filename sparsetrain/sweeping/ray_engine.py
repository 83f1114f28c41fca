"""Points through Ray: a task each, on this machine or on a cluster that shares the sweep's folder.

Ray is told what a point needs and decides where it runs. A task whose process dies is given again; the point's lock
makes it wait until the job of the dead process has saved a checkpoint and ended.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from sparsetrain.config import ConfigError
from sparsetrain.sweeping.complete import Failure, Over, complete, give_up, under_way
from sparsetrain.sweeping.engines import Tick
from sparsetrain.sweeping.points import Point
from sparsetrain.sweeping.sweep_config import Sweep
from sparsetrain.sweeping.worker import ATTEMPTS, PATIENCE, Worker

log = logging.getLogger(__name__)
GIB = 2**30
OBJECTS = 80 * 2**20  # bytes for objects, the least that Ray takes: tasks have none to share
SECONDS_TO_CONNECT, SECONDS_TO_ANSWER = 5, 20  # most of the latter is the start of Ray's own command


@dataclass
class Given:
    """A point that Ray has, and how often it was given."""

    point: Point
    times: int = 1


class Ray:
    """The engine, see `engines.Engine`; as a context it starts Ray, or joins a cluster, and leaves it in good order."""

    def __init__(self, config: Sweep):
        self.config, self.options = config, config.options.engine
        self.queues = False
        self.here = self.options.address is None
        self.words = "ray, on this machine" if self.here else f"ray, cluster at {self.options.address}"
        self.at_once: int | None = None
        self.given: dict[ray.ObjectRef, Given] = {}
        self.interrupted = False

    def __enter__(self) -> "Ray":
        start(self.options.address)
        try:
            self.at_once = self._room()
        except ConfigError:
            ray.shutdown()
            raise
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._interrupt)
        options = self.options
        self.task = ray.remote(do_point).options(
            num_cpus=options.cpus, num_gpus=options.gpus, memory=int((options.memory or 0) * GIB), max_retries=0
        )
        return self

    def __exit__(self, *error) -> None:
        given = [given.point for given in self.given.values()]
        ray.shutdown()  # ends the processes of the tasks, and each ends its job, which saves a checkpoint
        until = time.monotonic() + PATIENCE
        while any(map(under_way, given)) and time.monotonic() < until:
            time.sleep(0.2)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.before)

    def _interrupt(self, *signal_and_frame) -> None:
        """Note Ctrl-C as well as raise it: what is raised inside Ray's own code may be lost there."""
        self.interrupted = True
        raise KeyboardInterrupt

    def submit(self, points: list[Point]) -> None:
        for point in points:
            self._give(Given(point))

    def over(self, tick: Tick) -> list[Over]:
        ready, _ = ray.wait(list(self.given), timeout=1)
        if self.interrupted:
            raise KeyboardInterrupt
        tick()
        return [over for ref in ready if (over := self._taken(self.given.pop(ref), ref))]

    def _give(self, given: Given) -> None:
        self.given[self.task.remote(self.config, given.point, os.getcwd())] = given

    def _taken(self, given: Given, ref: ray.ObjectRef) -> Over | None:
        """The point of a task that ended; None if it was given again, since its process died."""
        try:
            return Over(given.point, ray.get(ref))
        except RayTaskError as error:  # an exception of ours: again it would be the same
            return Over(given.point, [give_up(self.config, given.point, str(error).strip().splitlines()[-1])])
        except RayError as error:
            told = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if given.times == ATTEMPTS:
            return Over(given.point, [give_up(self.config, given.point, told)])
        log.warning("%s: %s; it goes on from its last checkpoint", given.point.id, told)
        self._give(Given(given.point, given.times + 1))
        return None

    def _room(self) -> int:
        """How many points run at once.

        Raises:
            ConfigError: not even one.
        """
        asked = {"CPU": self.options.cpus, "GPU": self.options.gpus, "memory": (self.options.memory or 0) * GIB}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(min(int(node.get(kind, 0) / n) for kind, n in asked.items() if n) for node in nodes)
        if not room:
            most = {kind: max(node.get(kind, 0) for node in nodes) for kind in asked}
            raise ConfigError(
                f"engine.cpus, gpus and memory must be at most what a machine has ({most['CPU']:g}, {most['GPU']:g}, "
                f"{most['memory'] / GIB:.1f} GiB), got {asked['CPU']}, {asked['GPU']:g}, {self.options.memory or 0:g}"
            )
        return min(room, self.options.at_once or room)


def start(address: str | None) -> None:
    """Start Ray on this machine, or join a cluster.

    Raises:
        ConfigError: the cluster does not answer, or Ray does not start.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would send them
    if address:
        _check_answer(address)
        asked: dict[str, Any] = {"address": address}
    else:
        # Its watch over memory would end small processes of Ray's, not the jobs that are large.
        os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112
        n_cpus = len(os.sched_getaffinity(0))
        asked = {"address": "local", "num_cpus": n_cpus, "object_store_memory": OBJECTS, "include_dashboard": False}
    try:
        ray.init(**asked, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises no narrower one: of a machine that is too busy, say
        ray.shutdown()
        raise ConfigError(f"engine.kind=ray: Ray could not be started: {error}") from error


def _check_answer(address: str) -> None:
    """Ray itself waits for minutes.

    Raises:
        ConfigError: nobody answers at an address, or not a cluster of Ray's.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), SECONDS_TO_CONNECT).close()
        command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_ANSWER)
        told = asked.returncode and (asked.stderr.strip().splitlines() or ["no answer that is Ray's"])[-1]
    except subprocess.TimeoutExpired:
        told = "no answer that is Ray's"
    except (OSError, OverflowError) as error:
        told = str(error)
    if told:
        raise ConfigError(
            f"engine.address must be a Ray cluster that answers, got {address} ({told}); see `ray status` there, or "
            "leave it out"
        )


def do_point(config: Sweep, point: Point, folder: str) -> list[Failure]:
    """Do what a point needs in a process of Ray's; what failed."""
    os.chdir(folder)
    worker = _worker(config.options.engine.hides_gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return complete(config, point, worker.run)


@cache  # it takes seconds to start, and Ray's processes do one point after the other
def _worker(hide_gpus: bool, devices: str | None) -> Worker:
    return Worker(hide_gpus)
