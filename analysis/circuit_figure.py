"""A circuit as one Bokeh figure: nodes coloured by ablation effect, edges by the sign and size of their weight.

Names that the page's script looks up: the sources `nodes`, `marks`, `edges`, `links`, `chosen`, `labels`, the
filter `edges_shown` and the renderer `links_drawn`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bokeh.embed import json_item
from bokeh.models import (
    BoxAnnotation,
    CDSView,
    ColorBar,
    ColumnDataSource,
    CustomJS,
    FixedTicker,
    GlyphRenderer,
    HoverTool,
    IndexFilter,
    LinearAxis,
    LinearColorMapper,
    PanTool,
    Range1d,
    ResetTool,
    SaveTool,
    TapTool,
    WheelZoomTool,
    ZoomInTool,
    ZoomOutTool,
)
from bokeh.palettes import Purples256
from bokeh.plotting import figure

from sparsetrain.analysis.circuit_layout import Layout, channel_of, is_residual, site_of

POSITIVE, NEGATIVE, QUIET = "#2f6fb5", "#c8472f", "#9aa0a8"
SHADES = list(reversed(Purples256[:226]))  # without the palest, which would vanish on white
ROW_HEIGHT, LOWEST, HIGHEST = 42, 430, 1100  # pixels
DRAWN_WIDTH = 820  # pixels, about; decides how large nodes may be
UNKNOWN = "#d7dae0"  # the colour of a node whose effect was not measured
LABELLED = 60  # nodes; in a larger circuit only the chosen node and its neighbours are labelled
WIDEST = 4.5  # pixels, of the strongest edge


def circuit_figure(data: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Draw the picture described by a page's data.

    Args:
        data: see `circuit_data.page_data`.
        layout: positions of its points.

    Returns:
        What `Bokeh.embed.embed_item` takes, as plain values, the same for the same arguments.
    """
    plot = _empty_plot(layout)
    _draw_heads(plot, layout)
    points = [*data["nodes"], *data["marks"]]
    _draw_links(plot, data["links"], [p["name"] for p in points], layout)
    edges = _draw_edges(plot, data["edges"], [n["name"] for n in data["nodes"]], layout)
    nodes, marks = _draw_points(plot, data, layout)
    plot.add_tools(
        TapTool(renderers=[nodes, marks]),
        # One edge of those that meet in a node, and below it, so that it does not lie upon the node's own words.
        HoverTool(
            renderers=[edges], tooltips="@source → @target<br>weight @weight{0.0000}", limit=1, attachment="below"
        ),
        HoverTool(renderers=[nodes], tooltips="<b>@name</b><br>@words<br>effect @effect{0.0000}", attachment="above"),
        HoverTool(renderers=[marks], tooltips="<b>@name</b><br>@words"),
    )  # fmt: skip
    return json_item(plot, "figure")


def track(name: str) -> str:
    """The dashed line a point lies on: its residual channel's, or that of its query and key."""
    site = site_of(name)
    if is_residual(site) and site != "positions":
        return f"residual {channel_of(name)}"
    if site.endswith((".q", ".k")):
        return f"{site[:-1]}qk {channel_of(name)}"
    return name


def _empty_plot(layout: Layout) -> figure:
    bottom = layout.bands[-1].bottom
    height = int(min(HIGHEST, max(LOWEST, ROW_HEIGHT * (bottom + 3))))
    zoom = WheelZoomTool(modifiers={"ctrl": True})
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        x_range=Range1d(-1, layout.n_columns + 1),
        y_range=Range1d(bottom + 0.1, -0.9),
        tools=[PanTool(), zoom, ZoomInTool(), ZoomOutTool(), ResetTool(), SaveTool()],
        active_scroll=zoom,
        toolbar_location="above",
        name="circuit",
    )
    plot.toolbar.logo = None
    plot.grid.visible = False
    plot.xaxis.visible = False
    plot.outline_line_color = None
    _name_rows(plot, layout)
    return plot


def _name_rows(plot: figure, layout: Layout) -> None:
    """Rows on the inner axis, bands on the outer one; bands are shaded in turn."""
    _label_axis(plot.yaxis[0], {row.y: row.title for row in layout.rows}, "#5b6270")
    outer = LinearAxis()
    _label_axis(outer, {(band.top + band.bottom) / 2: band.title for band in layout.bands}, "#1d2330")
    outer.major_label_text_font_style = "bold"
    plot.add_layout(outer, "left")
    for i, band in enumerate(layout.bands):
        shade = "#f4f5f8" if i % 2 == 0 else "#ffffff"
        plot.add_layout(
            BoxAnnotation(top=band.top, bottom=band.bottom, fill_color=shade, line_color=None, level="image")
        )


