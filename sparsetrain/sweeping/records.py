"""What a point has done: jobs.json in its run directory, written whole whenever a job is over.

A record says what was asked, so that a job whose settings changed since counts as not done.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparsetrain.config import config_to_dict
from sparsetrain.files import write_json
from sparsetrain.sweeping.identity import not_default
from sparsetrain.sweeping.points import Point
from sparsetrain.sweeping.sweep_config import ALL, BUILT_IN, Sweep, task_name

LOG, RECORDS = "log.txt", "jobs.json"


@dataclass(frozen=True)
class Job:
    """One step of a point, done by a process of its own.

    Attributes:
        name: under which it is recorded, as `train` or `prune-for_while`.
        stage: which of `stages.STAGES` does it.
        folder: the point's run directory.
        asked: what the result depends on besides the run; the record is good as long as it is the same.
        order: what the stage is told, as JSON.
        makes: files or folders in the run directory of which one must be there for the job to count as done.
    """

    name: str
    stage: str
    folder: Path
    asked: dict[str, Any]
    order: dict[str, Any]
    makes: tuple[str, ...] = field(default=())

    @property
    def file(self) -> Path:
        return self.folder / RECORDS

    def record(self) -> dict[str, Any]:
        """What is recorded of the job: `result`, or `error`, or nothing that answers what is asked now."""
        found = read_records(self.file).get(self.name, {})
        if found.get("asked") != self.asked and found.get("asked") != json.loads(json.dumps(self.asked)):
            return {}
        gone = self.makes and not any(os.path.exists(f"{self.folder}/{name}") for name in self.makes)
        return {} if gone and "result" in found and not is_impossible(found["result"]) else found

    def write(self, **outcome: Any) -> None:
        """Record the job's `result`, or its `error`.

        Raises:
            WriteError: the record could not be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.file, {**read_records(self.file), self.name: {"asked": self.asked, **outcome}})

    def message(self) -> str:
        """The job as a line of JSON, which `from_message` reads."""
        return json.dumps({**asdict(self), "folder": str(self.folder)})

    @staticmethod
    def from_message(line: str) -> "Job":
        read = json.loads(line)
        return Job(**{**read, "folder": Path(read["folder"])})


Recorded = list[tuple[Job, dict[str, Any]]]  # jobs with their records


def recorded(sweep: Sweep, point: Point) -> Recorded:
    """The jobs of a point, as far as they are known now, and what is recorded of each."""
    return [(job, job.record()) for job in jobs(sweep, point)]


def seconds(done: Recorded) -> float:
    """What the jobs took that are recorded as done."""
    return sum(record.get("seconds", 0.0) for _, record in done)


def jobs(sweep: Sweep, point: Point) -> Iterator[Job]:
    """The jobs of a point in their order; which tasks are pruned may depend on the record of the one before."""
    run, folder = {"config": config_to_dict(point.config)}, point.folder
    yield Job("train", "train", folder, point.identity, run, ("model",))
    if ALL in sweep.options.tasks:
        yield abilities(sweep, point, run)
    circuits = []
    for pruning in prunings(sweep, point, run):
        yield pruning
        circuits.append([pruning.name, pruning.asked, "result" in pruning.record()])
    for measure in sweep.options.measures:
        asked = {"measure": measure, "circuits": hashlib.sha256(json.dumps(circuits).encode()).hexdigest()}
        order = {**run, "measure": measure}
        yield Job(f"measure-{measure.replace(':', '.')}", "measure", folder, asked, order)


def abilities(sweep: Sweep, point: Point, run: dict[str, Any]) -> Job:
    """The job that finds out which tasks the full model does."""
    order = {"pairs": sweep.prune.heldout_pairs, "tasks": list(BUILT_IN)}
    return Job("abilities", "abilities", point.folder, order, {**run, **order})


def prunings(sweep: Sweep, point: Point, run: dict[str, Any]) -> Iterator[Job]:
    """The jobs that prune: the tasks that are named, and of all those that the model does."""
    named = [task for task in sweep.options.tasks if task != ALL]
    if ALL in sweep.options.tasks:
        scores = abilities(sweep, point, run).record().get("result", {})
        named += [task for task, score in scores.items() if is_done(score, sweep) and task not in named]
    settings, prune = dict(not_default(sweep.prune)), config_to_dict(sweep.prune)
    circuit = sweep.prune.name or sweep.options.method
    for task in named:
        asked = {"task": task, "text": digest(task), "method": sweep.options.method, "prune": settings}
        order = {**run, "task": task, "method": sweep.options.method, "prune": prune}
        name, folder = task_name(task), f"circuits/{task_name(task)}/{circuit}"
        made = (f"{folder}/circuit.json", f"{folder}/unreached.json")
        yield Job(f"prune-{name}", "prune", point.folder, asked, order, made)


def is_done(score: dict[str, Any], sweep: Sweep) -> bool:
    """Whether a full model does a task as well as its circuit is to do it."""
    return score["loss"] is not None and score["calibrated_loss"] <= sweep.prune.target_loss


def is_impossible(result: dict[str, Any]) -> bool:
    """Whether the outcome of a task is that too few of its prompts suit the tokenizer, or the context length."""
    return result.get("reached") is False and result.get("full_model_loss_calibrated") is None


def digest(task: str) -> str | None:
    """The hash of a task's file; a built-in task has none."""
    return hashlib.sha256(Path(task).read_bytes()).hexdigest() if task.endswith(".jsonl") else None


def look_anew(folder: Path) -> None:
    """Have a file system of several machines look anew at a point's records: it does at a file that is opened."""
    with suppress(OSError), open(folder / RECORDS):
        pass


def read_records(file: Path) -> dict[str, dict[str, Any]]:
    """The records in a file by the names of their jobs, not to be written to; none where there is no file."""
    try:
        there = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return _parsed(file, there.st_ino, there.st_mtime_ns, there.st_size)


@lru_cache(maxsize=8)  # the jobs of a point are asked for one after the other
def _parsed(file: Path, *version: int) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(file.read_text())
    except ValueError:  # not ours, or edited: done again
        return {}
    return found if isinstance(found, dict) else {}
