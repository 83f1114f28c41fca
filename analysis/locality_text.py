"""The measures of a layout as rows of tables, for a terminal and for a page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Found = Mapping[str, Any]  # what `locality_report.measure` gives
Table = tuple[Sequence[str], list[Sequence[str]]]  # heads, rows

LAYOUTS = {"kept": "the layout kept with the model", "afterwards": "laid out after the fact"}


def reading(found: Found) -> str:
    """What the ratio to the null says, in a sentence."""
    length, index = found["length"], found["index_order"]
    if length["length"] >= min(length["null"]):
        return (
            "Shuffled models with the same degrees have wires as short once they are laid out: there is nothing local "
            "here beyond the degrees, however short the picture looks."
        )
    shorter, below = 1 - length["ratio"], 1 - 1 / index["ratio"]
    return (
        f"The wires are {shorter:.1%} shorter than those of shuffled models with the same degrees, once laid out; and "
        f"those, with nothing local but their degrees, are {below:.1%} below the wires here in index order."
    )


def model_table(found: Found) -> Table:
    """The model's measures, each with what to read it beside."""
    return ("measure", "value", "beside"), [*_length_rows(found), *_structure_rows(found)]


def _length_rows(found: Found) -> list[Sequence[str]]:
    length, index, after = (found[key] for key in ("length", "index_order", "relayout"))
    null = length["null"]
    spread = f"null {np.mean(null):.4f} ({min(null):.4f} to {max(null):.4f}), random places {length['random']:.4f}"
    rows = [
        ("mean wire length", f"{length['length']:.4f}", spread),
        ("  its ratio to the null", f"{length['ratio']:.3f}", "1: nothing local but the degrees"),
        ("  all wires counted alike", f"{length['count_length']:.4f}", f"in index order {index['count_length']:.4f}"),
        ("  in index order", f"{index['length']:.4f}", f"ratio {index['ratio']:.3f}"),
    ]
    if found["layout"] == "kept":
        rows.append(("  laid out after the fact", f"{after['length']:.4f}", f"ratio {after['ratio']:.3f}"))
    (short, more), *others = length["longer"].items()
    beside = ", ".join(f"than {limit}: {share:.1%}" for limit, share in others)
    return [*rows, (f"  share of |w| longer than {short}", f"{more:.1%}", beside)]


def _structure_rows(found: Found) -> list[Sequence[str]]:
    q, runs, tiles = (found[key] for key in ("modularity", "clusterability", "block_fill"))
    return [
        ("Newman's Q", f"{q['q']:.3f}", f"null {np.mean(q['null']):.3f}, z {q['z']:.1f}"),
        ("  communities", str(q["n_communities"]), f"as wide as {q['spread']:.2f} of all nodes; 0: each is a place"),
        (f"clusterability, {runs['k']} runs of slots", f"{runs['layout']:.3f}",
         f"in index order {runs['index']:.3f}, random {runs['random']:.3f}"),
        (f"nonzeros in the fullest {tiles['share']:.0%} of tiles", f"{tiles['layout']:.1%}",
         f"in index order {tiles['index']:.1%}; tiles of {tiles['block']} x {tiles['block']}"),
    ]  # fmt: skip


def circuit_table(found: Found) -> Table:
    """Size, wiring and place of each circuit."""
    heads = ("circuit", "nodes", "edges", "wiring", "edge length", "the model's", "distance", "random", "z", "span",
             "random")  # fmt: skip
    rows = []
    for name, m in found["circuits"].items():
        w, s = m["wiring"], m["spread"]
        rows.append((
            name, str(m["n_nodes"]), str(m["n_edges"]), f"{w['wire_share']:.2%}", f"{w['length']:.3f}",
            f"{w['model_length']:.3f}", f"{s['distance']:.3f}", f"{s['random_distance']:.3f}", f"{s['z']:.1f}",
            f"{s['span']:.3f}", f"{s['random_span']:.3f}",
        ))  # fmt: skip
    return heads, rows


CIRCUIT_NOTE = (
    "wiring: the circuit's part of sum |w| x length over all blocks. distance: mean over pairs of its nodes, beside "
    "random nodes as well joined; z: standard deviations that it is nearer. Nodes that are joined lie near in any good "
    "layout: a z says something beside that of the same task in a run without locality. span: a mean over layers."
)


def overlap_table(found: Found) -> Table:
    """What each two circuits share, in nodes and in space."""
    rows = [
        (f"{o['shared']:.3f}", f"{o['overlap']:.3f}", f"{o['random_overlap']:.3f}", o["a"], o["b"])
        for o in found["overlaps"]
    ]
    return ("shared nodes", "in space", "random", "circuit", "and"), rows


def run_costs_table(found: Found) -> Table:
    """The measures of Nainani 2024 that are of the run, with the source of each."""
    costs = found["discovery"]
    rows = [(name, _number(value), costs["sources"][name]) for name, value in costs["run"].items()]
    return ("measure", "value", "from"), rows


def circuit_costs_table(found: Found) -> Table:
    """Those that are of circuits."""
    circuits = found["discovery"]["circuits"]
    names = list(next(iter(circuits.values()), {}))
    return ("circuit", *names), [(name, *map(_number, costs.values())) for name, costs in circuits.items()]


def circuit_costs_note(found: Found) -> str:
    """Where these are from."""
    costs = found["discovery"]
    return "; ".join(f"{name}: {costs['sources'][name]}" for name in next(iter(costs["circuits"].values()), {}))


def _number(value: float | None) -> str:
    return "not recorded" if value is None else f"{value:.4g}"


def report_text(found: Found) -> str:
    """All tables for a terminal."""
    head = f"{found['run']}: {found['n_edges']} edges, {LAYOUTS[found['layout']]}, {found['sheet']}-D sheet"
    parts = [f"{head}\n{_aligned(model_table(found))}\n{reading(found)}"]
    if found["circuits"]:
        parts.append(f"{_aligned(circuit_table(found))}\n{CIRCUIT_NOTE}")
    if found["overlaps"]:
        parts.append(_aligned(overlap_table(found)))
    parts.append(_aligned(run_costs_table(found)))
    if found["circuits"]:
        parts.append(f"{_aligned(circuit_costs_table(found))}\n{circuit_costs_note(found)}")
    parts += [f"left out: {name}: {why}" for name, why in found["skipped"].items()]
    return "\n\n".join(parts)


def _aligned(table: Table) -> str:
    heads, rows = table
    lines = [list(heads), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )  # fmt: skip
