"""Sweeps that were never run: rows as `sparsetrain sweep` writes them, with sizes that follow a rule, or by hand."""

import json
import math
import random
from pathlib import Path

FOUND = {
    "n_nodes": 7, "task_loss": 0.14, "completeness_loss": 0.7, "kl": 1.0, "graph": "channel", "target_loss": 0.15,
    "size": None,
}  # fmt: skip
OPEN, FAILED, IMPOSSIBLE = "open", "failed", "impossible"  # in place of a task's edges; None: not reached


def model_rows(loss, edges, n_nonzero=1000, n_params=4000, arm="", seed=0, sweep="made", **values):
    """The rows of one model; `edges` by task, or one of the words above."""
    point = "_".join([arm, *(f"{key}-{value}" for key, value in values.items()), f"seed-{seed}"])
    shared = {
        "sweep": sweep, "point": point, "arm": arm, "values": values, "seed": seed, "n_params": n_params,
        "n_nonzero": n_nonzero, "val_loss": loss, "train_seconds": 60.0, "tokens": 1000, "error": None,
    }  # fmt: skip
    rows = [{**shared, "task": task, **_outcome(found)} for task, found in edges.items() if found != OPEN]
    return rows or [{**shared, "task": None}]


def _outcome(found):
    if found == FAILED:
        return {"method": "node_masks", "reached": None, "error": "prune: died"}
    if found == IMPOSSIBLE:
        return {"reached": False, "full_model_loss_calibrated": None, "why": "no such words"}
    if found is None:
        return {"reached": False, "full_model_loss_calibrated": 0.4, "why": "0.400 is above the target"}
    nonsense = {"reached": True, "n_edges": 4 * found, "n_nodes": 3, "task_loss": 0.1}
    return {"method": "node_masks", "reached": True, "n_edges": found, **FOUND, "nonsense": nonsense}


def write_rows(folder: Path, *models) -> Path:
    """A sweep's folder with the rows of models."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for rows in models for row in rows))
    return folder


def ruled_sweep(folder: Path, widths, densities, n_seeds=2, n_tasks=20, dense=2.5, noise=0.3) -> Path:
    """A sweep in which dense circuits are `dense` / sqrt(density) times as large, whatever the loss.

    Tasks differ in how large their circuits are, and models with a high loss do not reach the hard ones.
    """
    rng = random.Random(0)
    size = [rng.gauss(5, 0.8) for _ in range(n_tasks)]
    models = []
    for seed in range(n_seeds):
        for width in widths:
            for density in (*densities, *([1] if dense else [])):
                n_nonzero = round(24 * width**2 * density)
                loss = 4 - 0.25 * math.log(width / 64) - 0.1 * math.log(n_nonzero / 1e4) + rng.gauss(0, 0.01)
                factor = math.log(dense) if density == 1 else 0.5 * math.log(density)
                logs = [factor + log + rng.gauss(0, noise) for log in size]
                edges = {f"task_{i}": round(math.exp(log)) if 0.4 * loss + 0.3 * rng.gauss(size[i], 0.3) < 3.3 else None
                         for i, log in enumerate(logs)}  # fmt: skip
                models.append(model_rows(loss, edges, n_nonzero, 24 * width**2, "dense" if density == 1 else "", seed,
                                         **{"model.d_model": width, "sparsity.density": density}))  # fmt: skip
    return write_rows(folder, *models)


def as_run(folder: Path) -> None:
    """The files that a frontier reads beside the rows, as if the sweep in a folder had been run, with its 20 tasks."""
    from sparsetrain.sweeping.points import expand
    from sparsetrain.sweeping.sweep_config import SWEEP, load_sweep, sweep_to_yaml

    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    varied = {key: sorted({row["values"][key] for row in rows}) for key in rows[0]["values"]}
    asked = [f"grid.{key}={values}" for key, values in varied.items()]
    seeds = sorted({row["seed"] for row in rows})
    base = "base=[model.d_head=8,sparsity.min_alive=0]"
    config = load_sweep([base, *asked, f"seeds={seeds}", f"out={folder.parent}", f"name={folder.name}"])
    (folder / SWEEP).write_text(sweep_to_yaml(config))
    points = {(*point.values.values(), point.seed): point for point in expand(config)}
    corpus = {"tokenizer_sha256": "x", "tokens": {"val": 1000}}
    for row in rows:
        point = points[*row["values"].values(), row["seed"]]
        row |= {"point": point.id, "arm": "", "values": point.values}
        circuit = point.folder / "circuits" / row["task"] / "node_masks"
        circuit.mkdir(parents=True)
        (circuit / "circuit.json").write_text("{}")
        (point.folder / "environment.json").write_text(json.dumps({"corpus": corpus}))
    write_rows(folder, rows)


if __name__ == "__main__":  # a sweep of 1,000 runs, to see how long a page takes
    import sys

    made = ruled_sweep(Path(sys.argv[1]), range(32, 192, 8), [0.5 * 0.8**i for i in range(24)])
    as_run(made)
