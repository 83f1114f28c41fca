"""The page of a comparison, one file that opens offline: the histogram of differences, tables, tokens in context."""

import html
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, HoverTool
from bokeh.plotting import figure

from sparsetrain.analysis import compare_text as texts
from sparsetrain.analysis.page_parts import whole_page
from sparsetrain.files import write_whole

BETTER, WORSE = "#2f6fb5", "#c8472f"  # of B
TINTS = ((70, 140, 214), (226, 98, 72))


def write_compare_page(page: Path, found: Mapping[str, Any]) -> None:
    """Write the page, whole or not at all; the same arguments and versions give the same bytes.

    Args:
        page: the file.
        found: what compare.json holds.

    Raises:
        WriteError: it could not be written.
    """
    title = " and ".join(found["names"])
    drawn = json_item(_histogram(found), "picture") if "histogram" in found["losses"] else None
    body = f'{_header(found)}\n<section id="picture"></section>\n{_tables(found)}'
    write_whole(page, whole_page(title, body, drawn))


def _header(found: Mapping[str, Any]) -> str:
    a, b = (html.escape(name) for name in found["names"])
    told = html.escape(texts.verdict(found["losses"]))
    return (
        f"<header><h1>A: <code>{a}</code>, B: <code>{b}</code></h1><p>{told}.</p>"
        '<p class="note">Differences are B less A, so below zero (blue) B is better.</p></header>'
    )


def _histogram(found: Mapping[str, Any]) -> figure:
    edges, shares = (found["losses"]["histogram"][key] for key in ("edges", "shares"))
    source = ColumnDataSource({
        "left": edges[:-1], "right": edges[1:], "top": shares,
        "colour": [BETTER if left + right < 0 else WORSE for left, right in pairwise(edges)],
    }, name="differences")  # fmt: skip
    plot = figure(
        title="share of tokens by the difference of their losses, nats; the last bars hold all beyond them", height=260,
        sizing_mode="stretch_width", tools="save", toolbar_location=None, name="histogram",
    )  # fmt: skip
    bars = plot.quad("left", "right", "top", 0, source=source, fill_color="colour", line_color="#ffffff")
    plot.add_tools(HoverTool(renderers=[bars], tooltips="@left{0.00} to @right{0.00}: @top{0.0%}"))
    plot.y_range.start = 0
    plot.grid.visible = False
    return plot


def _tables(found: Mapping[str, Any]) -> str:
    parts = []
    for title, (head, rows) in texts.tables(found):
        top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>" for cells in rows)
        parts.append(
            f'<section><h2>{html.escape(title)}</h2><table class="verbatim"><thead><tr>{top}</tr></thead>'
            f"<tbody>{body}</tbody></table></section>"
        )
        if title == texts.TOKENS:
            parts.append(_examples(found))
    return "\n".join(parts)


def _examples(found: Mapping[str, Any]) -> str:
    """Where each token's losses differ most, every token of the context in the colour of its own difference."""
    parts = []
    for token in found["losses"]["tokens"]:
        rows = "".join(f'<p class="note">A {e["a"]:.3f}, B {e["b"]:.3f}</p>{_context(e)}' for e in token["examples"])
        told = f"{token['mean']:+.3f} on {token['n']} of them"
        parts.append(
            f"<details><summary><code>{html.escape(repr(token['text']))}</code> {told}</summary>{rows}</details>"
        )
    return f'<section id="contexts"><h3>in context</h3>{"".join(parts)}</section>'


def _context(example: Mapping[str, Any]) -> str:
    last = len(example["tokens"]) - 1
    spans = []
    for i, (text, d) in enumerate(zip(example["tokens"], example["differences"], strict=True)):
        tint = ",".join(map(str, TINTS[d > 0]))
        kind = "token peak" if i == last else "token"
        spans.append(
            f'<span class="{kind}" title="{d:+.3f}" style="background:rgba({tint},{min(1, abs(d) / 3):.2f})">'
            f"{html.escape(text)}</span>"
        )
    return f'<pre class="heat">{"".join(spans)}</pre>'
