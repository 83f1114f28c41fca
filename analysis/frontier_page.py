"""The page of a frontier, one file that opens offline: the picture, a panel for each point, and the tables."""

import html
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from bokeh.embed import json_item
from bokeh.models import (
    ColumnDataSource,
    CustomJS,
    FixedTicker,
    HoverTool,
    NumeralTickFormatter,
    PanTool,
    Range1d,
    ResetTool,
    SaveTool,
    TapTool,
    WheelZoomTool,
)
from bokeh.plotting import figure

from sparsetrain.analysis import frontier_text as texts
from sparsetrain.analysis.frontier_data import Model, Setting, Study
from sparsetrain.analysis.frontier_lines import WAYS, Line
from sparsetrain.analysis.frontier_means import MEANS, default_mean
from sparsetrain.analysis.frontier_panels import varied
from sparsetrain.analysis.page_parts import whole_page
from sparsetrain.files import write_whole

PANEL = ("n_edges", "n_nodes", "task_loss", "completeness_loss", "kl")
EMPTY: dict[str, tuple[str, ...]] = {
    "lines": ("xs", "ys", "colour"), "intervals": ("x0", "y0", "x1", "y1", "colour"),
    "floors": ("x", "y", "top", "colour"), "rings": ("x", "y"), "chosen": ("x", "y"),
    "labels": ("x", "y", "text", "dx", "dy", "align"),
    "points": ("x", "y", "marker", "colour", "alpha", "name", "told"),
}  # fmt: skip

BODY = Template("""\
<header id="header">
<h1>$title <small>capability against interpretability</small></h1>
<p>$introduction</p>
<div class="cautions"><b>Read with care</b><ul>$cautions</ul></div>
</header>
<main>
<section id="picture" aria-label="The frontier">
<form id="controls"></form>
<p class="note" id="meaning"></p>
<div id="figure"></div>
<p class="legend" id="legend"></p>
</section>
<aside id="panel" aria-live="polite"></aside>
</main>
$tables
""")


def write_frontier_page(
    page: Path, title: str, study: Study, found: Sequence[Mapping[str, Any]], ways: Mapping[str, Sequence[Line]],
    factors: Sequence[Mapping[str, Any]],
) -> None:  # fmt: skip
    """Write the page, whole or not at all; the same arguments and versions give the same bytes.

    Args:
        page: the file; links to run directories are relative to its folder.
        title: the sweeps' names.
        study: what is compared.
        found: of each setting, see `frontier_means.summarise`.
        ways: lines, see `frontier_lines.all_lines`, with a `colour` each.
        factors: see `frontier_lines.equal_capability`.

    Raises:
        WriteError: it could not be written.
    """
    titles = {way: WAYS.get(way, f"along {way}, all else equal") for way in ways}
    data = {
        "means": MEANS, "meanings": texts.MEANINGS, "mean": default_mean(study), "panel": PANEL,
        "ways": {way: {"title": titles[way], "lines": of, "varied": varied(study, of)} for way, of in ways.items()},
        "tasks": study.tasks, "common": study.common, "graph": study.graph,
        "settings": [_setting(s, f, study, page.parent) for s, f in zip(study.settings, found, strict=True)],
    }  # fmt: skip
    body = BODY.substitute(
        title=html.escape(title),
        introduction=html.escape(texts.introduction(study)),
        cautions="".join(f"<li>{html.escape(told)}</li>" for told in texts.cautions(study, found, factors)),
        tables=_tables(study, found, factors),
    )
    scripts = ("page_elements", "frontier_panel", "frontier_page")
    write_whole(page, whole_page(title, body, json_item(_figure(study), "figure"), data, scripts))


def _setting(setting: Setting, found: Mapping[str, Any], study: Study, folder: Path) -> dict[str, Any]:
    """What the page knows of a setting; numbers are rounded, since they are drawn."""
    means = found["means"]
    shown = {k: found[k] for k in ("n_reached", "n_asked", "n_open")}
    return shown | {
        **{key: setting.row[key] for key in ("sweep", "arm", "values")}, "name": texts.title(setting, study),
        "dense": setting.dense, "n_params": setting.n_params, "n_nonzero": setting.n_nonzero,
        "loss": round(found["val_loss"], 5), "loss_interval": _rounded(found["loss_interval"]),
        "floors": {name: vars(floor) for name, floor in found["floors"].items()},
        "means": {
            name: {"mean": _rounded(v.mean), "interval": _rounded(v.interval), "at_least": v.at_least,
                   "pareto": v.pareto}
            for name, v in means.items()
        },
        "models": [_model(model, study, folder) for model in setting.models],
    }  # fmt: skip


