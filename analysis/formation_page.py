"""The picture of a circuit forming: its size and losses at each checkpoint of a run, in one file that opens offline."""

import json
from pathlib import Path
from typing import Any

from bokeh.embed import file_html
from bokeh.layouts import column
from bokeh.models import ColumnDataSource, HoverTool
from bokeh.plotting import figure
from bokeh.resources import Resources

from sparsetrain.files import write_whole

LOSSES = {
    "full_model_loss_calibrated": ("full model, calibrated alike", "#1d2330"),
    "task_loss": ("the circuit alone", "#2f6fb5"),
    "completeness_loss": ("the model without the circuit", "#c8472f"),
}
CHANCE = 0.6931


def write_formation_page(file: Path) -> Path:
    """Draw what `over_training` wrote, beside it, as formation.html."""
    rows = json.loads(file.read_text())
    title = f"{file.parent.parent.name}: {file.parent.name.removesuffix('-checkpoints')} over training"
    page = file.with_suffix(".html")
    plots = column(_losses(rows, title), _sizes(rows), sizing_mode="stretch_width")
    write_whole(page, file_html(plots, Resources(mode="inline"), title).encode())
    return page


def _losses(rows: list[dict[str, Any]], title: str):
    plot = figure(title=title, height=320, sizing_mode="stretch_width", y_axis_label="held-out task loss, nats",
                  tools="save,reset,pan", name="losses")  # fmt: skip
    plot.toolbar.logo = None
    for key, (name, colour) in LOSSES.items():
        _line(plot, rows, key, name, colour)
    ends = [rows[0]["step"], rows[-1]["step"]]
    plot.line(ends, [CHANCE, CHANCE], line_dash="dotted", line_color="#7d838c", legend_label="chance")
    plot.add_layout(plot.legend[0], "right")
    return plot


def _sizes(rows: list[dict[str, Any]]):
    plot = figure(height=280, sizing_mode="stretch_width", x_axis_label="step of training",
                  y_axis_label="in the circuit", tools="save,reset,pan", name="sizes")  # fmt: skip
    plot.toolbar.logo = None
    _line(plot, rows, "n_edges", "edges", "#2f6fb5")
    _line(plot, rows, "n_nodes", "nodes", "#3b8f4e")
    missed = [row["step"] for row in rows if not row["reached"]]
    plot.scatter(missed, [0] * len(missed), marker="x", size=9, color="#c8472f", legend_label="target not reached")
    plot.y_range.start = 0
    plot.add_layout(plot.legend[0], "right")
    return plot


def _line(plot: figure, rows: list[dict[str, Any]], key: str, name: str, colour: str) -> None:
    found = [row for row in rows if key in row]
    source = ColumnDataSource({"step": [row["step"] for row in found], "value": [row[key] for row in found]})
    plot.line("step", "value", source=source, line_color=colour, line_width=2, legend_label=name)
    dots = plot.scatter("step", "value", source=source, color=colour, size=6)
    plot.add_tools(HoverTool(renderers=[dots], tooltips=f"step @step<br>{name} @value{{0.000}}"))
