"""The page of a circuit in the component graph: heads and MLPs, what each reads of whom, and what heads look at.

One file that opens offline, as `circuit_page.py` writes for channels; the text is laid out here, so that the page's own
script is Bokeh's alone.
"""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bokeh.embed import json_item
from bokeh.layouts import column
from bokeh.models import CDSView, ColumnDataSource, CustomJS, HoverTool, IndexFilter, Range1d, Slider, TapTool
from bokeh.plotting import figure
from tokenizers import Tokenizer
from torch import Tensor

from sparsetrain.analysis import snippets
from sparsetrain.analysis.circuit_figure import NEGATIVE, POSITIVE
from sparsetrain.analysis.page_parts import whole_page
from sparsetrain.analysis.readings import cautions, readings
from sparsetrain.files import write_whole
from sparsetrain.model import Transformer
from sparsetrain.pruning.circuit import Circuit
from sparsetrain.tasks import TaskData

COLOURS = {"q": "#2f6fb5", "k": "#d3801f", "v": "#3b8f4e", "": "#5b6270"}
READS = {"q": "queries", "k": "keys", "v": "values", "": "an MLP or the logits"}
LISTED = 400  # edges in the table
PROMPTS = 4  # that attention is shown on

EMPTY = "<p>The circuit has no edge: with everything ablated the target is reached, or nothing was asked for.</p>"

# Tapping a node leaves its own edges bright; tapping elsewhere brings all back.
TAPPED = """
const [i] = nodes.selected.indices;
const name = i === undefined ? null : nodes.data.name[i];
const near = (j) => name === null || [edges.data.from[j], edges.data.to[j]].includes(name);
edges.data = { ...edges.data, alpha: edges.data.strength.map((s, j) => (near(j) ? s : 0.04)) };
"""
HIDE_WEAK = """
const n_hidden = Math.round(this.value / 100 * edges.data.size.length);
const order = [...edges.data.size.keys()].sort((a, b) => edges.data.size[a] - edges.data.size[b]);
shown.indices = order.slice(n_hidden).sort((a, b) => a - b);
"""


def write_component_page(page: Path, circuit: Circuit, model: Transformer, tokenizer: Tokenizer, prompts: TaskData,
                         words: Mapping[str, str]) -> Path:  # fmt: skip
    """Write the page of a circuit in the component graph, whole or not at all.

    Args:
        page: the file.
        circuit: the circuit.
        model: the full model it is part of.
        tokenizer: the model's.
        prompts: pairs of the task that heads are shown on.
        words: `name` and `description` of the task.
    """
    drawn = json_item(circuit_picture(circuit), "picture") if circuit.edges else None
    body = [
        _header(circuit, words),
        f'<section id="picture">{"" if drawn else EMPTY}</section>',
        _attention(circuit, model, tokenizer, prompts),
        _edge_table(circuit),
    ]
    title = f"{words['name']}: a circuit of {circuit.settings['run']}"
    write_whole(page, whole_page(title, "\n".join(body), drawn, components=("bokeh", "bokeh-widgets")))
    return page


