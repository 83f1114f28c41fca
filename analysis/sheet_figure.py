"""The sheet as one Bokeh figure: rows of nodes and wires, in index order and laid out, with circuits to light up.

Names that are looked up: the figures `index` and `layout`, the widgets `circuit` and `share`, the sources `wires`,
`nodes`, `lit` and `dots`, and the filters `wires_shown`, `lit_shown` and `dots_shown`.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from bokeh.layouts import column, gridplot, row
from bokeh.models import (
    CDSView,
    ColumnDataSource,
    CustomJS,
    FixedTicker,
    HoverTool,
    IndexFilter,
    PanTool,
    Range1d,
    ResetTool,
    SaveTool,
    Select,
    Slider,
    WheelZoomTool,
)
from bokeh.plotting import figure

from sparsetrain.analysis.snippets import text
from sparsetrain.locality.circuit_measures import node_at
from sparsetrain.locality.positions import Layout, identity
from sparsetrain.locality.run import LaidOutRun
from sparsetrain.locality.sheet import (
    COLOURS,
    SHEAR,
    TILT,
    Row,
    Wires,
    colour_of,
    lengths,
    places,
    row_of,
    sheet_rows,
    strongest,
)
from sparsetrain.pruning.circuit import Circuit

N_WIRES = 3000
ROW_HEIGHT = 74  # pixels
STRONG = 6.0  # times the mean |w| of a matrix, from which on a wire is drawn at its thickest
LIT, NODE, DOT = "#111827", "#3f4654", "#f2b705"
EVERYTHING = "none: all wires"
DEPTHS = {"attn_in": 0, "attn_out": 1, "mlp_in": 1, "mlp_out": 2}  # of residual sites, from the block's first on

# A chosen circuit's wires and nodes are shown, and all others fade; the slider leaves the strongest wires.
SHOW = """
const pick = (filter, source) => {
  filter.indices = [...source.data.circuit.keys()].filter((i) => source.data.circuit[i] === chosen.value);
};
pick(lit_shown, lit);
pick(dots_shown, dots);
const fade = chosen.value === everything ? 1 : 0.15;
wires.data = { ...wires.data, alpha: Array.from(wires.data.opacity, (o) => o * fade) };
nodes.data = { ...nodes.data, alpha: Array.from(nodes.data.alpha, () => (fade < 1 ? 0.35 : 1)) };
const n = wires.data.opacity.length;
wires_shown.indices = [...Array(n).keys()].slice(n - Math.ceil(n * share.value / 100));
"""


def sheet_figure(laid: LaidOutRun, circuits: Mapping[str, Circuit], titles: Mapping[str, str]):
    """The Bokeh layout: a choice of circuits and of how many wires, and the sheet in both layouts, side by side.

    Args:
        laid: the run.
        circuits: of its channels, by the names that they are chosen by.
        titles: of the two sides, `index` and `layout`.
    """
    rows = sheet_rows(laid.plan)
    layouts = {"index": identity(laid.plan), "layout": laid.layout}
    wires = strongest(laid.edges, rows, N_WIRES)
    dots, lit = _circuit_columns(circuits, rows, layouts)
    sources = {
        "wires": _wire_columns(wires, rows, layouts),
        "nodes": _node_columns(wires, rows, layouts, laid),
        "lit": lit,
        "dots": dots,
    }
    models: dict[str, Any] = {name: ColumnDataSource(columns, name=name) for name, columns in sources.items()}
    models |= {f"{name}_shown": IndexFilter(indices=[], name=f"{name}_shown") for name in ("wires", "lit", "dots")}
    models["wires_shown"].indices = list(range(len(wires.top)))
    bottom = max(r.y for r in rows.values())
    x_range = Range1d(-0.02, 1.02 + SHEAR * (laid.plan.sheet - 1))
    y_range = Range1d(bottom + 0.5, -0.5)
    sides = [_side(key, title, rows, models, x_range, y_range, laid.plan.sheet) for key, title in titles.items()]
    pair = gridplot([sides], sizing_mode="stretch_width", toolbar_location="above", toolbar_options={"logo": None})
    return column(_controls(models, list(circuits), len(wires.top)), pair, sizing_mode="stretch_width")


def _controls(models: Mapping[str, Any], circuits: list[str], n_wires: int):
    chosen = Select(title="light up a circuit", options=[EVERYTHING, *circuits], value=EVERYTHING, width=360,
                    name="circuit")  # fmt: skip
    share = Slider(start=1, end=100, value=100, step=1, width=300, margin=(5, 5, 5, 40), name="share",
                   title=f"wires shown, percent of the {n_wires:,} strongest")  # fmt: skip
    show = CustomJS(args={**models, "chosen": chosen, "share": share, "everything": EVERYTHING}, code=SHOW)
    for widget in (chosen, share):
        widget.js_on_change("value", show)
    return row(chosen, share)


def _side(key: str, title: str, rows: Mapping[str, Row], models: Mapping[str, Any], x_range: Range1d,
          y_range: Range1d, sheet: int) -> figure:  # fmt: skip
    """The sheet in one of the two layouts."""
    zoom = WheelZoomTool(modifiers={"ctrl": True})
    plot = figure(
        title=title, height=int(ROW_HEIGHT * (y_range.start - y_range.end)), sizing_mode="stretch_width", name=key,
        x_range=x_range, y_range=y_range, tools=[PanTool(), zoom, ResetTool(), SaveTool()], active_scroll=zoom,
    )  # fmt: skip
    plot.grid.visible = plot.xaxis.visible = False
    plot.outline_line_color = None
    _name_rows(plot, rows, sheet)
    ends = {end: f"{end}_{key}" for end in ("x0", "y0", "x1", "y1")}
    plot.segment(**ends, source=models["wires"], view=CDSView(filter=models["wires_shown"]), line_width="width",
                 line_color=f"colour_{key}", line_alpha="alpha")  # fmt: skip
    lit = plot.segment(**ends, source=models["lit"], view=CDSView(filter=models["lit_shown"]), line_width="width",
                       line_color=LIT, line_alpha="alpha")  # fmt: skip
    place = {"x": f"x_{key}", "y": f"y_{key}"}
    nodes = plot.scatter(**place, source=models["nodes"], size=3.5, color=NODE, alpha="alpha", line_color=None)
    dots = plot.scatter(**place, source=models["dots"], view=CDSView(filter=models["dots_shown"]), size=8,
                        fill_color=DOT, line_color=LIT)  # fmt: skip
    for renderers, tooltips in (([lit], "@source → @target"), ([nodes, dots], "<b>@name</b> @word")):
        plot.add_tools(HoverTool(renderers=renderers, tooltips=tooltips))
    return plot


def _name_rows(plot: figure, rows: Mapping[str, Row], sheet: int) -> None:
    axis = plot.yaxis[0]
    axis.ticker = FixedTicker(ticks=[r.y for r in rows.values()])
    axis.major_label_overrides = {r.y: r.title for r in rows.values()}
    axis.major_tick_line_color = axis.axis_line_color = None
    axis.major_label_text_font_size = "12px"
    if sheet == 1:
        plot.hspan(y=[r.y for r in rows.values()], line_color="#dde0e6", level="underlay")
        return
    corners = [(SHEAR, -TILT / 2), (1 + SHEAR, -TILT / 2), (1, TILT / 2), (0, TILT / 2)]
    plot.patches([[x for x, _ in corners]] * len(rows), [[r.y + y for _, y in corners] for r in rows.values()],
                 fill_color="#f4f5f8", line_color="#dde0e6", level="underlay")  # fmt: skip


def _wire_columns(wires: Wires, rows: dict[str, Row], layouts: Mapping[str, Layout]) -> dict[str, Any]:
    share = np.minimum(1, wires.strength / STRONG)
    opacity = (0.08 + 0.6 * share).round(2)
    columns = {
        "width": (0.5 + 2 * share).round(2).tolist(), "opacity": opacity.tolist(), "alpha": opacity.tolist(),
    }  # fmt: skip
    for key, layout in layouts.items():
        columns |= _ends(key, places(rows, layout, wires.top, wires.top_node),
                         places(rows, layout, wires.bottom, wires.bottom_node))  # fmt: skip
        columns[f"colour_{key}"] = [COLOURS[i] for i in colour_of(lengths(rows, layout, wires))]
    return columns


def _node_columns(
    wires: Wires, rows: dict[str, Row], layouts: Mapping[str, Layout], laid: LaidOutRun
) -> dict[str, Any]:
    """The nodes that a drawn wire ends at."""
    ends = [np.concatenate(pair) for pair in ((wires.top, wires.bottom), (wires.top_node, wires.bottom_node))]
    at, nodes = np.unique(np.stack(ends), axis=1)
    names, n_wires = [r.name for r in rows.values()], _n_wires(laid)
    each = [(names[i], n) for i, n in zip(at.tolist(), nodes.tolist(), strict=True)]
    return {
        "name": [f"{name}:{n}" for name, n in each],
        "word": [f"{_word(name, n, laid)} ({n_wires[name][n]} wires)" for name, n in each],
        "alpha": [1.0] * len(at),
        **_points(rows, layouts, at, nodes),
    }


def _circuit_columns(
    circuits: Mapping[str, Circuit], rows: dict[str, Row], layouts: Mapping[str, Layout]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nodes of all circuits, and their edges with what carries a residual channel from its first site to its last."""
    nodes: list[tuple[str, str, int, int]] = []  # circuit, name, row, node
    edges: list[tuple[str, str, str, tuple[int, int], tuple[int, int], float]] = []
    for circuit, c in circuits.items():
        at = {name: _spot(name, rows, layouts["layout"]) for name in c.node_names()}
        nodes += [(circuit, name, *spot) for name, spot in at.items()]
        edges += [(circuit, e.source, e.target, at[e.source], at[e.target], 0.9) for e in c.edges]
        edges += [(circuit, a, b, at[a], at[b], 0.3) for a, b in _carried(at, rows)]
    spots = [np.array([edge[i] for edge in edges], np.int64).reshape(-1, 2) for i in (3, 4)]
    lit = {
        "circuit": [edge[0] for edge in edges], "source": [edge[1] for edge in edges],
        "target": [edge[2] for edge in edges], "alpha": [edge[5] for edge in edges],
        "width": [1.4 if edge[5] > 0.5 else 1.0 for edge in edges],
    }  # fmt: skip
    for key, layout in layouts.items():
        lit |= _ends(key, *(places(rows, layout, *spot.T) for spot in spots))
    at, node = (np.array([n[i] for n in nodes], np.int64) for i in (2, 3))
    dots = {"circuit": [n[0] for n in nodes], "name": [n[1] for n in nodes], "word": [""] * len(nodes)}
    return dots | _points(rows, layouts, at, node), lit