def _rounded(value: Any) -> Any:
    """Floats with five digits, in lists too; None where they are no numbers."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def _model(model: Model, study: Study, folder: Path) -> dict[str, Any]:
    run = quote(Path(os.path.relpath(model.run, folder)).as_posix()) if model.run.is_dir() else None
    return {
        "seed": model.row["seed"], "point": model.row["point"], "run": run,
        "loss": round(model.row["val_loss"], 5), "seconds": model.row["train_seconds"],
        "outcomes": [_outcome(model, task, run) for task in study.tasks],
    }  # fmt: skip


def _outcome(model: Model, task: str, run: str | None) -> list[Any] | None:
    """A task's numbers and its circuit's page, or its folder where none is written; why not, if it is not reached."""
    row = model.outcomes.get(task)
    if row is None:
        return None
    if not row["reached"]:
        return [row.get("why") or "not reached"]
    folder = model.circuit(task) if run else None
    page = "circuit.html" if folder and os.path.exists(f"{folder}/circuit.html") else ""
    link = run + quote(f"{folder.removeprefix(str(model.run))}/{page}") if folder and run else None
    return [*(_rounded(row.get(key)) for key in PANEL), link]


def _figure(study: Study) -> figure:
    """The picture without its points, which the page's script puts into the sources by their names."""
    zoom = WheelZoomTool(modifiers={"ctrl": True})
    plot = figure(
        height=560, sizing_mode="stretch_width", name="frontier", x_range=Range1d(0, 1), y_range=Range1d(1, 10),
        y_axis_type="log", tools=[PanTool(), zoom, ResetTool(), SaveTool()], active_scroll=zoom,
        x_axis_label="held-out loss, nats per token (better to the left)",
        y_axis_label=f"edges at {texts.target(study)} (better below)",
    )  # fmt: skip
    plot.toolbar.logo = None
    plot.grid.grid_line_color = "#eceef2"
    plot.yaxis[0].ticker = FixedTicker(ticks=[m * 10**e for e in range(10) for m in (1, 2, 5)])
    plot.yaxis[0].formatter = NumeralTickFormatter(format="0,0")
    return _drawn(plot)


def _drawn(plot: figure) -> figure:
    sources = {n: ColumnDataSource({c: [] for c in columns}, name=n) for n, columns in EMPTY.items()}
    plot.multi_line("xs", "ys", source=sources["lines"], line_color="colour", line_width=1.6, line_alpha=0.8)
    plot.segment("x0", "y0", "x1", "y1", source=sources["intervals"], line_color="colour", line_alpha=0.45)
    plot.segment("x", "y", "x", "top", source=sources["floors"], line_color="colour", line_dash="dotted",
                 line_alpha=0.7)  # fmt: skip
    plot.scatter("x", "top", source=sources["floors"], marker="dash", size=11, line_color="colour", line_width=2)
    plot.scatter("x", "y", source=sources["rings"], size=19, fill_color=None, line_color="#d3a11f", line_width=2)
    points = plot.scatter("x", "y", source=sources["points"], marker="marker", size=10, fill_color="colour",
                          fill_alpha="alpha", line_color="colour", line_width=1.2,
                          nonselection_alpha=1, nonselection_fill_alpha="alpha")  # fmt: skip
    plot.scatter("x", "y", source=sources["chosen"], size=26, fill_color=None, line_color="#111827", line_width=1.5)
    plot.text("x", "y", "text", source=sources["labels"], x_offset="dx", y_offset="dy", text_align="align",
              text_baseline="middle", text_font_size="11px", text_color="#3f4654")  # fmt: skip
    sources["points"].selected.js_on_change("indices", CustomJS(code="frontierPage.tapped()"))
    for side in (plot.x_range, plot.y_range):
        side.js_on_change("start", CustomJS(code="frontierPage.moved()"))
    plot.add_tools(HoverTool(renderers=[points], tooltips="<b>@name</b><br>@told{safe}"), TapTool(renderers=[points]))
    return plot


def _tables(study: Study, found: Sequence[Mapping[str, Any]], factors: Sequence[Mapping[str, Any]]) -> str:
    parts = [
        ("Interpretability at equal capability", "factors", texts.factor_table(factors) if factors else ([], [])),
        ("Settings", "settings", texts.setting_table(study, found)),
        ("Tasks", "tasks", texts.task_table(study)),
        ("Left out, since a tokenizer cannot express them", "left_out", (("task", "why"),
         [[task, why] for task, why in study.left_out.items()])),
        ("Missing or failed", "missing", (("what",), [[told] for told in study.missing])),
    ]  # fmt: skip
    return "\n".join(_table(*part) for part in parts if part[2][1])


def _table(title: str, name: str, table: texts.Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>" for cells in table[1])
    return (
        f'<section><h2>{html.escape(title)}</h2><table id="{name}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></section>"
    )
