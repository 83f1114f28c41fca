"""Trains the same small model by different rules, to see what each costs in loss and saves in time."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch

from sparsetrain.config import RunConfig, load_config
from sparsetrain.train import train

SEEDS = (0, 1, 2)
BASE = (
    "data.vocab_size=1024", "model.n_layers=2", "model.d_model=256", "model.n_ctx=128", "sparsity.density=0.015625",
    "sparsity.embedding_density=0.0625", "optim.lr=0.06", "train.steps=500", "train.batch_size=8",
    "train.eval_every=50", "train.eval_batches=10", "train.checkpoint_every=1000", "train.histogram_every=1000000",
)  # fmt: skip
SMALL = ("model.d_model=64", "model.n_ctx=32", "train.steps=12", "train.eval_every=6", "sparsity.density=0.125",
         "train.eval_batches=2")  # fmt: skip
PAPER = "dense gradient, linear"


def arms() -> dict[str, tuple[str, ...]]:
    """The rules by name: which entries are trained, and how the density falls."""
    candidates = {
        f"c = {c}, T = {every}, linear": (
            "sparsity.gradient=candidates", f"sparsity.candidates={c}", f"sparsity.refill_every={every}",
        )
        for c, every in ((2, 50), (4, 20), (4, 50), (8, 50))
    }  # fmt: skip
    return {
        PAPER: (),
        "dense gradient, exponential": ("sparsity.anneal=exponential",),
        "dense gradient, sparse from the start": ("sparsity.anneal_start=0", "sparsity.anneal_stop=0"),
        **candidates,
        "c = 4, T = 50, exponential": (*candidates["c = 4, T = 50, linear"], "sparsity.anneal=exponential"),
    }


def measure(folder: Path, device: torch.device, quick: bool, say: Callable[[str], None]) -> list[dict]:
    """Train every rule with every seed, the rules in turn so that a busy machine slows all alike.

    Args:
        folder: where the runs go; those that are there are not trained again.
        device: where to train; on a CPU with as many threads as torch has now.
        quick: a tiny model and one seed, for a look.

    Returns:
        A row for each run: arm, seed, val_loss, seconds, and curve: [[seconds, held-out loss], ...].
    """
    rows = []
    for seed in SEEDS[: 1 if quick else None]:
        for i, (arm, overrides) in enumerate(arms().items()):
            say(f"seed {seed}, rule {i + 1} of {len(arms())}: {arm}")
            size = (*BASE, *(SMALL if quick else ()), f"run.device={device.type}")
            size = (*size, f"run.threads={torch.get_num_threads()}")
            where = (f"run.out={folder / 'quick' if quick else folder}", f"run.name={seed}-{i}", f"run.seed={seed}")
            rows.append(_row(arm, seed, train(load_config(RunConfig, [*size, *overrides, *where]))))
    return rows


def _row(arm: str, seed: int, run_dir: Path) -> dict:
    summary = json.loads((run_dir / "summary.json").read_text())
    curve = []
    for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        if "loss/val" in line:
            curve.append([line["seconds"], line["loss/val"]])
    return {"arm": arm, "seed": seed, "val_loss": summary["val_loss"], "seconds": summary["seconds"], "curve": curve}


def summary(result: dict) -> str:
    """A Markdown table: for each rule the final held-out loss, its distance from the paper's rule, and the time."""
    env, rows = result["environment"], result["rows"]
    by_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in arms()}
    paper = by_arm[PAPER]
    lines = [
        "| rule | held-out loss | minus the paper's, seed by seed | s | loss when the paper's had ended "
        "| s to the paper's loss |",
        "|---|---|---|---|---|---|",
    ]
    for arm, found in by_arm.items():
        apart = [ours["val_loss"] - theirs["val_loss"] for ours, theirs in zip(found, paper, strict=True)]
        # A faster run would have had the time for more steps: what it has at equal time is bounded by its end.
        cells = (
            arm, _spread([row["val_loss"] for row in found]), "" if found is paper else _spread(apart, signed=True),
            f"{mean(row['seconds'] for row in found):.0f}",
            f"{mean(_loss_at(ours, theirs['seconds']) for ours, theirs in zip(found, paper, strict=True)):.3f}",
            _mean_or_never([_seconds_to(ours, theirs["val_loss"]) for ours, theirs in zip(found, paper, strict=True)]),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    seeds = sorted({row["seed"] for row in rows})
    return (
        f"{env['device']}, {env['threads']} thread(s), torch {env['versions']['torch']}, commit {env['commit']}, "
        f"{env['date']}. {' '.join(BASE)}; the standard library's source; means over seeds "
        f"{', '.join(map(str, seeds))} and standard deviations; c candidates per nonzero, chosen anew every T steps.\n"
        + "\n".join(["", *lines])
    )


def _spread(values: list[float], signed: bool = False) -> str:
    around = f" +- {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):{'+' if signed else ''}.3f}{around}"


def _loss_at(row: dict, seconds: float) -> float:
    """The held-out loss of the last evaluation within so many seconds of training."""
    seen = [loss for at, loss in row["curve"] if at <= seconds + 1e-6]
    return seen[-1] if seen else row["curve"][0][1]


def _seconds_to(row: dict, loss: float) -> float | None:
    return next((at for at, reached in row["curve"] if reached <= loss), None)


def _mean_or_never(seconds: list[float | None]) -> str:
    reached = [s for s in seconds if s is not None]
    if len(reached) == len(seconds):
        return f"{mean(reached):.0f}"
    return f"{len(reached)} of {len(seconds)} seeds reach it"
