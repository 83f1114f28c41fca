"""What a benchmark says: tables, the densities at which sparse and dense break even, the cost model."""

import json
import math
import re
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median

from sparsetrain.bench.timing import ratio
from sparsetrain.kernels import costs


def summary(result: dict) -> str:
    """Markdown tables of one run of the benchmark.

    Args:
        result: {"environment": ..., "rows": [...]} as `sparsetrain bench` writes it.
    """
    env, rows = result["environment"], result["rows"]
    parts = [
        f"{env['device']}, {env['threads']} threads, torch {env['versions']['torch']}, Triton "
        f"{env['versions']['triton']}, Python {env['python']}, commit {env['commit']}, {env['date']}. Medians of "
        "interleaved rounds in one process; `x` is how many times faster ours is in the same rounds, with the least "
        "and the greatest in brackets; `floor` is the least time for the same bytes (a copy of as many, measured) and "
        "multiply-adds. CSR is torch.sparse with autograd, as ours; by hand, the kernels of both are called without "
        "it, and CSR is given a transposed weight that it would otherwise make each time."
    ]
    for dtype in ("float32", "bfloat16"):
        for which in ("training", "forward"):
            chosen = [row for row in rows if row["op"] == "sparse_linear" and row["dtype"] == dtype]
            chosen = [row for row in chosen if row["pass"] == which]
            if chosen:
                what = "forward and both gradients" if which == "training" else "forward alone"
                parts.append(f"**`sparse_linear`, {dtype} activations, {what}**\n\n{_linear_table(chosen)}")
                parts.append(_break_even_line(chosen))
    if worst := worst_choice(result):
        regret, row = worst
        parts.append(
            f"`auto` by the cost model fitted to these rows: at worst {regret - 1:.0%} slower than the faster of ours "
            f"and dense ({row['backend']} taken at d = {row['k']}, density {row['density']:.2%}, {row['dtype']}, "
            f"{row['pass']}). The dense products here have a dense weight at hand; `auto` writes it out first, which "
            "these times leave out and which few tokens do not repay."
        )
    for op in ("abs_topk", "project_"):
        chosen = [row for row in rows if row["op"] == op]
        if chosen:
            parts.append(f"**`{op}`**\n\n{_selection_table(chosen)}")
    return "\n\n".join(parts)


def break_even(rows: list[dict]) -> float | None:
    """The density at which ours takes as long as the faster dense product, by interpolation in logarithms.

    Args:
        rows: of one width, type and pass.

    Returns:
        A density, or None where the measured ones do not enclose it.
    """
    dense = median(_dense(rows)["seconds"])
    ours = [(density, median(_ours(rows, density)["seconds"])) for density in _densities(rows)]
    for (low, before), (high, after) in pairwise(ours):
        if before <= dense < after:
            share = math.log(dense / before) / math.log(after / before)
            return low * (high / low) ** share
    return None


def worst_choice(result: dict) -> tuple[float, dict] | None:
    """How much slower than the faster of sparse and dense `auto` would be at worst, choosing by the fitted model.

    Returns:
        The greatest ratio of the chosen backend's measured time to the least, and the row it chose; None without rows.
    """
    model, worst = coefficients(result), None
    for rows in _groups(result["rows"]):
        by_type = model[rows[0]["dtype"]][rows[0]["pass"]]
        for density in _densities(rows):
            here = [row for row in rows if row["backend"] and row["density"] in (density, 1)]
            size = next((r["m"], r["k"], r["n"], r["nnz"]) for r in here if r["density"] == density)
            predicted = {
                name: sum(by_type[name][term] * amount for term, amount in costs.terms(name, *size).items())
                for name in by_type
            }
            chosen = min((row for row in here), key=lambda row: predicted[row["backend"]])
            regret = median(chosen["seconds"]) / min(median(row["seconds"]) for row in here)
            if worst is None or regret > worst[0]:
                worst = regret, chosen | {"density": density}
    return worst


def coefficients(result: dict) -> dict:
    """The cost model of `kernels.costs`, fitted to one run: what costs.json holds for its kind of device."""
    env, rows = result["environment"], result["rows"]
    fitted: dict = {"from": f"fitted to {env['device']}, {env['threads']} threads, {env['date']}"}
    for row in rows:
        if row["op"] == "sparse_linear" and row["backend"]:
            passes = fitted.setdefault(row["dtype"], {}).setdefault(row["pass"], {})
            size = (row["m"], row["k"], row["n"], row["nnz"])
            passes.setdefault(row["backend"], []).append((*size, median(row["seconds"])))
    for dtype in ("float32", "bfloat16"):
        for passes in fitted[dtype].values():
            passes |= {backend: costs.fit(backend, measured) for backend, measured in passes.items()}
    return fitted


