"""Points through Slurm: an array of jobs, written and sent by submitit, on machines that share the sweep's folder.

Which point is which job stands in `slurm.json` in the sweep's folder, so that a sweep that is started again waits for
what is in the queue or runs, and sends only the rest. A job that is sent back to the queue, by Slurm or since its time
ran out, goes on from the point's last checkpoint. What a job did is read from the run directories; what it returns, and
its pickle, from nowhere.
"""

import json
import logging
import time
from collections.abc import Iterable
from typing import Any

from submitit.core.utils import DelayedSubmission, FailedJobError
from submitit.slurm.slurm import SlurmExecutor, SlurmInfoWatcher, SlurmJob

from sparsetrain.config import ConfigError
from sparsetrain.files import write_json
from sparsetrain.sweeping.complete import Failure, Over, complete, give_up, is_left
from sparsetrain.sweeping.engines import Tick
from sparsetrain.sweeping.points import Point
from sparsetrain.sweeping.records import look_anew, recorded
from sparsetrain.sweeping.sweep_config import Sweep
from sparsetrain.sweeping.worker import Worker

log = logging.getLogger(__name__)
IDS = "slurm.json"
LONGEST_ARRAY = 1000  # Slurm's own default
TIMES_OUT = 100  # how often a point may run out of time; it goes on each time
UNKNOWN_FOR = 24 * 3600  # seconds after which a job that Slurm does not know is not a new one, but forgotten
NO_FAULT = ("COMPLETED", "CANCELLED", "NODE_FAIL")  # of the point: not recorded as its failure


class PointTask:
    """What a job of Slurm does; submitit calls it, and `checkpoint` when Slurm is about to end it."""

    def __init__(self, config: Sweep, point: Point):
        self.config, self.point = config, point

    def __call__(self) -> None:
        self.worker = Worker(self.config.options.engine.hides_gpus)
        with self.worker:
            for failure in complete(self.config, self.point, self.worker.run):
                print(f"{self.point.id}: {failure.job} failed: {failure.error}")

    def checkpoint(self) -> DelayedSubmission:
        """End the job that is under way, which saves its checkpoint; gives what the next job of Slurm is to do."""
        self.worker.stop()
        return DelayedSubmission(PointTask(self.config, self.point))


class Slurm:
    """The engine, see `engines.Engine`; what is in the queue or runs when it is left goes on there."""

    here, queues = False, True

    def __init__(self, config: Sweep):
        self.config, self.options = config, config.options.engine
        self.words = f"slurm, partition {self.options.partition or 'by default'}"
        self.at_once = self.options.at_once
        self.watch = SlurmInfoWatcher(delay_s=60)
        self.file = config.options.folder / IDS
        try:
            self._ids: dict[str, str] = json.loads(self.file.read_text()) if self.file.exists() else {}
        except ValueError as error:
            raise ConfigError(
                f"{self.file} must hold the jobs that Slurm has, got: {error}; move it away once none is in its queue"
            ) from None
        self.waiting: dict[str, tuple[Point, str]] = {}

    def __enter__(self) -> "Slurm":
        try:
            self.executor = SlurmExecutor(self.config.options.folder / "slurm", max_num_timeout=TIMES_OUT)
            self.executor.update_parameters(**parameters(self.config))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"engine.kind=slurm: {error}") from None
        return self

    def __exit__(self, kind, *error) -> None:
        if kind and self.waiting:
            ids = " ".join(id for _, id in self.waiting.values())
            log.warning("Slurm goes on; give the command again to wait for it, or end it by: scancel %s", ids)

    def submit(self, points: list[Point]) -> None:
        known = {point.id: id for point in points if (id := self._ids.get(point.id))}
        if known:
            self._watch(known.values())
        self.waiting |= {p.id: (p, known[p.id]) for p in points if p.id in known and self._lives(known[p.id])}
        new = [point for point in points if point.id not in self.waiting]
        for first in range(0, len(new), LONGEST_ARRAY):
            self._send(new[first : first + LONGEST_ARRAY])

    def over(self, tick: Tick) -> list[Over]:
        tick()
        time.sleep(max(1, len(self.waiting) / 100))  # the file system is to be left alone
        found = [over for point, id in list(self.waiting.values()) if (over := self._outcome(point, id))]
        for over in found:
            del self.waiting[over.point.id]
        return found

    def _send(self, points: list[Point]) -> None:
        """Send one array; where so many run at once at most, to begin when those sent before are over.

        Raises:
            ConfigError: Slurm refuses it.
        """
        before = sorted({id.partition("_")[0] for _, id in self.waiting.values()})
        asked = parameters(self.config)
        if before and self.at_once and not self.config.options.adaptive:  # a search itself gives so many at once
            asked["additional_parameters"]["dependency"] = f"afterany:{':'.join(before)}"
        try:
            self.executor.update_parameters(**asked)
            jobs = self.executor.submit_array([PointTask(self.config, point) for point in points])
        except (FailedJobError, OSError) as error:
            raise ConfigError(f"sbatch must take the options of engine, got {str(error).strip()}") from None
        sent = {point.id: job.job_id for point, job in zip(points, jobs, strict=True)}
        self._ids |= sent
        write_json(self.file, self._ids)
        self._watch(sent.values())
        self.waiting |= {point.id: (point, sent[point.id]) for point in points}

    def _watch(self, ids: Iterable[str]) -> None:
        """Ask for many jobs at once: asked for each as it comes, Slurm would be called for each."""
        for id in ids:
            self.watch.register_job(id)
        self.watch.update()

    def _lives(self, id: str) -> bool:
        """Whether a job of an earlier start is in the queue or runs."""
        if self.watch.get_state(id, mode="cache") == "UNKNOWN":
            return time.time() - self.file.stat().st_mtime < UNKNOWN_FOR
        return not self.watch.is_done(id, mode="cache")

    def _outcome(self, point: Point, id: str) -> Over | None:
        """How a point ended; None while it is not over."""
        if ended := self.watch.is_done(id):  # before the records are read: what it did is in them then
            look_anew(point.folder)
        done = recorded(self.config, point)
        if not is_left(done):
            failed = [Failure(job.name, record["error"]) for job, record in done if "error" in record]
            return Over(point, failed)
        if not ended:
            return None
        state, out = self.watch.get_state(id, mode="cache"), SlurmJob(self.executor.folder, id).paths.stdout
        told = f"its Slurm job {id} ended as {state}; see {out}"
        fault = not state.startswith(NO_FAULT)
        return Over(point, [give_up(self.config, point, told) if fault else Failure("its Slurm job", told)])


def parameters(config: Sweep) -> dict[str, Any]:
    """What submitit is told of a sweep's jobs."""
    options = config.options.engine
    asked = {
        "job_name": config.options.name, "time": options.minutes, "cpus_per_task": options.cpus,
        "gpus_per_node": int(options.gpus) or None, "partition": options.partition,
        "mem": f"{round(options.memory * 1024)}M" if options.memory else None, "array_parallelism": options.at_once,
        "additional_parameters": {"requeue": True, **dict(item.split("=", 1) for item in options.sbatch)},
        "stderr_to_stdout": True,
    }  # fmt: skip
    return {key: value for key, value in asked.items() if value is not None}
