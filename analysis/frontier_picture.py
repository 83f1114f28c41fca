"""The frontier as a picture for papers: PNG and SVG, drawn by a process of its own while the page is made."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sparsetrain.files import WriteError, write_whole

SIZE, DPI = (7.2, 4.6), 200  # inches of a panel; dots per inch of the PNG
MOST_LABELLED, MOST_KEYS = 60, 10  # points with labels; lines with a key
NOT_WRITTEN = 3  # status of the process where a file could not be written
EDGE = 0.985  # where settings without a mean stand, of the height
RING, QUIET = "#d3a11f", "#3f4654"
SIDES = ((6, "left"), (-6, "right"))
PLACES = [(dx, dy, {"ha": across, "va": "center"}) for dy in (6, -6, 0) for dx, across in SIDES]
BELOW = [(dx, -6, {"ha": to, "va": "top", "rotation": 90}) for dx, to in ((0, "center"), (-5, "right"), (5, "left"))]
Points = Sequence[Mapping[str, Any]]


@contextmanager
def pictures(folders: Sequence[Path], shown: Mapping[str, Any]) -> Iterator[None]:
    """Draw frontier.png and frontier.svg meanwhile: where the block ends without an error, they are there.

    Args:
        folders: where they go.
        shown: see `frontier_panels.panels`.

    Raises:
        WriteError: one could not be written, or the process that draws them could not be started or was killed.
        RuntimeError: that process failed otherwise, with what it said.
    """
    # It finds modules where this process does, not in the working folder, where another clone or a random.py may lie.
    command = [sys.executable, "-P", "-m", "sparsetrain.analysis.frontier_picture", *map(str, folders)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    try:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )  # fmt: skip
    except OSError as error:
        raise WriteError(f"could not start a process that draws pictures: {error}") from None
    with process:
        assert process.stdin and process.stderr
        with suppress(BrokenPipeError):  # it died, and says why at the end
            process.stdin.write(json.dumps(shown))
            process.stdin.close()
        yield
        told = process.stderr.read()
    if process.returncode == NOT_WRITTEN:
        raise WriteError(told.strip())
    if process.returncode < 0:
        raise WriteError(f"the process that draws pictures was killed by signal {-process.returncode}")
    if process.returncode:
        raise RuntimeError(f"the process that draws pictures ended with {process.returncode}:\n{told}")
    sys.stderr.write(told)  # warnings, of letters that the font lacks, say


def main() -> int:
    """Write the pictures of the values on stdin to the folders that are named."""
    shown = json.load(sys.stdin)
    try:
        write_pictures([Path(folder) for folder in sys.argv[1:]], shown)
    except WriteError as error:
        print(error, file=sys.stderr)
        return NOT_WRITTEN
    return 0


def write_pictures(folders: Sequence[Path], shown: Mapping[str, Any]) -> None:
    """Write frontier.png and frontier.svg; the same values give the same bytes.

    Args:
        folders: where they go.
        shown: see `frontier_panels.panels`.

    Raises:
        WriteError: one could not be written.
    """
    import matplotlib  # takes a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    plain = {"svg.hashsalt": "frontier", "svg.fonttype": "none", "font.size": 9, "text.parse_math": False}
    with matplotlib.rc_context(plain):
        picture = _picture(shown)
        png, svg = io.BytesIO(), io.BytesIO()  # by the canvases: `savefig` draws each twice
        FigureCanvasAgg(picture).print_png(png, metadata={"Software": None})
        FigureCanvasSVG(picture).print_svg(svg, metadata={"Date": None, "Creator": None})
    for folder in folders:
        write_whole(folder / "frontier.png", png.getvalue())
        write_whole(folder / "frontier.svg", svg.getvalue())


def _picture(shown: Mapping[str, Any]):
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    points, panels = shown["points"], shown["panels"]
    picture = Figure(figsize=(SIZE[0] * len(panels), SIZE[1]), dpi=DPI, layout="constrained")
    places = picture.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    places[0].set_ylabel(shown["y_label"])
    for axes, panel in zip(places, panels, strict=True):
        axes.set_title(panel["title"], loc="left", fontsize="medium", color=QUIET)
        _panel(axes, points, panel["lines"])
    picture.get_layout_engine().execute(picture)
    picture.set_layout_engine("none")  # its places are found; else they would be again for each file
    if len(points) <= MOST_LABELLED:
        for axes, panel in zip(places, panels, strict=True):
            _label(axes, points, panel["labels"])
    return picture


def _panel(axes, points: Points, lines: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    few = len(points) <= MOST_LABELLED
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("held-out loss, nats per token")
    able = [[points[i] for i in line["settings"] if points[i]["edges"] is not None] for line in lines]
    for line, of in zip(lines, able, strict=True):
        if of:
            _line(axes, line, of, few)
    if front := [point for point in points if point["front"]]:
        axes.scatter([p["loss"] for p in front], [p["edges"] for p in front], s=130, facecolors="none",
                     edgecolors=RING, linewidths=1.4, label="on the front")  # fmt: skip
    colours = {i: line["colour"] for line in lines for i in line["settings"]}
    if few:
        _floors(axes, points, colours)
    _edge(axes, points, colours)
    axes.margins(x=0.1)
    axes.set_ylim(max(axes.get_ylim()[0], 0.7), max(axes.get_ylim()[1], 3))  # no circuit counts as less than one edge
    axes.grid(color="#eceef2")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if few:
        axes.plot([], [], " ", label="n/n: tasks reached, all seeds")
    _legend(axes, sum(map(bool, able)))


def _line(axes, line: Mapping[str, Any], points: Points, few: bool) -> None:
    for point in points if few else ():
        x, y = point["loss"], point["edges"]
        if point["interval"]:
            axes.plot([x, x], point["interval"], color=line["colour"], alpha=0.4, linewidth=1)
        if point["loss_interval"]:
            axes.plot(point["loss_interval"], [y, y], color=line["colour"], alpha=0.4, linewidth=1)
    shape = {"marker": "D" if line["dense"] else "o", "markersize": 5 if few else 3}
    axes.plot([p["loss"] for p in points], [p["edges"] for p in points], color=line["colour"], linewidth=1.3,
              label=line["name"], **shape)  # fmt: skip


def _floors(axes, points: Points, colours: Mapping[int, str]) -> None:
    """Dashes where nonsense circuits of the same tasks and seeds would stand."""
    there = [(point["loss"], point["nonsense"], colours[i]) for i, point in enumerate(points) if point["nonsense"]]
    if there:
        x, y, colour = zip(*there, strict=True)
        axes.scatter(x, y, marker="_", s=70, color=colour, linewidths=1.5, label="nonsense circuits")


def _edge(axes, points: Points, colours: Mapping[int, str]) -> None:
    """Settings without a mean, at the upper edge: they are there, and reach too little, or are not finished."""
    names = {True: "miss a task", False: "not finished"}
    for i, point in enumerate(points):
        if point["edges"] is None:
            inside, name = colours[i] if point["missed"] else "white", names.pop(point["missed"], None)
            axes.plot(point["loss"], EDGE, "v", color=colours[i], markerfacecolor=inside, markersize=5, clip_on=False,
                      label=name, transform=axes.get_xaxis_transform())  # fmt: skip


def _legend(axes, n_lines: int) -> None:
    """Keys of the lines that are drawn, or of the first, some between and the last, and of what is no line."""
    handles, names = axes.get_legend_handles_labels()
    kept = {round(i * (n_lines - 1) / (MOST_KEYS - 1)) for i in range(MOST_KEYS)}
    shown = [i for i in range(len(names)) if i in kept or i >= n_lines or n_lines <= MOST_KEYS]
    handles, names = [handles[i] for i in shown], [names[i] for i in shown]
    axes.legend(handles, names, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)


def _label(axes, points: Points, labels: Sequence[str]) -> None:
    """Beside each point what it is, where there is room. Limits must stand."""
    across = axes.get_xaxis_transform()
    at = [(p["loss"], EDGE, across, BELOW) if p["edges"] is None else (p["loss"], p["edges"], axes.transData, PLACES)
          for p in points]  # fmt: skip
    dots = [transform.transform((x, y)) for x, y, transform, _ in at]
    dots += [axes.transData.transform((point["loss"], point["nonsense"])) for point in points if point["nonsense"]]
    unit = axes.figure.dpi / 72
    taken = [(x - 4 * unit, y - 4 * unit, x + 4 * unit, y + 4 * unit) for x, y in dots]
    for text, (x, y, transform, places) in zip(labels, at, strict=True):
        for *moved, how in places:
            label = axes.annotate(text, (x, y), moved, xycoords=transform, textcoords="offset points",
                                  fontsize=7, color=QUIET, **how)  # fmt: skip
            box = label.get_window_extent().extents
            inside = axes.bbox.x0 <= box[0] and box[2] <= axes.bbox.x1 and axes.bbox.y0 <= box[1]
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(tuple(box))
                break
            label.remove()


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


if __name__ == "__main__":
    sys.exit(main())