def _label_axis(axis: LinearAxis, labels: dict[float, str], color: str) -> None:
    axis.ticker = FixedTicker(ticks=list(labels))
    axis.major_label_overrides = labels
    axis.major_label_text_color = color
    axis.major_label_text_font_size = "12px"
    axis.major_tick_line_color = axis.minor_tick_line_color = axis.axis_line_color = None


def _draw_heads(plot: figure, layout: Layout) -> None:
    boxes = {
        "left": [h.left + 0.08 for h in layout.heads],
        "right": [h.right - 0.08 for h in layout.heads],
        "top": [h.top - 0.42 for h in layout.heads],
        "bottom": [h.bottom + 0.42 for h in layout.heads],
        "title": [f"h{h.head}" for h in layout.heads],
    }
    source = ColumnDataSource(boxes, name="heads")
    plot.quad(
        "left", "right", "top", "bottom", source=source, fill_color="#e9ecf2", fill_alpha=0.6, line_color="#cfd4de"
    )
    plot.text("left", "top", "title", source=source, x_offset=2, y_offset=-1, text_font_size="10px",
              text_color="#7a8190")  # fmt: skip


def _draw_links(plot: figure, links: Sequence[Sequence[Any]], names: Sequence[str], layout: Layout) -> None:
    drawn = _tracks([(names[a], names[b], kind) for a, b, kind, _ in links], layout)
    data: dict[str, list[Any]] = _segments(drawn, layout)
    data |= {"source": [a for a, _ in drawn], "target": [b for _, b in drawn], "track": [track(a) for a, _ in drawn]}
    data["alpha"] = [_opacity(len(drawn), 0.8)] * len(drawn)
    source = ColumnDataSource(data, name="links")
    plot.segment("x0", "y0", "x1", "y1", source=source, line_color=QUIET, line_dash="dotted", line_alpha="alpha",
                 name="links_drawn")  # fmt: skip


def _tracks(links: Sequence[tuple[str, str, str]], layout: Layout) -> list[tuple[str, str]]:
    """The links as pieces that do not lie on each other: down a residual channel from each point to the next."""
    pieces: dict[tuple[str, str], None] = {}
    stops: dict[str, set[str]] = {}
    for source, target, kind in links:
        if kind == "residual":
            stops.setdefault(f"{channel_of(source)}", set()).update((source, target))
        else:
            pieces[source, target] = None
    for on_track in stops.values():
        ordered = sorted(on_track, key=lambda name: layout.positions[name][1])
        pieces |= dict.fromkeys(itertools.pairwise(ordered))
    return list(pieces)


def _draw_edges(plot: figure, edges: Sequence[Sequence[Any]], names: Sequence[str], layout: Layout) -> GlyphRenderer:
    strongest = max((abs(weight) for _, _, weight in edges), default=1.0)
    data: dict[str, list[Any]] = _segments([(names[a], names[b]) for a, b, _ in edges], layout)
    data["source"] = [names[a] for a, _, _ in edges]
    data["target"] = [names[b] for _, b, _ in edges]
    data["weight"] = [weight for _, _, weight in edges]
    data["width"] = [round(0.6 + (WIDEST - 0.6) * abs(weight) / strongest, 2) for _, _, weight in edges]
    data["color"] = [POSITIVE if weight > 0 else NEGATIVE for _, _, weight in edges]
    data["alpha"] = [_opacity(len(edges), 0.75)] * len(edges)
    view = CDSView(filter=IndexFilter(indices=list(range(len(edges))), name="edges_shown"))
    return plot.segment(
        "x0", "y0", "x1", "y1", source=ColumnDataSource(data, name="edges"), view=view, line_width="width",
        line_color="color", line_alpha="alpha", hover_line_alpha=1, line_cap="round",
    )  # fmt: skip


def _opacity(n: int, most: float) -> float:
    """Less for many lines, so that they do not become one patch."""
    return round(min(most, max(0.15, 150 / max(n, 1))), 2)


