"""What the benchmark of brain-inspired modular training says: our figures beside the published ones."""

from collections.abc import Callable
from statistics import mean

from sparsetrain.bench.bimt_tasks import experiments

BIMT = "all (BIMT)"

# What the released notebook of `independence` gives when it is run with its own seed: test and train error, sum of |w|,
# mean |dx| by |w|, weights above 0.01.
RELEASED = {
    "none": (5.4e-3, 3.7e-6, 174, 0.360, 505),
    "L1": (8.5e-3, 2.1e-4, 27.5, 0.455, 25),
    "L1 + local": (2.7e-2, 2.0e-3, 30.5, 0.188, 28),
    "L1 + swap": (8.5e-3, 1.6e-4, 29.3, 0.047, 26),
    BIMT: (7.4e-3, 2.0e-4, 28.0, 0.041, 19),
}


def summary(result: dict) -> str:
    """Markdown tables of one run.

    Args:
        result: {"environment": ..., "rows": [...]}, rows as `bimt.measure` returns them.
    """
    env, rows = result["environment"], result["rows"]
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    head = (
        f"{env['device']}, {env['threads']} thread(s), torch {env['versions']['torch']}, measured at commit {commits}, "
        f"{env['date']}. Means over seeds, least and greatest in brackets. Length is the mean |dx| of wires by |w| "
        "(1/3 in random places on a line, 2/3 on a square), ratio that length over the length of the same network with "
        "its wires drawn anew and laid out afresh. L1 + swap is the network of L1 with its nodes moved: moving does "
        "not change a network, and L1 does not see places. Seconds are of CPU time, an equal share of what all "
        "networks took side by side, and in brackets those spent on moving nodes. The published figures are of one "
        "seed, which draws other numbers here."
    )
    names = list(dict.fromkeys(row["experiment"] for row in rows))
    return "\n\n".join([head, *(_experiment([r for r in rows if r["experiment"] == name]) for name in names)])


def _experiment(rows: list[dict]) -> str:
    name, seeds = rows[0]["experiment"], sorted({row["seed"] for row in rows})
    title = f"**`{name}`**, {rows[0]['steps']} steps, seed(s) {', '.join(map(str, seeds))}. {_verdict(rows)}"
    classes, released = rows[0]["test_wrong"] is not None, name == "independence"
    columns = ["arm", "test error", "train error", *(["wrong, test", "wrong, train"] if classes else [])]
    columns += ["length", "ratio", "sum of \\|w\\|", f"weights > 0.01, of {rows[0]['n_weights']}", "s"]
    columns += ["released code, one seed: test, train, sum, length, weights"] if released else []
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        found = [row for row in rows if row["arm"] == arm]
        cells = [arm, *(_spread(found, key, ".1e") for key in ("test", "train"))]
        cells += [_spread(found, key, ".1%") for key in ("test_wrong", "train_wrong")] if classes else []
        cells += [_spread(found, "length", ".3f"), _spread(found, lambda row: row["length"] / row["null"], ".2f")]
        cells += [_spread(found, key, ".0f") for key in ("total", "n_live")]
        cells.append(f"{mean(r['seconds'] for r in found):.0f} ({mean(r['relayout_seconds'] for r in found):.0f})")
        if released:
            test, train, *others = RELEASED[arm]
            cells.append(f"{test:.1e}, {train:.1e}, {', '.join(map(str, others))}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([title, "", *lines])


def _verdict(rows: list[dict]) -> str:
    """Ours beside the published figure, in words."""
    published = experiments()[rows[0]["experiment"]].published
    if published is None:
        return "No test error of the publication is known."
    ours = [row["test"] for row in rows if row["arm"] == BIMT]
    each, n_worse = ", ".join(f"{test:.1e}" for test in ours), sum(test > published for test in ours)
    return (
        f"Test error of {BIMT}: {mean(ours):.1e} ({each}), published {published:.1e}: {mean(ours) / published:.2g} "
        f"times as much; {n_worse} of {len(ours)} seeds are worse than the published one."
    )


def _spread(rows: list[dict], what: str | Callable[[dict], float], form: str) -> str:
    values = [what(row) if callable(what) else row[what] for row in rows]
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{mean(values):{form}} ({min(values):{form}}-{max(values):{form}})"
