"""A line chart as inline SVG, for pages that draw many small ones."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

LEFT, RIGHT, TOP, BOTTOM = 44, 8, 20, 30  # margins, in pixels


@dataclass(frozen=True)
class Line:
    """Values over ascending x, with a band from `low` to `high` around them; all of one length."""

    name: str
    colour: str
    x: Sequence[float]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def chart(title: str, lines: Sequence[Line], width: int, height: int, x_label: str = "",
          top: float | None = None) -> str:  # fmt: skip
    """Draw lines that begin and end at the same x.

    Args:
        title: above the chart.
        lines: what is drawn, the first above the others.
        width, height: in pixels.
        x_label: below the chart.
        top: the greatest y, so that charts can be compared; None: that of the lines.
    """
    least = min(0.0, *(v for line in lines for v in (*line.values, *line.low)))
    most = max(top or 0.0, least + 1e-9, *(v for line in lines for v in (line.values if top else line.high)))
    first, last = lines[0].x[0], lines[0].x[-1]

    def across(v: float) -> float:
        return LEFT + (v - first) / (last - first) * (width - LEFT - RIGHT)

    def down(v: float) -> float:
        return TOP + (most - v) / (most - least) * (height - TOP - BOTTOM)

    def points(x: Sequence[float], values: Sequence[float]) -> list[str]:
        return [f"{across(a):.1f},{down(min(max(b, least), most)):.1f}" for a, b in zip(x, values, strict=True)]

    parts = [f'<text x="{LEFT}" y="13" class="title">{html.escape(title)}</text>']
    for value in (least, most) if least == 0 else (least, 0, most):
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{down(value):.1f}" y2="{down(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{down(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for value, anchor in ((first, "start"), (last, "end")):
        parts.append(f'<text x="{across(value):.1f}" y="{height - 14}" text-anchor="{anchor}">{value:g}</text>')
    if x_label:
        middle = (LEFT + width - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{height - 6}" text-anchor="middle">{html.escape(x_label)}</text>')
    for line in reversed(lines):
        band = " ".join([*points(line.x, line.low), *reversed(points(line.x, line.high))])
        parts.append(f'<polygon points="{band}" fill="{line.colour}" opacity="0.18"/>')
        parts.append(
            f'<polyline points="{" ".join(points(line.x, line.values))}" stroke="{line.colour}">'
            f"<title>{html.escape(line.name)}: {line.values[0]:.4g} to {line.values[-1]:.4g}</title></polyline>"
        )
    return (
        f'<svg class="chart" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    )