def circuit_picture(circuit: Circuit):
    """The Bokeh layout: components from the embedding at the top to the logits at the bottom, and their edges."""
    places = _places(circuit)
    plot = figure(
        height=max(320, 46 * (len({y for _, y in places.values()}) + 2)), sizing_mode="stretch_width",
        x_range=Range1d(-1.2, 1.2), y_range=Range1d(max(y for _, y in places.values()) + 0.7, -0.7),
        tools="pan,reset,save", toolbar_location="above", name="circuit",
    )  # fmt: skip
    plot.toolbar.logo = None
    plot.grid.visible = plot.axis.visible = False
    plot.outline_line_color = None
    edges = ColumnDataSource(_edge_columns(circuit, places), name="edges")
    shown = IndexFilter(indices=list(range(len(circuit.edges))), name="edges_shown")
    lines = plot.segment(
        "x0", "y0", "x1", "y1", source=edges, view=CDSView(filter=shown), line_width="width", line_color="colour",
        line_alpha="alpha", hover_line_alpha=1, line_cap="round",
    )  # fmt: skip
    nodes = ColumnDataSource(
        {"x": [x for x, _ in places.values()], "y": [y for _, y in places.values()], "name": list(places)}, name="nodes"
    )
    drawn = plot.scatter("x", "y", source=nodes, size=13, fill_color="#ffffff", line_color="#1d2330", line_width=1.5,
                         nonselection_alpha=1)  # fmt: skip
    plot.text("x", "y", "name", source=nodes, x_offset=10, y_offset=-6, text_font_size="11px", text_color="#1d2330")
    plot.add_tools(
        HoverTool(renderers=[lines], tooltips="@source → @target<br>score @score<br>effect @effect"),
        TapTool(renderers=[drawn]),
    )
    nodes.selected.js_on_change("indices", CustomJS(args={"nodes": nodes, "edges": edges}, code=TAPPED))
    slider = Slider(start=0, end=100, value=0, step=1, title="hide weak edges, percent", width=260)
    slider.js_on_change("value", CustomJS(args={"edges": edges, "shown": shown}, code=HIDE_WEAK))
    return column(slider, plot, sizing_mode="stretch_width")


def _places(circuit: Circuit) -> dict[str, tuple[float, float]]:
    """Where each component is drawn: rows in forward order, heads side by side, MLPs to the right."""
    rows: list[list[tuple[str, float]]] = []
    names = circuit.node_names()
    for site, mask in circuit.nodes.items():
        here = names[: (n := int(mask.sum()))]
        names = names[n:]
        width = len(mask)
        spots = [(2 * (i + 0.5) / width - 1) * 0.9 for i in mask.nonzero().flatten().tolist()]
        if here:
            rows.append(list(zip(here, [1.0] if site.endswith(".mlp") else spots, strict=True)))
    return {name: (x, float(y)) for y, row in enumerate(rows) for name, x in row}


def _edge_columns(circuit: Circuit, places: Mapping[str, tuple[float, float]]) -> dict[str, list[Any]]:
    edges = circuit.edges
    size = [1.0 if e.score is None else abs(e.score) for e in edges]
    greatest = max([s for s in size if math.isfinite(s)], default=0) or 1.0
    ends = [(e.source, *_reader(e.target)) for e in edges]
    strength = [round(0.25 + 0.65 * min(1.0, s / greatest), 3) for s in size]
    return {
        "x0": [places[a][0] for a, _, _ in ends], "y0": [places[a][1] for a, _, _ in ends],
        "x1": [places[b][0] for _, b, _ in ends], "y1": [places[b][1] for _, b, _ in ends],
        "from": [a for a, _, _ in ends], "to": [b for _, b, _ in ends],
        "source": [e.source for e in edges], "target": [e.target for e in edges],
        "score": [_shown(e.score) for e in edges], "effect": [_shown(circuit.effects.get(e.name)) for e in edges],
        "size": size, "strength": strength, "alpha": strength,
        "width": [round(0.8 + 3.5 * min(1.0, s / greatest), 2) for s in size],
        "colour": [COLOURS[role] for _, _, role in ends],
    }  # fmt: skip


def _reader(target: str) -> tuple[str, str]:
    """The component that a target belongs to, and which of a head's inputs it is."""
    name, _, role = target.partition("<")
    return name, role.rstrip(">")


def _header(circuit: Circuit, words: Mapping[str, str]) -> str:
    facts = {"run": circuit.settings["run"], "method": circuit.method, "graph": circuit.graph,
             "ablation": circuit.ablation.kind}  # fmt: skip
    shown = "".join(f"<span><i>{key}</i> {html.escape(str(value))}</span>" for key, value in facts.items())
    rows = readings(circuit.measures)
    tiles = "".join(
        f'<div class="tile" title="{html.escape(r.meaning)}"><b>{html.escape(r.label)}</b>'
        f"<strong>{html.escape(r.value)}</strong><small>{html.escape(r.control)}</small></div>"
        for r in rows
    )
    warned = "".join(f"<li>{html.escape(text)}</li>" for text in cautions(circuit.measures))
    caution = f'<div class="cautions"><b>Read with care</b><ul>{warned}</ul></div>' if warned else ""
    legend = " ".join(
        f'<span class="key" style="border-color:{colour}"></span>{READS[role]}' for role, colour in COLOURS.items()
    )
    name = html.escape(words["name"])
    return (
        f'<header id="header"><h1><code>{name}</code> <small>{html.escape(words["description"])}</small></h1>'
        f'<p class="facts">{shown}</p><div class="tiles" id="measures">{tiles}</div>{caution}'
        f'<p class="legend">An edge is what one component reads of another through the residual stream, as {legend}; '
        "thicker, if its score is greater. Tap a component for its own edges.</p></header>"
    )