def _spot(name: str, rows: Mapping[str, Row], layout: Layout) -> tuple[int, int]:
    """The row, as an index, and the node of a channel of a circuit."""
    site, _, channel = name.rpartition(":")
    cls, node = node_at(site, int(channel), layout)
    parts = site.split(".")
    last = max(int(key.partition("@")[2]) for key in rows if key.startswith("residual@"))
    depth = last if site == "final_resid" else 2 * int(parts[1]) + DEPTHS.get(parts[2], 0)
    return list(rows).index(row_of(cls, depth)), node


def _carried(at: Mapping[str, tuple[int, int]], rows: Mapping[str, Row]) -> list[tuple[str, str]]:
    """Names at which the same residual channel is met one after the other."""
    stops: dict[int, dict[int, str]] = {}
    names = list(rows.values())
    for name, (i, node) in at.items():
        if names[i].name == "residual":
            stops.setdefault(node, {})[i] = name
    return [(on[a], on[b]) for on in stops.values() for a, b in pairwise(sorted(on))]


def _word(name: str, node: int, laid: LaidOutRun) -> str:
    """A token's text; the head of a query, key or value channel."""
    if name in ("tokens_in", "tokens_out"):
        return repr(text(node, laid.tokenizer))
    block = laid.plan.classes[name].block
    return f"of head {node // block}" if block else ""


def _n_wires(laid: LaidOutRun) -> dict[str, np.ndarray]:
    """How many edges each node of each class has."""
    found = {name: np.zeros(c.n, np.int64) for name, c in laid.plan.classes.items()}
    for piece in laid.edges:
        for name, nodes in ((piece.row_class, piece.rows), (piece.column_class, piece.columns)):
            found[name] += np.bincount(nodes, minlength=len(found[name]))
    return found


def _points(rows: dict[str, Row], layouts: Mapping[str, Layout], at: np.ndarray, nodes: np.ndarray) -> dict[str, Any]:
    found = {}
    for key, layout in layouts.items():
        found[f"x_{key}"], found[f"y_{key}"] = places(rows, layout, at, nodes).T.round(4).tolist()
    return found


def _ends(key: str, start: np.ndarray, end: np.ndarray) -> dict[str, list[float]]:
    columns = np.concatenate([start, end], 1).T.round(4).tolist()
    return dict(zip((f"x0_{key}", f"y0_{key}", f"x1_{key}", f"y1_{key}"), columns, strict=True))
