"""What a benchmark says: tables, the densities at which sparse and dense break even, the cost model."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median

from sparsetrain.bench.timing import ratio
from sparsetrain.kernels import costs

RIVALS = ("dense fp32", "dense bf16", "torch.sparse CSR")


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
        "multiply-adds."
    ]
    for dtype in ("float32", "bfloat16"):
        for which in ("training", "forward"):
            chosen = [row for row in rows if row["op"] == "sparse_linear" and row["dtype"] == dtype]
            chosen = [row for row in chosen if row["pass"] == which]
            if chosen:
                what = "forward and both gradients" if which == "training" else "forward alone"
                parts.append(f"**`sparse_linear`, {dtype} activations, {what}**\n\n{_linear_table(chosen)}")
                parts.append(_break_even_line(chosen))
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
    dense = min(median(row["seconds"]) for row in rows if row["case"].startswith("dense"))
    ours = sorted((row["density"], median(row["seconds"])) for row in rows if row["case"] == "ours")
    for (low, before), (high, after) in pairwise(ours):
        if before <= dense < after:
            share = math.log(dense / before) / math.log(after / before)
            return low * (high / low) ** share
    return None


def coefficients(result: dict) -> dict:
    """The cost model of `kernels.costs`, fitted to one run: what costs.json holds for its kind of device."""
    env, rows = result["environment"], result["rows"]
    linear = [row for row in rows if row["op"] == "sparse_linear"]
    fitted: dict = {"from": f"fitted to {env['device']}, {env['threads']} threads, {env['date']}"}
    for dtype in ("float32", "bfloat16"):
        for which in ("forward", "training"):
            ours = [r for r in linear if (r["dtype"], r["pass"], r["case"]) == (dtype, which, "ours")]
            short = "fp32" if dtype == "float32" else "bf16"
            dense = [r for r in linear if (r["dtype"], r["pass"], r["case"]) == (dtype, which, f"dense {short}")]
            fitted.setdefault(dtype, {})[which] = {
                "sparse": costs.fit("sparse", _measured(ours)),
                "dense": costs.fit("dense", _measured(dense)),
            }
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


def _measured(rows: list[dict]) -> list[tuple[int, int, int, int, float]]:
    return [(row["m"], row["k"], row["n"], row["nnz"], median(row["seconds"])) for row in rows]


def _linear_table(rows: list[dict]) -> str:
    lines = [
        "| d | tokens | density | ours, ms | token-major, ms | dense, ms | x dense | x dense, token-major | CSR, ms "
        "| x CSR | floor, ms | of floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for width, group in _by(rows, "k"):
        found = list(group)
        rival = min((r for r in found if r["case"].startswith("dense")), key=lambda r: median(r["seconds"]))
        for density in sorted({r["density"] for r in found if r["case"] == "ours"}):
            here = {r["case"]: r for r in found if r["density"] == density}
            ours, tokens = here["ours"], here["ours, token-major"]
            csr = here.get("torch.sparse CSR")
            cells = (
                width, ours["n"], f"{density:.2%}", _ms(ours), _ms(tokens),
                f"{_ms(rival)} ({rival['case'].removeprefix('dense ')})", _times(rival, ours), _times(rival, tokens),
                _ms(csr) if csr else "-", _times(csr, ours) if csr else "-",
                f"{1e3 * ours['floor']:.3g}", f"{ours['floor'] / median(ours['seconds']):.0%}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _break_even_line(rows: list[dict]) -> str:
    found = []
    for width, group in _by(rows, "k"):
        density = break_even(list(group))
        greatest = max(row["density"] for row in rows if row["case"] == "ours")
        found.append(f"{density:.1%} at d = {width}" if density else f"above {greatest:.0%} at d = {width}")
    return f"Break-even density against the faster dense product: {', '.join(found)}."


def _selection_table(rows: list[dict]) -> str:
    lines = ["| shape | kept | type | case | ms | x topk + scatter | floor, ms | of floor |", "|---|" + "---|" * 7]
    for (m, k, dtype, kept), group in _by(rows, "m", "k", "dtype", "kept"):
        found = list(group)
        rival = next(r for r in found if r["case"] == "topk + scatter")
        for row in found:
            times = "" if row is rival else _times(rival, row)
            lines.append(
                f"| {m} x {k} | {kept} | {dtype} | {row['case']} | {_ms(row)} | {times} | {1e3 * row['floor']:.3g} "
                f"| {row['floor'] / median(row['seconds']):.0%} |"
            )
    return "\n".join(lines)


def _by(rows: Iterable[dict], *keys: str) -> Iterator[tuple]:
    """Group neighbouring rows by the values of keys."""
    yield from groupby(rows, key=lambda row: row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys))


def _ms(row: dict) -> str:
    return f"{1e3 * median(row['seconds']):.3g}"


def _times(slower: dict, faster: dict) -> str:
    middle, least, greatest = ratio(slower["seconds"], faster["seconds"])
    return f"{middle:.3g} ({least:.2g}-{greatest:.2g})"
