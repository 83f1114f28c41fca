"""What runs the points of a sweep: one after the other here, or through Ray or Slurm, several at once.

An engine is a context. It takes points and says which are over; whether they are done stands in their run directories.
"""

import importlib
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Protocol

from sparsetrain.config import ConfigError
from sparsetrain.sweeping.complete import Over, complete
from sparsetrain.sweeping.points import Point
from sparsetrain.sweeping.sweep_config import Sweep
from sparsetrain.sweeping.worker import Worker

Tick = Callable[[], None]
EXTRAS = {"optuna": "sweep", "ray": "sweep", "submitit": "slurm"}


class Engine(Protocol):
    """What runs points.

    Attributes:
        words: what it is, for the plan.
        at_once: points that run at once, as far as is known; None where others decide that.
        here: whether points run on this machine.
        queues: whether it keeps a queue, and may be given all points; else it is given `at_once` at a time.
    """

    words: str
    at_once: int | None
    here: bool
    queues: bool

    def __enter__(self) -> "Engine": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def submit(self, points: list[Point]) -> None:
        """Take points, to be run as there is room."""

    def over(self, tick: Tick) -> list[Over]:
        """Wait for points, about a second or until one is over; call `tick` about once a second."""


class Serial:
    """One point after the other, by one worker."""

    words, at_once, here, queues = "serial", 1, True, False

    def __init__(self, config: Sweep, worker: Worker):
        self.config, self.worker = config, worker
        self.waiting: list[Point] = []

    def __enter__(self) -> "Serial":
        return self

    def __exit__(self, *error) -> None: ...

    def submit(self, points: list[Point]) -> None:
        self.waiting += points

    def over(self, tick: Tick) -> list[Over]:
        point = self.waiting.pop(0)
        return [Over(point, complete(self.config, point, lambda job: self.worker.run(job, tick)))]


def engine_of(config: Sweep, worker: Worker) -> Engine:
    """The engine that a sweep asks for, not started yet.

    Args:
        config: the sweep.
        worker: does the jobs of the serial engine; the others have their own.

    Raises:
        ConfigError: what it needs is not installed.
    """
    kind = config.options.engine.kind
    if kind == "serial":
        return Serial(config, worker)
    if kind == "ray":
        required("ray", "engine.kind=ray")
        from sparsetrain.sweeping.ray_engine import Ray

        return Ray(config)
    required("submitit", "engine.kind=slurm")
    from sparsetrain.sweeping.slurm_engine import Slurm

    return Slurm(config)


def required(package: str, who: str) -> ModuleType:
    """A package that an extra installs.

    Raises:
        ConfigError: it is not there.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ConfigError(
            f"{who} needs {package}, which is not installed; pip install 'sparsetrain[{EXTRAS[package]}]'"
        ) from None
