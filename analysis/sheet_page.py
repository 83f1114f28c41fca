"""The page of a layout, one file that opens offline: the sheet in index order and laid out, and all measures."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bokeh.embed import json_item
from bokeh.layouts import column
from bokeh.models import ColumnDataSource, HoverTool
from bokeh.plotting import figure

from sparsetrain.analysis import locality_text as texts
from sparsetrain.analysis.page_parts import whole_page
from sparsetrain.analysis.sheet_figure import sheet_figure
from sparsetrain.files import write_whole
from sparsetrain.locality.measures import LONG
from sparsetrain.locality.run import LaidOutRun
from sparsetrain.locality.sheet import COLOURS, colour_of
from sparsetrain.pruning.circuit import Circuit


def write_sheet(page: Path, laid: LaidOutRun, found: Mapping[str, Any], circuits: Mapping[str, Circuit]) -> Path:
    """Write the page of a run's layout, whole or not at all.

    Args:
        page: the file.
        laid: the run.
        found: its measures, see `locality_report.measure`.
        circuits: of its channels, by the names that they are chosen by.

    Returns:
        `page`. The same arguments and versions give the same bytes.
    """
    titles = {
        "index": "before: nodes in the order of their indices",
        "layout": f"after: {texts.LAYOUTS[found['layout']]}",
    }
    picture = column(sheet_figure(laid, circuits, titles), _histogram(found), sizing_mode="stretch_width")
    body = f'{_header(found)}\n<section id="picture"></section>\n{_tables(found)}'
    drawn = json_item(picture, "picture")
    write_whole(page, whole_page(f"{found['run']}: its sheet", body, drawn, components=("bokeh", "bokeh-widgets")))
    return page


def _header(found: Mapping[str, Any]) -> str:
    rows = texts.model_table(found)[1]
    tiles = "".join(
        f'<div class="tile"><b>{_shown(what)}</b><strong>{_shown(value)}</strong><small>{_shown(beside)}</small></div>'
        for what, value, beside in rows
    )
    facts = {"layout": texts.LAYOUTS[found["layout"]], "edges": f"{found['n_edges']:,}", "sheet": f"{found['sheet']}-D"}
    told = "".join(f"<span><i>{key}</i> {_shown(value)}</span>" for key, value in facts.items())
    return (
        f'<header id="header"><h1><code>{_shown(found["run"])}</code> <small>where its nodes lie, and how long its '
        f'wires are</small></h1><p class="facts">{told}</p><div class="tiles" id="measures">{tiles}</div>'
        f'<div class="cautions"><b>Read with care</b><ul><li>{_shown(texts.reading(found))}</li></ul></div>'
        f'<p class="legend">{_legend()}</p></header>'
    )


def _legend() -> str:
    """What colours mean."""
    words = (f"up to {LONG[0]} long", f"up to {LONG[1]}", "longer")
    keys = " ".join(
        f'<span class="key" style="border-color:{colour}"></span>{word}'
        for colour, word in zip(COLOURS, words, strict=True)
    )
    return f"Wires {keys}; the thicker, the stronger. Rows run from the tokens down to the next ones; point at a node."


def _histogram(found: Mapping[str, Any]) -> figure:
    """Shares of |w| by the length of their wires."""
    shares = found["length"]["histogram"]
    width = found["sheet"] / len(shares)
    left = [round(i * width, 4) for i in range(len(shares))]
    middle = [x + width / 2 for x in left]
    source = ColumnDataSource({
        "left": left, "right": [x + width for x in left], "top": shares,
        "colour": [COLOURS[i] for i in colour_of(middle)],
    }, name="lengths")  # fmt: skip
    plot = figure(
        title="share of |w| by the length of its wires, laid out", height=190, sizing_mode="stretch_width",
        x_range=(0, found["sheet"]), tools="save", toolbar_location=None, name="histogram",
    )  # fmt: skip
    bars = plot.quad("left", "right", "top", 0, source=source, fill_color="colour", line_color="#ffffff")
    plot.add_tools(HoverTool(renderers=[bars], tooltips="@left to @right: @top{0.0%}"))
    plot.y_range.start = 0
    plot.grid.visible = False
    plot.yaxis[0].formatter.use_scientific = False
    return plot


def _tables(found: Mapping[str, Any]) -> str:
    left_out = ("circuit", "left out, because"), list(found["skipped"].items())
    parts = [
        ("Circuits", "circuits", texts.circuit_table(found), texts.CIRCUIT_NOTE),
        ("What circuits share", "overlaps", texts.overlap_table(found), ""),
        ("Measures of circuit discovery", "run_costs", texts.run_costs_table(found), ""),
        ("Of each circuit", "circuit_costs", texts.circuit_costs_table(found), texts.circuit_costs_note(found)),
        ("Circuits without a place", "skipped", left_out, ""),
    ]
    return "\n".join(_table(*part) for part in parts if part[2][1])


def _table(title: str, name: str, table: texts.Table, note: str) -> str:
    heads, rows = table
    head = "".join(f"<th>{_shown(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{_shown(cell)}</td>" for cell in cells) + "</tr>" for cells in rows)
    more = f'<p class="note">{_shown(note)}</p>' if note else ""
    return (
        f'<section><h2>{title}</h2>{more}<table id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
        "</table></section>"
    )


def _shown(value: str) -> str:
    return html.escape(value.strip())
