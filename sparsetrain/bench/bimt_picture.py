"""Networks on their sheets, side by side, as an SVG."""

from collections.abc import Mapping, Sequence

import numpy as np

WIDTH, HEIGHT, MARGIN = 300, 110, 24  # of a sheet, between two sheets, around
SLANT = 0.3  # of the second axis of a sheet
MOST_NUMBERED = 12  # inputs or outputs
FAINTEST = 0.05  # wires below this share of a matrix' greatest weight are left out
POSITIVE, NEGATIVE = "#2b62c4", "#c43b2b"

# A matrix (M, K) with the coordinates of its rows (M, sheet) and columns (K, sheet).
Placed = tuple[np.ndarray, np.ndarray, np.ndarray]


def draw(networks: Mapping[str, Sequence[Placed]]) -> str:
    """An SVG of networks by title: inputs at the bottom, wires as thick as |w|, blue above zero and red below.

    A few inputs and outputs have their numbers, counted from 1: a node that has moved still has its own.

    Source: Liu et al. 2023 (BIMT), their figures.
    """
    n_layers = max(len(layers) for layers in networks.values())
    across, up = WIDTH + 2 * MARGIN, n_layers * HEIGHT + 4 * MARGIN
    parts = [
        f'<g transform="translate({i * across + MARGIN} {up - MARGIN})"><text x="0" y="{3 * MARGIN - up}">{title}'
        f"</text>{_network(layers)}</g>"
        for i, (title, layers) in enumerate(networks.items())
    ]
    size = f'viewBox="0 0 {across * len(networks)} {up}" width="{across * len(networks)}" height="{up}"'
    style = 'font-family="sans-serif" font-size="14"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{background}{"".join(parts)}</svg>\n'


def _network(layers: Sequence[Placed]) -> str:
    wires, dots, inputs, outputs = [], [], layers[0][2], layers[-1][1]
    for level, (weight, rows, columns) in enumerate(layers):
        ends, starts = _on_paper(rows, level + 1), _on_paper(columns, level)
        share = weight / max(np.abs(weight).max(), 1e-30)
        for row, column in np.argwhere(np.abs(share) >= FAINTEST):
            wires.append(_line(starts[column], ends[row], share[row, column]))
        dots += [*starts, *(ends if level == len(layers) - 1 else [])]
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in dots]
    numbers = _numbers(_on_paper(inputs, 0), 16) + _numbers(_on_paper(outputs, len(layers)), -6)
    return "".join([*wires, *dots, *numbers])


def _numbers(nodes: np.ndarray, below: int) -> list[str]:
    return [
        f'<text x="{x:.1f}" y="{y + below:.1f}" text-anchor="middle" font-size="11">{i}</text>'
        for i, (x, y) in enumerate(nodes if len(nodes) <= MOST_NUMBERED else [], start=1)
    ]


def _on_paper(places: np.ndarray, level: int) -> np.ndarray:
    """Where the nodes (N, sheet) of a layer are drawn: (N, 2)."""
    deep = places[:, 1] if places.shape[1] > 1 else np.zeros(len(places))
    x = (places[:, 0] + SLANT * deep) / (1 + SLANT * (places.shape[1] > 1))
    return np.stack([WIDTH * x, -HEIGHT * (level + SLANT * deep)], 1)


def _line(start: np.ndarray, end: np.ndarray, share: float) -> str:
    (x1, y1), (x2, y2) = start, end
    ink = f'stroke="{POSITIVE if share > 0 else NEGATIVE}" stroke-width="{2 * abs(share):.2f}"'
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {ink}/>'
