"""Brain-inspired modular training on its published experiments: what a cost of wires does, and what swaps do."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsetrain.bench.bimt_picture import Placed, draw
from sparsetrain.bench.bimt_tasks import Experiment, experiments
from sparsetrain.bench.bimt_training import ARMS, Run, wires_of
from sparsetrain.bench.kernels import BenchError
from sparsetrain.files import write_whole
from sparsetrain.locality.measures import mean_length, null_lengths
from sparsetrain.machine import describe

LIVE = 0.01  # weights above it are counted
QUICK_STEPS = 400


@torch.no_grad()
def rows_of(run: Run, name: str, seconds: float) -> Iterator[dict]:
    """A row for each trained network.

    Args:
        run: that has ended.
        name: of the experiment.
        seconds: CPU time that all networks took together.

    Yields:
        experiment, arm, seed, steps; train and test, the losses; train_wrong and test_wrong, shares of wrong answers,
        None where there are no classes; length, the mean of |dx| by |w|, and null, the same of the network with its
        wires drawn anew, laid out afresh; total, the sum of |w|; n_live, how many weights are above 0.01, of n_weights;
        seconds, an equal share of the CPU time of all and its own for moving nodes, which is relayout_seconds.
    """
    found = {}
    for part in ("train", "test"):
        x, y = run.examples_of(part)
        outputs = run.networks(x)
        found[part], found[f"{part}_wrong"] = run.losses(outputs, y), _wrong(outputs, y)
    shared = (seconds - sum(run.relayout_seconds)) / len(run.arms)
    arms = [arm for arm in ARMS for _ in run.seeds]
    for i, (arm, seed) in enumerate(zip(arms, run.seeds * len(ARMS), strict=True)):
        edges = wires_of(run.networks, i, run.plan)
        weights = np.concatenate([piece.weights for piece in edges])
        yield {
            "experiment": name, "arm": arm, "seed": seed, "steps": run.experiment.steps,
            **{key: float(of_all[i]) if run.experiment.classes or "wrong" not in key else None
               for key, of_all in found.items()},
            "length": mean_length(edges, run.layouts[i]), "null": null_lengths(edges, run.layouts[i], [seed])[0],
            "total": float(weights.sum()), "n_live": int((weights > LIVE).sum()), "n_weights": weights.size,
            "seconds": shared + run.relayout_seconds[i], "relayout_seconds": run.relayout_seconds[i],
        }  # fmt: skip


def _wrong(outputs: Tensor, targets: Tensor) -> Tensor:
    right = targets if targets.dim() == 2 else targets.argmax(-1)
    return (outputs.argmax(-1) != right).double().mean(1)


def measure(
    names: Sequence[str], n_seeds: int, quick: bool, say: Callable[[str], None], folder: Path
) -> list[dict]:  # fmt: skip
    """Train every arm of some experiments with every seed.

    Args:
        names: of experiments; none for all.
        n_seeds: 1 or more: seeds 0, 1, ...
        quick: 400 steps and one seed, for a look.
        say: told what is done.
        folder: keeps the rows, one a line, and pictures; rows that are there are not measured again.

    Returns:
        Rows as `rows_of` gives them, with the commit that each was measured at.

    Raises:
        BenchError: there is no such experiment, or its data are not there.
    """
    known = experiments()
    if unknown := sorted(set(names) - set(known)):
        raise BenchError(f"--experiments must be among {', '.join(known)}, got {', '.join(unknown)}")
    for name in names or known:
        known[name].draw(torch.Generator())  # what is missing is said before hours of training
    folder = folder / "quick" if quick else folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in names or known:
        experiment = replace(known[name], steps=QUICK_STEPS) if quick else known[name]
        rows += _measured(name, experiment, range(1 if quick else n_seeds), say, folder)
    return rows


def _measured(
    name: str, experiment: Experiment, seeds: Sequence[int], say: Callable[[str], None], folder: Path
) -> list[dict]:
    done, commit = folder / "rows.jsonl", describe(torch.device("cpu"))["commit"]
    rows = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    key = (name, experiment.steps)
    rows = [row for row in rows if (row["experiment"], row["steps"]) == key and row["seed"] in seeds]
    if missing := [seed for seed in seeds if seed not in {row["seed"] for row in rows}]:
        say(f"{name}: {len(ARMS)} arms, seeds {', '.join(map(str, missing))}, {experiment.steps} steps")
        start, run = time.process_time(), Run(experiment, missing)
        run.train()
        found = [{**row, "commit": commit} for row in rows_of(run, name, time.process_time() - start)]
        with done.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
        if missing[0] == 0:
            write_whole(folder / f"bimt-{name}.svg", picture(run).encode())
        rows += found
    return rows


def picture(run: Run) -> str:
    """The first seed's networks of three arms, as an SVG: as they are, with L1, and with all of BIMT."""
    return draw({arm: _sheet(run, list(ARMS).index(arm) * len(run.seeds)) for arm in ("none", "L1", "all (BIMT)")})


def _sheet(run: Run, i: int) -> list[Placed]:
    return [
        (weight[i].detach().double().numpy(), *(x.numpy() for x in run.layouts[i].matrix_coordinates(matrix.name)))
        for weight, matrix in zip(run.networks.weights, run.plan.matrices, strict=True)
    ]
