"""What tests of sweeps need of processes: who descends from whom, who works on a point, what rows have in common."""

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sparsetrain.sweeping.points import Point
from sparsetrain.sweeping.records import RECORDS, read_records

COSTS = ("train_seconds", "train_peak_bytes", "discovery_seconds", "discovery_peak_bytes")
QUICK = ["prune=[target_loss=0.69,node_masks.steps=20,train_pairs=16,heldout_pairs=16,reference_tokens=512,"
         "random_sets=2,nonsense=false,clean_evaluations=50]"]  # fmt: skip


def facts(rows: list[dict]) -> list[dict]:
    """Rows without what differs from one time to the next."""
    return [{key: value for key, value in row.items() if key not in (*COSTS, "sweep")} for row in rows]


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [pid, *(p for child in file.read().split() for p in family(int(child)))]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def at_work(folder: Path) -> int | None:
    """The process that works on a point: it has the point's lock open."""
    others = (pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) != os.getpid())  # which may be asking
    for pid in others:
        with suppress(OSError):
            for file in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{file}") == str(folder.resolve() / ".lock"):
                    return int(pid)
    return None


def until(true: Callable[[], bool], seconds: float = 300) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def half_way(point: Point) -> bool:
    """Whether a process trains the model of a point, and has saved a checkpoint."""
    saved = any((point.folder / "checkpoints").glob("step_*"))
    return saved and "train" not in read_records(point.folder / RECORDS) and at_work(point.folder) is not None


def resumed_at(point: Point) -> list[int]:
    """The steps at which training of a point went on."""
    return [int(step) for step in re.findall(r"resuming .*, at step (\d+)", (point.folder / "log.txt").read_text())]