def _draw_points(plot: figure, data: Mapping[str, Any], layout: Layout) -> tuple[GlyphRenderer, GlyphRenderer]:
    size = round(min(15, max(5, 0.8 * DRAWN_WIDTH / layout.n_columns)), 1)
    nodes = _point_columns(data["nodes"], layout)
    effects = [n["effect"] for n in data["nodes"]]
    nodes["effect"] = [math.nan if e is None else e for e in effects]
    nodes["shade"] = [math.nan if e is None else math.sqrt(max(e, 0.0)) for e in effects]
    ring = ColumnDataSource({"x": [], "y": []}, name="chosen")
    plot.scatter("x", "y", source=ring, size=size + 9, fill_color=None, line_color="#111111", line_width=2)
    colour = _effect_colours(plot, [e for e in effects if e is not None])
    marks_drawn = plot.scatter(
        "x", "y", source=_clickable(_point_columns(data["marks"], layout), "marks"), marker="square", size=0.7 * size,
        fill_color="#ffffff", line_color="#5b6270", alpha="alpha", nonselection_alpha="alpha",
    )  # fmt: skip
    nodes_drawn = plot.scatter(
        "x", "y", source=_clickable(nodes, "nodes"), size=size, fill_color=colour, line_color="#3c3550",
        line_width=1 if size > 7 else 0.5, alpha="alpha", nonselection_alpha="alpha", hover_line_color="#000000",
    )  # fmt: skip
    _draw_labels(plot, nodes, size)
    _draw_answers(plot, data, layout)
    return nodes_drawn, marks_drawn


def _point_columns(points: Sequence[Mapping[str, Any]], layout: Layout) -> dict[str, list[Any]]:
    places = [layout.positions[p["name"]] for p in points]
    return {
        "x": [x for x, _ in places],
        "y": [y for _, y in places],
        "name": [p["name"] for p in points],
        "words": [p["words"] for p in points],
        "track": [track(p["name"]) for p in points],
        "alpha": [1.0] * len(points),
    }


def _clickable(columns: dict[str, list[Any]], name: str) -> ColumnDataSource:
    source = ColumnDataSource(columns, name=name)
    source.selected.js_on_change("indices", CustomJS(code="circuitPage.tapped()"))
    return source


def _draw_labels(plot: figure, nodes: Mapping[str, list[Any]], size: float) -> None:
    shown = range(len(nodes["x"])) if len(nodes["x"]) <= LABELLED else ()
    labels = {
        "x": [nodes["x"][i] for i in shown],
        "y": [nodes["y"][i] for i in shown],
        "text": [nodes["name"][i].rpartition(":")[2] for i in shown],
    }
    plot.text(
        "x", "y", "text", source=ColumnDataSource(labels, name="labels"), x_offset=size / 2 + 6, text_baseline="middle",
        text_font_size="10px", text_color="#1d2330",
    )  # fmt: skip


def _draw_answers(plot: figure, data: Mapping[str, Any], layout: Layout) -> None:
    answers = [mark for mark in data["marks"] if site_of(mark["name"]) == "logits"]
    columns = _point_columns(answers, layout)
    columns["text"] = [mark["token"].replace("\n", "↵").replace(" ", "·") for mark in answers]
    plot.text(
        "x", "y", "text", source=ColumnDataSource(columns, name="answers"), x_offset=12, text_baseline="middle",
        text_font_size="12px", text_color="#1d2330",
    )  # fmt: skip


def _effect_colours(plot: figure, effects: Sequence[float]) -> dict[str, Any] | str:
    """Colour by the square root of the effect, since most effects are far smaller than the largest; grey without."""
    if not effects:
        return UNKNOWN
    highest = max([*effects, 0.0]) or 1.0
    mapper = LinearColorMapper(palette=SHADES, low=0, high=math.sqrt(highest), nan_color=UNKNOWN)
    ticks = [math.sqrt(highest) * share for share in (0, 0.25, 0.5, 0.75, 1)]
    bar = ColorBar(
        color_mapper=mapper,
        title="effect: rise of the held-out task loss when the node is ablated too (square-root scale)",
        title_text_font_size="11px", title_text_font_style="normal", height=8, padding=4,
        ticker=FixedTicker(ticks=ticks), major_label_overrides={t: f"{t * t:.2g}" for t in ticks},
        major_tick_line_color=None,
    )  # fmt: skip
    plot.add_layout(bar, "below")
    return {"field": "shade", "transform": mapper}


def _segments(pairs: Sequence[tuple[str, str]], layout: Layout) -> dict[str, list[Any]]:
    starts, ends = ([layout.positions[pair[i]] for pair in pairs] for i in (0, 1))
    return {
        "x0": [x for x, _ in starts], "y0": [y for _, y in starts],
        "x1": [x for x, _ in ends], "y1": [y for _, y in ends],
    }  # fmt: skip
