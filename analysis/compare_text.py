"""A comparison of two runs in words and tables."""

from collections.abc import Mapping, Sequence
from typing import Any

Table = tuple[Sequence[str], list[list[str]]]
TOKENS = "Tokens that add most to the difference"
MEASURES = {"n_nodes": "nodes", "n_edges": "edges", "task_loss": "task loss", "faithfulness": "faithfulness",
            "completeness_loss": "loss without it"}  # fmt: skip
COSTS = {"val_loss": "held-out loss at its end", "seconds": "seconds of training", "tokens": "tokens of training",
         "peak_bytes": "most memory, GiB"}  # fmt: skip


def verdict(losses: Mapping[str, Any]) -> str:
    """The difference in held-out loss as a sentence."""
    unit, of = losses["unit"], "windows" if losses["unit"] == "token" else "documents"
    se = f" +- {losses['se']:.4f} (standard error over {of})" if losses["se"] is not None else ""
    where = f"{losses['n_units']:,} {unit}s of {losses['n_groups']:,} {of}"
    more = f"; B is better at {losses['b_better']:.0%} of tokens" if unit == "token" else ""
    if unit == "byte":
        more = "; their tokens differ, so losses are per byte of the same documents"
    return (
        f"held-out loss, nats per {unit}: A {losses['a']:.4f}, B {losses['b']:.4f}, B - A {losses['difference']:+.4f}"
        f"{se}, on {where}{more}"
    )


def circuit_table(found: Mapping[str, Any]) -> Table:
    """Circuits side by side, A / B."""
    head = ["task", "circuit", *(f"{title}, A / B" for title in MEASURES.values()), "edges B / A"]
    return head, [
        [row["task"], row["name"], *_measures(row), _factor(row)] for row in found["circuits"]
    ]  # fmt: skip


def _measures(row: Mapping[str, Any]) -> list[str]:
    cells = []
    for key in MEASURES:
        sides = [(side or {}).get(key) for side in (row["a"], row["b"])]
        shown = [
            "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value) for value in sides
        ]
        cells.append(" / ".join(shown))
    return cells


def _factor(row: Mapping[str, Any]) -> str:
    missed = [f"{name} {'missed the target' if side else 'was not pruned'}"
              for name, side in (("A", row["a"]), ("B", row["b"])) if not (side and side["reached"])]  # fmt: skip
    if missed:
        return ", ".join(missed)
    if row["differs"]:
        return f"not comparable: {', '.join(row['differs'])} differ"
    return "" if row["factor"] is None else f"{row['factor']:.2f}"


def weight_table(found: Mapping[str, Any]) -> Table:
    """Nonzero weights of each matrix."""
    return ["matrix", "A: nonzero", "of", "B: nonzero", "of"], [
        [name, *_counts(a), *_counts(b)] for name, (a, b) in found["weights"].items()
    ]


def _counts(of: Sequence[int] | None) -> list[str]:
    return ["-", "-"] if of is None else [f"{of[0]:,} ({of[0] / max(1, of[1]):.1%})", f"{of[1]:,}"]


def cost_table(found: Mapping[str, Any]) -> Table:
    """What training cost."""
    return ["", "A", "B", "B / A"], [
        [COSTS[name], *(_number(v, name) for v in (a, b)), f"{b / a:.3g}" if a and b else ""]
        for name, (a, b) in found["cost"].items()
    ]


def _number(value: float | None, name: str) -> str:
    if value is None:
        return "not known"
    return f"{value / 2**30:.2f}" if name == "peak_bytes" else f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"


def setting_table(found: Mapping[str, Any]) -> Table:
    """The settings that differ."""
    return ["setting", "A", "B"], [[key, str(a), str(b)] for key, (a, b) in found["settings"].items()]


def token_table(found: Mapping[str, Any]) -> Table:
    """The tokens that add most to the difference."""
    return ["token", "times", "B - A there", "adds to the mean"], [
        [repr(t["text"]), str(t["n"]), f"{t['mean']:+.3f}", f"{t['adds']:+.4f}"]
        for t in found["losses"].get("tokens", [])
    ]


def document_table(found: Mapping[str, Any]) -> Table:
    """The documents that differ most."""
    return ["document", "bytes", "A", "B", "B - A"], [
        [d["text"], f"{d['n']:,}", f"{d['a']:.3f}", f"{d['b']:.3f}", f"{d['b'] - d['a']:+.3f}"]
        for d in found["losses"].get("documents", [])
    ]


def tables(found: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """All tables that have rows, with their titles."""
    every = [
        ("Circuits", circuit_table(found)),
        (TOKENS, token_table(found)),
        ("Documents that differ most, nats per byte", document_table(found)),
        ("Cost", cost_table(found)),
        ("Settings that differ", setting_table(found)),
        ("Nonzero weights", weight_table(found)),
    ]
    return [(title, table) for title, table in every if table[1]]


def report(found: Mapping[str, Any]) -> str:
    """The comparison for a terminal."""
    a, b = found["runs"]
    parts = [f"A: {a}\nB: {b}", verdict(found["losses"])]
    parts += [f"{title}\n{_aligned(*table)}" for title, table in tables(found)]
    return "\n\n".join(parts)


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in (head, *rows)]
    return "\n".join(f"  {line.rstrip()}" for line in lines)
