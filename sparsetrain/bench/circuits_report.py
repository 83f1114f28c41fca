"""What the benchmark of known circuits says: who finds them, how well each ranks, and how long it takes."""

from collections.abc import Callable
from statistics import mean, median

# AUROC and, behind the stroke, how often the first edges are exactly the circuit's.
# Source: re-implementations on the same programs, not their authors' code; three seeds; 1500 steps for what is trained.
# `reverse` is given there once: it is put beside both lengths.
BASELINE_METHODS = ("exact", "eap", "eap_ig_inputs", "gates", "acdc", "edge_masks", "topk_masks")
BASELINE = {
    ("xproportion", "zero"): "1.00/1.00 0.99/0.00 1.00/1.00 1.00/1.00 1.00/1.00 1.00/1.00 1.00/1.00",
    ("xproportion", "corrupted"): "1.00/1.00 1.00/1.00 1.00/1.00 1.00/1.00 1.00/1.00 1.00/1.00 1.00/1.00",
    ("reverse", "zero"): "1.00/1.00 1.00/0.00 1.00/0.00 0.99/0.00 1.00/1.00 0.80/0.00 1.00/0.67",
    ("reverse", "corrupted"): "1.00/1.00 1.00/1.00 1.00/1.00 1.00/1.00 1.00/1.00 1.00/1.00 1.00/1.00",
    ("hist", "zero"): "1.00/1.00 0.67/0.00 1.00/1.00 1.00/1.00 1.00/1.00 0.66/0.33 1.00/1.00",
    ("hist", "corrupted"): "1.00/1.00 0.62/0.00 0.62/0.00 1.00/1.00 1.00/1.00 0.85/0.00 0.50/0.00",
    ("detect_ab", "zero"): "1.00/1.00 0.90/0.00 1.00/1.00 1.00/1.00 1.00/1.00 0.91/0.00 1.00/1.00",
    ("detect_ab", "corrupted"): "1.00/1.00 1.00/1.00 1.00/1.00 1.00/1.00 1.00/1.00 1.00/1.00 1.00/1.00",
    ("sort_unique", "zero"): "1.00/1.00 0.91/0.00 1.00/1.00 1.00/1.00 1.00/1.00 0.59/0.00 0.82/0.67",
    ("sort_unique", "corrupted"): "1.00/1.00 1.00/1.00 1.00/1.00 1.00/1.00 1.00/1.00 0.85/0.00 1.00/1.00",
    ("sort", "zero"): "1.00/1.00 0.97/0.00 0.97/0.00 0.96/0.00 1.00/1.00 0.69/0.00 0.56/0.00",
    ("sort", "corrupted"): "1.00/1.00 1.00/1.00 1.00/1.00 1.00/1.00 1.00/1.00 0.96/0.67 1.00/1.00",
}


def summary(result: dict) -> str:
    """Markdown tables of one run.

    Args:
        result: {"environment": ..., "rows": [...]}, rows as `circuits.measure` returns them.
    """
    env, rows = result["environment"], result["rows"]
    seeds = sorted({row["seed"] for row in rows})
    head = (
        f"{env['device']}, {env['threads']} threads, torch {env['versions']['torch']}, Python {env['python']}, commit "
        f"{env['commit']}, {env['date']}; seeds {', '.join(map(str, seeds))}, one "
        "for what draws nothing. The circuit is the set of edges whose "
        "removal, one at a time, changes an output by more than 0.001; it was checked that it gives all outputs alone "
        "(* where it does not: there is no one circuit, and only the ranking is judged). `corrupted` puts another "
        "sequence's activations in the place of an edge. In brackets the figure of the protocol's re-implementation, "
        "where it has one."
    )
    parts = [
        "**How often the cut circuit is exactly the known one.** The cut is the shortest beginning of the ranking that "
        "gives the model's outputs, without dangling edges; of the OR gate, whose two branches each suffice, one "
        f"branch or both count.\n\n{_table(rows, _exact, False)}",
        "**The same of the cut that also drops every edge that can go**, as `sparsetrain prune` does: a circuit that "
        f"is the only one is found from any ranking, in more runs from a bad one.\n\n{_table(rows, _cleaned, False)}",
        f"**AUROC of the ranking**\n\n{_table(rows, _auroc, True)}",
        f"**How often the circuit's edges score above all others**, ties not allowed\n\n{_table(rows, _top, True)}",
        f"**Seconds to rank**, median\n\n{_table(rows, _seconds, False)}",
    ]
    return "\n\n".join([head, *parts])


def _table(rows: list[dict], cell: Callable[[list[dict]], float | None], with_baseline: bool) -> str:
    """A line for each circuit, a column for each method, and a line of means over what all methods ran on."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cases = list(dict.fromkeys((row["program"], row["ablation"]) for row in rows))
    lines = [f"| circuit | edges | {' | '.join(methods)} |", "|---|" + "---|" * (len(methods) + 1)]
    values: dict[tuple, dict[str, float | None]] = {}
    for case in cases:
        found = {m: [r for r in rows if (r["program"], r["ablation"]) == case and r["method"] == m] for m in methods}
        values[case] = {method: cell(some) if some else None for method, some in found.items()}
        first = next(row for row in rows if (row["program"], row["ablation"]) == case)
        cells = [_with(values[case][m], _baseline(*case, m, cell) if with_baseline else None) for m in methods]
        name = f"{case[0]}, {case[1]}{'*' if first['exact'] is None else ''}"
        lines.append(f"| {name} | {first['n_circuit']} of {first['n_edges']} | {' | '.join(cells)} |")
    whole = [found for found in values.values() if None not in found.values()]
    if len(whole) > 1:
        means = [f"{mean(found[method] for found in whole):.3g}" for method in methods]
        lines.append(f"| mean of the {len(whole)} with a figure for each | | {' | '.join(means)} |")
    return "\n".join(lines)


def _with(value: float | None, baseline: str | None) -> str:
    shown = "" if value is None else f"{value:.3g}"
    return f"{shown} ({baseline})" if baseline else shown


def _baseline(program: str, ablation: str, method: str, cell: Callable) -> str | None:
    known = BASELINE.get((program.removesuffix("_full"), ablation))
    if known is None or method not in BASELINE_METHODS:
        return None
    return known.split()[BASELINE_METHODS.index(method)].split("/")[cell is _top]


def _exact(rows: list[dict]) -> float | None:
    return None if rows[0]["exact"] is None else mean(row["exact"] for row in rows)


def _cleaned(rows: list[dict]) -> float | None:
    return None if rows[0]["cleaned"] is None else mean(row["cleaned"] for row in rows)


def _auroc(rows: list[dict]) -> float:
    return mean(row["auroc"] for row in rows)


def _top(rows: list[dict]) -> float:
    return mean(row["top"] for row in rows)


def _seconds(rows: list[dict]) -> float:
    return median(row["seconds"] for row in rows)