@torch.no_grad()
def _attention(circuit: Circuit, model: Transformer, tokenizer: Tokenizer, prompts: TaskData) -> str:
    """For each head of the circuit, what the last token of some prompts attends to."""
    heads = [(l, h) for l in range(len(model.blocks))
             for h in circuit.nodes[f"blocks.{l}.heads"].nonzero().flatten().tolist()]  # fmt: skip
    if not heads:
        return ""
    few = prompts.take(slice(0, PROMPTS))
    weights = last_attention(model, few)
    texts = [[snippets.text(int(t), tokenizer) for t in row[: int(n) + 1]]
             for row, n in zip(few.tokens, few.end, strict=True)]  # fmt: skip
    shown = []
    for l, h in heads:
        rows = "".join(_heat(text, weights[l][i, h].tolist()) for i, text in enumerate(texts))
        shown.append(f"<details><summary>a{l}.h{h}</summary>{rows}</details>")
    return "<section><h2>What the last token of a prompt attends to</h2>" + "".join(shown) + "</section>"


def last_attention(model: Transformer, data: TaskData) -> list[Tensor]:
    """For each block the attention (N, H, T) of each prompt's last token in the full model; a sink takes the rest."""
    sites = [f"blocks.{l}.{s}" for l in range(len(model.blocks)) for s in "qk"]
    _, seen = model.run(data.tokens, read=sites)
    rows = torch.arange(len(data))
    found = []
    for l, block in enumerate(model.blocks):
        q, k = (seen[f"blocks.{l}.{s}"].unflatten(-1, (-1, block.attn.d_head)) for s in "qk")  # (N, T, H, K)
        scores = torch.einsum("nhk,nthk->nht", q[rows, data.end], k) / math.sqrt(block.attn.d_head)
        if block.attn.causal:
            later = torch.arange(scores.shape[-1]) > data.end[:, None]
            scores = scores.masked_fill(later[:, None], -torch.inf)
        if block.attn.sink is not None:
            scores = torch.cat([scores, block.attn.sink[None, :, None].expand(len(data), -1, 1)], dim=-1)
        found.append(scores.softmax(-1)[..., : data.tokens.shape[1]])
    return found


def _heat(texts: Sequence[str], weights: Sequence[float]) -> str:
    spans = "".join(
        f'<span class="token" title="{weight:.1%}" style="background:rgba(70,140,214,{min(1, weight):.2f})">'
        f"{html.escape(text)}</span>"
        for text, weight in zip(texts, weights, strict=False)
    )
    return f'<pre class="heat">{spans}</pre>'


def _edge_table(circuit: Circuit) -> str:
    edges = circuit.edges
    ordered = sorted(edges, key=lambda e: -abs(e.score or 0))[:LISTED]
    rows = "".join(
        f"<tr><td><code>{html.escape(e.source)}</code></td><td><code>{html.escape(e.target)}</code></td>"
        f'<td style="color:{POSITIVE if (e.score or 0) >= 0 else NEGATIVE}">'
        f"{_shown(e.score)}</td><td>{_shown(circuit.effects.get(e.name))}</td></tr>"
        for e in ordered
    )
    more = f'<p class="note">The first {LISTED} of {len(edges)} by score.</p>' if len(edges) > LISTED else ""
    return (
        f'<details open><summary>All {len(edges)} edges, by score</summary>{more}<table id="edges"><thead><tr>'
        f"<th>from</th><th>to</th><th>score</th><th>rise of the loss without it</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></details>"
    )


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
