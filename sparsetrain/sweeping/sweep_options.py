"""The keys of a sweep besides what it varies: what its runs share, how draws are chosen, and what runs them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sparsetrain.config import option

OBJECTIVES = ("val_loss", "edges")


@dataclass(frozen=True)
class SearchOptions:
    sampler: Literal["random", "tpe"] = option(
        "random", "how `samples` are drawn; tpe: Optuna's, each draw by what those before it gave (extra sweep)"
    )
    objective: list[str] = option(
        list(OBJECTIVES), "what tpe makes small, or the front of both: val_loss; edges, the geometric mean over tasks "
        "of edges at the target, where not reached as many as the largest model has nonzeros; both means over seeds",
    )  # fmt: skip
    startup: int = option(10, "draws at random before tpe chooses", low=1)


@dataclass(frozen=True)
class EngineOptions:
    kind: Literal["serial", "ray", "slurm"] = option(
        "serial", "serial: one point after the other; ray: several at once, here or on a cluster (extra sweep); slurm: "
        "an array of Slurm jobs (extra slurm). The keys below are for the latter two",
    )  # fmt: skip
    cpus: int = option(1, "CPUs of a point; run.threads is as many where it is not set", low=1)
    gpus: float = option(
        0.0, "GPU of a point, which is one process; on Ray also a share of one; 0 hides them all", low=0, high=1
    )
    memory: float | None = option(None, "memory of a point; null: not declared", "GiB", low=0.1)
    at_once: int | None = option(None, "points at once, at most; null: as many as there is room for", low=1)
    address: str | None = option(
        None, "HOST:PORT of a Ray cluster that this machine belongs to; null: one of its own, on this machine"
    )
    partition: str | None = option(None, "Slurm's partition")
    minutes: int = option(60, "Slurm's time limit; a point that needs more is put in the queue again", "minutes", low=5)
    sbatch: list[str] = option([], "further options of Slurm's sbatch, as account=NAME")

    @property
    def hides_gpus(self) -> bool:
        """Whether points are to see no GPU."""
        return self.kind != "serial" and not self.gpus

    def problems(self) -> list[str]:
        """What cannot be asked of the engine."""
        found = []
        if self.gpus != int(self.gpus) and self.kind == "slurm":
            found.append(f"engine.gpus must be 0 or 1 with slurm, got {self.gpus}")
        host, _, port = (self.address or "host:0").rpartition(":")
        if not host or "/" in host or not port.isdigit():
            found.append(f"engine.address must be HOST:PORT, got {self.address!r}")
        found += [f"engine.sbatch must be KEY=VALUE, got {item!r}" for item in self.sbatch if item.find("=") < 1]
        return found


@dataclass(frozen=True)
class SweepOptions:
    name: str = option("sweep", "name of the sweep's folder")
    out: str = option("sweeps", "folder that holds all sweeps")
    base: list[str] = option([], "what all runs share: FILE.yaml and KEY=VALUE, as `sparsetrain train` takes them")
    seeds: list[int] = option([0], "run.seed of the points; all else is done once for each")
    dense: list[str] | None = option(
        None, "add to each arm its dense baselines of equal depth and width, with these files and overrides besides "
        "(`optim.lr=0.01`, say; `grid.model.d_model=[16,32]`: other widths); [] adds them as they are; null: none",
    )  # fmt: skip
    n_samples: int = option(0, "draws from `samples`", low=0)
    sample_seed: int = option(0, "seed of the draws; the first draws of more are the same", low=0)
    tasks: list[str] = option(
        [], "tasks to prune in every run: names, .jsonl files; all: every built-in task that the full model does, "
        "calibrated, at the target loss or better",
    )  # fmt: skip
    method: str = option("node_masks", "the method that prunes, see `sparsetrain prune --help`")
    prune: list[str] = option([], "its settings: FILE.yaml and KEY=VALUE, as `sparsetrain prune` takes them")
    measures: list[str] = option(
        [],
        "further measures of a run, as MODULE:FUNCTION; the function takes the run directory and gives numbers by name",
    )
    search: SearchOptions = field(default_factory=SearchOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name

    @property
    def adaptive(self) -> bool:
        """Whether draws depend on what those before them gave."""
        return self.search.sampler == "tpe"
