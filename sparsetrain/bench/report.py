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
    if found := choices(result):
        parts.append(_choice_lines(found))
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


def choices(result: dict) -> list[dict]:
    """How much longer `backend="auto"` took than the fastest of what it chose from, for each product.

    Returns:
        Rows of `case` (in words), `backends` (median seconds of each), `best`, `auto` (the median ratio over rounds),
        and of the choice by the model that is fitted to this run: `fitted`, and its ratio, `fitted_ratio`.
    """
    model, found = coefficients(result), []
    rows = [row for row in result["rows"] if row["op"] == "choice"]
    for _, group in groupby(rows, key=lambda row: [row[k] for k in ("dtype", "pass", *costs.Size._fields)]):
        here = list(group)
        seconds = {row["case"]: row["seconds"] for row in here}
        auto, row = seconds.pop("auto"), here[0]
        backends = {name: median(taken) for name, taken in seconds.items()}
        best = min(backends, key=backends.__getitem__)
        by_backend = model[row["dtype"]][row["pass"]]
        fitted = min(backends, key=lambda name: costs.total(by_backend[name], costs.terms(name, _size(row))))
        layout = "token-major" if row["token_major"] else "channel-major"
        what = f"d = {row['k']}, {row['n']} {layout} tokens, {row['density']:.0%}, {row['dtype']}, {row['pass']}"
        found.append({
            "case": what, "backends": backends, "best": best, "auto": ratio(auto, seconds[best])[0],
            "fitted": fitted, "fitted_ratio": ratio(seconds[fitted], seconds[best])[0],
        })  # fmt: skip
    return found


def coefficients(result: dict) -> dict:
    """The cost model of `kernels.costs`, fitted to one run: what costs.json holds for its kind of device."""
    env, rows = result["environment"], result["rows"]
    fitted: dict = {"from": f"fitted to {env['device']}, {env['threads']} threads, {env['date']}"}
    for row in rows:
        backend = row["case"] if row["op"] == "choice" else row.get("backend")
        if backend and backend != "auto":
            passes = fitted.setdefault(row["dtype"], {}).setdefault(row["pass"], {})
            passes.setdefault(backend, []).append((_size(row), median(row["seconds"])))
    for dtype in ("float32", "bfloat16"):
        for passes in fitted[dtype].values():
            passes |= {backend: costs.fit(backend, measured) for backend, measured in passes.items()}
    return fitted


def _size(row: dict) -> costs.Size:
    return costs.Size(row["m"], row["k"], row["n"], row["nnz"], row.get("token_major", False))


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


def _choice_lines(found: list[dict], n_worst: int = 10) -> str:
    """How `auto` chose, and where it lost most."""
    auto, fitted = ([row[key] for row in found] for key in ("auto", "fitted_ratio"))
    lines = [
        f'**`backend="auto"`** took {median(auto):.2f} times as long as the fastest backend at the median of '
        f"{len(found)} products and {max(auto):.2f} times at worst, by the model it had. By the one fitted to these "
        f"rows it would take {median(fitted):.2f} and {max(fitted):.2f} times as long. Where it lost most:",
        "",
        "| product | ms of each backend | fastest | auto | by the fitted model |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(found, key=lambda row: -row["auto"])[:n_worst]:
        each = ", ".join(f"{name} {1e3 * s:.3g}" for name, s in row["backends"].items())
        fitted_cell = f"{row['fitted']}, {row['fitted_ratio']:.2f}"
        lines.append(f"| {row['case']} | {each} | {row['best']} | {row['auto']:.2f} | {fitted_cell} |")
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
