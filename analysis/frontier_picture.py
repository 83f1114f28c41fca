"""The frontier as a picture for papers: PNG and SVG."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsetrain.analysis.frontier_data import Study
from sparsetrain.analysis.frontier_lines import WAYS, Line
from sparsetrain.analysis.frontier_means import MEANS, Value, default_mean
from sparsetrain.analysis.frontier_text import target
from sparsetrain.files import write_whole

SIZE, DPI = (7.2, 4.6), 200  # inches of a panel; dots per inch of the PNG
MOST_LABELLED, MOST_KEYS = 60, 10  # points with counts; lines with a key
RING, QUIET = "#d3a11f", "#3f4654"
PLACES = [(dx, dy, across, "center") for dy in (6, -6, 0) for dx, across in ((6, "left"), (-6, "right"))]


def write_pictures(
    folder: Path, study: Study, found: Sequence[Mapping[str, Any]], ways: Mapping[str, Sequence[Line]]
) -> None:
    """Write frontier.png and frontier.svg, by the mean that is shown first; the same arguments give the same bytes.

    A panel has the lines of equal size, a second one those of equal L0, where some join two points.

    Args:
        folder: where they go.
        study: what is compared.
        found: of each setting, see `frontier_means.summarise`.
        ways: lines, see `frontier_lines.all_lines`, with a `colour` each.

    Raises:
        WriteError: one could not be written.
    """
    import matplotlib  # takes a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with matplotlib.rc_context({"svg.hashsalt": "frontier", "svg.fonttype": "none", "font.size": 9}):
        picture = _picture(study, found, ways)
        png, svg = io.BytesIO(), io.BytesIO()  # by the canvases: `savefig` draws each twice
        FigureCanvasAgg(picture).print_png(png, metadata={"Software": None})
        FigureCanvasSVG(picture).print_svg(svg, metadata={"Date": None, "Creator": None})
    write_whole(folder / "frontier.png", png.getvalue())
    write_whole(folder / "frontier.svg", svg.getvalue())


def _picture(study: Study, found: Sequence[Mapping[str, Any]], ways: Mapping[str, Sequence[Line]]):
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    drawn = [way for way in WAYS if way == "size" or _joins(ways[way], found, default_mean(study))]
    picture = Figure(figsize=(SIZE[0] * len(drawn), SIZE[1]), dpi=DPI, layout="constrained")
    panels = picture.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    panels[0].set_ylabel(f"edges at {target(study)}\n({_tasks(study, default_mean(study))})")
    for axes, way in zip(panels, drawn, strict=True):
        axes.set_title(WAYS[way], loc="left", fontsize="medium", color=QUIET)
        _panel(axes, study, found, ways[way])
    picture.get_layout_engine().execute(picture)
    picture.set_layout_engine("none")  # its places are found; else they would be again for each file
    if len(found) <= MOST_LABELLED:
        values, varied = [of["means"][default_mean(study)] for of in found], _varied(study, ways["size"])
        for axes in panels:
            _label(axes, found, values, varied)
    return picture


def _joins(lines: Sequence[Line], found: Sequence[Mapping[str, Any]], mean: str) -> bool:
    """Whether some line of sparse settings has two that are drawn."""
    return any(
        sum(found[i]["means"][mean].mean is not None for i in line["settings"]) > 1
        for line in lines if not line["dense"]
    )  # fmt: skip


def _panel(axes, study: Study, found: Sequence[Mapping[str, Any]], lines: Sequence[Line]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    mean = default_mean(study)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("held-out loss, nats per token")
    values = [summary["means"][mean] for summary in found]
    for line in lines:
        _line(axes, line, found, values)
    rings = [i for i, value in enumerate(values) if value.pareto]
    axes.scatter([found[i]["val_loss"] for i in rings], [values[i].mean for i in rings], s=130, facecolors="none",
                 edgecolors=RING, linewidths=1.4, label="on the front")  # fmt: skip
    _floors(axes, found, values, mean, {i: line["colour"] for line in lines for i in line["settings"]})
    _edge(axes, found, values)
    axes.margins(x=0.1)
    axes.set_ylim(max(axes.get_ylim()[0], 0.7), max(axes.get_ylim()[1], 3))  # no circuit counts as less than one edge
    axes.grid(color="#eceef2")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(found) <= MOST_LABELLED:
        axes.plot([], [], " ", label="n/n: tasks reached, all seeds")
    _legend(axes, len(lines))


def _tasks(study: Study, mean: str) -> str:
    if mean == "common":
        return f"geometric mean over the same {len(study.common)} of {len(study.tasks)} tasks"
    return f"geometric mean over {MEANS[mean]}"


def _line(axes, line: Line, found: Sequence[Mapping[str, Any]], values: Sequence[Value]) -> None:
    able = [i for i in line["settings"] if values[i].mean is not None]
    if not able:
        return
    x, y = [found[i]["val_loss"] for i in able], [values[i].mean for i in able]
    few = len(found) <= MOST_LABELLED
    for i, a, b in zip(able, x, y, strict=True):
        colour, value = line["colour"], values[i]
        if few and value.interval:
            axes.plot([a, a], value.interval, color=colour, alpha=0.4, linewidth=1)
        if few and found[i]["loss_interval"]:
            axes.plot(found[i]["loss_interval"], [b, b], color=colour, alpha=0.4, linewidth=1)
    shape = {"marker": "D" if line["dense"] else "o", "markersize": 5 if few else 3}
    axes.plot(x, y, color=line["colour"], linewidth=1.3, label=line["name"], **shape)


def _floors(
    axes, found: Sequence[Mapping[str, Any]], values: Sequence[Value], mean: str, colours: Mapping[int, str]
) -> None:
    """Dashes where nonsense circuits of the same tasks and seeds would stand."""
    times = [f["floors"][mean].times if mean in f["floors"] else None for f in found]
    there = [i for i, value in enumerate(values) if value.mean is not None and times[i] is not None]
    if there and len(found) <= MOST_LABELLED:
        axes.scatter([found[i]["val_loss"] for i in there], [values[i].mean * times[i] for i in there], marker="_",
                     s=70, color=[colours[i] for i in there], linewidths=1.5, label="nonsense circuits")  # fmt: skip


def _edge(axes, found: Sequence[Mapping[str, Any]], values: Sequence[Value]) -> None:
    """Settings without a mean, at the upper edge: they are there, and reach too little."""
    none = [summary["val_loss"] for summary, value in zip(found, values, strict=True) if value.mean is None]
    if none:
        axes.plot(none, [0.985] * len(none), "v", color="#9aa0ab", markersize=5, clip_on=False,
                  transform=axes.get_xaxis_transform(), label="miss a task")  # fmt: skip


def _legend(axes, n_lines: int) -> None:
    handles, names = axes.get_legend_handles_labels()
    if n_lines > MOST_KEYS:  # the first, some between, the last, and what is no line
        step = -(-n_lines // MOST_KEYS)
        kept = [i for i in range(len(names)) if i >= n_lines or i % step == 0]
        handles, names = [handles[i] for i in kept], [names[i] for i in kept]
    axes.legend(handles, names, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)


def _varied(study: Study, lines: Sequence[Line]) -> dict[int, str]:
    """Of each setting what tells it from the others of its line."""
    told = {}
    for line in lines:
        values = {i: study.settings[i].row["values"] for i in line["settings"]}
        keys = [key for key in values[line["settings"][0]] if len({str(of.get(key)) for of in values.values()}) > 1]
        told |= {i: " ".join(f"{key.rpartition('.')[2]}={of.get(key)}" for key in keys) for i, of in values.items()}
    return told


def _label(axes, found: Sequence[Mapping[str, Any]], values: Sequence[Value], varied: Mapping[int, str]) -> None:
    """Beside each point what it is, and how many outcomes of how many reached the target, where there is room.

    Limits must stand.
    """
    there = [i for i, value in enumerate(values) if value.mean is not None]
    dots = axes.transData.transform([[found[i]["val_loss"], values[i].mean] for i in there] or [[0, 1]])
    unit = axes.figure.dpi / 72
    taken = [(x - 4 * unit, y - 4 * unit, x + 4 * unit, y + 4 * unit) for x, y in dots]
    for i in there:
        arrow = "↑ " if values[i].at_least else ""
        text = ", ".join(filter(None, (varied[i], f"{arrow}{found[i]['n_reached']}/{found[i]['n_asked']}")))
        for dx, dy, across, up in PLACES:
            label = axes.annotate(text, (found[i]["val_loss"], values[i].mean), (dx, dy), fontsize=7, color=QUIET,
                                  textcoords="offset points", ha=across, va=up)  # fmt: skip
            box = label.get_window_extent().extents
            inside = axes.bbox.x0 <= box[0] and box[2] <= axes.bbox.x1 and axes.bbox.y0 <= box[1]
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(tuple(box))
                break
            label.remove()


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