def write_section(document: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- bench NAME -->` and `<!-- end NAME -->` in a document, or add it at its end."""
    start, end = f"<!-- bench {name} -->", f"<!-- end {name} -->"
    section = f"{start}\n{text}\n{end}"
    old = document.read_text() if document.exists() else ""
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    new = pattern.sub(lambda _: section, old) if pattern.search(old) else f"{old.rstrip()}\n\n{section}\n"
    document.write_text(new)


def load(path: Path) -> dict:
    """A result that `sparsetrain bench` wrote."""
    return json.loads(path.read_text())


def _linear_table(rows: list[dict]) -> str:
    lines = [
        "| d | tokens | density | ours, ms | token-major, ms | dense, ms | x dense | x dense, token-major | CSR, ms "
        "| x CSR | x CSR, both by hand | floor, ms | of floor |",
        "|---|" + "---|" * 12,
    ]
    for found in _groups(rows):
        rival = _dense(found)
        for density in _densities(found):
            ours = _ours(found, density)
            tokens, csr, by_hand, csr_by_hand = (
                _case(found, case, density)
                for case in ("ours, token-major", "torch.sparse CSR", "ours, by hand", "torch.sparse CSR, by hand")
            )
            cells = (
                ours["k"], ours["n"], f"{density:.2%}",
                _ms(ours) + {"triton rows": " (rows)", "triton slabs": " (slabs)"}.get(ours["backend"], ""),
                _ms(tokens), f"{_ms(rival)} ({rival['case'].removeprefix('dense ')})",
                _times(rival, ours), _times(rival, tokens), _ms(csr) if csr else "-", _times(csr, ours) if csr else "-",
                _times(csr_by_hand, by_hand) if csr_by_hand else "-",
                f"{1e3 * ours['floor']:.3g}", f"{ours['floor'] / median(ours['seconds']):.0%}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _break_even_line(rows: list[dict]) -> str:
    found = []
    for group in _groups(rows):
        density, greatest = break_even(group), max(_densities(group))
        found.append(f"{density:.1%}" if density else f"above {greatest:.0%}")
        found[-1] += f" at d = {group[0]['k']}"
    return f"Break-even density against the faster dense product: {', '.join(found)}."


def _groups(rows: list[dict]) -> list[list[dict]]:
    """Rows of sparse_linear by type, pass and width."""
    linear = [row for row in rows if row["op"] == "sparse_linear"]
    return [list(group) for _, group in groupby(linear, key=lambda row: (row["dtype"], row["pass"], row["k"]))]


def _densities(rows: list[dict]) -> list[float]:
    return sorted({row["density"] for row in rows} - {1.0})


def _ours(rows: list[dict], density: float) -> dict:
    """The fastest of our designs at a density."""
    designs = [row for row in rows if row["density"] == density and row["case"].startswith("ours (")]
    return min(designs, key=lambda row: median(row["seconds"]))


def _dense(rows: list[dict]) -> dict:
    """The faster dense product."""
    return min((row for row in rows if row["density"] == 1), key=lambda row: median(row["seconds"]))


def _case(rows: list[dict], case: str, density: float) -> dict | None:
    return next((row for row in rows if (row["case"], row["density"]) == (case, density)), None)


def _selection_table(rows: list[dict]) -> str:
    lines = ["| shape | kept | type | case | ms | x topk + scatter | floor, ms | of floor |", "|---|" + "---|" * 7]
    for _, group in groupby(rows, key=lambda row: (row["m"], row["k"], row["dtype"])):
        found = list(group)
        rival = next(r for r in found if r["case"] == "topk + scatter")
        for row in found:
            cells = (
                f"{row['m']} x {row['k']}", row["kept"], row["dtype"], row["case"], _ms(row),
                "" if row is rival else _times(rival, row), f"{1e3 * row['floor']:.3g}",
                f"{row['floor'] / median(row['seconds']):.0%}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _ms(row: dict) -> str:
    return f"{1e3 * median(row['seconds']):.3g}"


def _times(slower: dict, faster: dict) -> str:
    middle, least, greatest = ratio(slower["seconds"], faster["seconds"])
    return f"{middle:.3g} ({least:.2g}-{greatest:.2g})"
