"""The sheet as a picture: a row of nodes for each layer, wires between them; where all lies, and a small image."""

from dataclasses import dataclass

import numpy as np

from sparsetrain.locality.edges import Edges, Piece
from sparsetrain.locality.measures import LONG
from sparsetrain.locality.positions import Layout, Plan

SHEAR, TILT = 0.35, 0.56  # of a square sheet, which is drawn as a plane seen from above and from the side
COLOURS = ("#2f6fb5", "#9aa0a8", "#c8472f")  # of wires up to 0.1 long, up to 0.25, and longer
READS = {"attn.qkv": 0, "attn.out": 1, "mlp.up": 1, "mlp.out": 2}  # rows of residual nodes from the block's first on
AT_DEPTHS = ("residual", "positions")  # classes that are drawn at each depth where they are read or written
PIXELS = 56  # of a row, in the image
INK = 0.9  # of a wire of mean strength, in the image


@dataclass(frozen=True)
class Row:
    """A line (or plane) of nodes in the picture.

    Attributes:
        name: the class of its nodes.
        title: what it is, in words.
        y: its height; greater is further down.
    """

    name: str
    title: str
    y: float


@dataclass(frozen=True)
class Wires:
    """Wires of a picture, weakest first.

    Attributes:
        top, bottom: the rows (E,) int64 that each joins, as indices into the rows.
        top_node, bottom_node: the node (E,) int64 at either end.
        strength: (E,), |w| as the edges hold it.
    """

    top: np.ndarray
    bottom: np.ndarray
    top_node: np.ndarray
    bottom_node: np.ndarray
    strength: np.ndarray


def sheet_rows(plan: Plan) -> dict[str, Row]:
    """The rows of a picture in forward order; residual nodes have one at each depth, by the key `residual@depth`."""
    rows: dict[str, Row] = {}
    y = 0.0

    def add(key: str, title: str, gap: float) -> None:
        nonlocal y
        if (name := key.partition("@")[0]) in plan.classes:
            y += gap if rows else 0.0
            rows[key] = Row(name, title, y)

    near = 0.35 if plan.sheet == 1 else 0.85
    add("tokens_in", "tokens", 1)
    add("contexts", "positions", near)
    n_layers = sum(name.endswith(".mlp") for name in plan.classes)
    for depth in range(2 * n_layers + 1):
        l, second = divmod(depth, 2)
        last = depth == 2 * n_layers
        add(f"residual@{depth}", "residual" if depth else "residual, embedded", 1)
        if last:
            break
        add(f"positions@{depth}", "positions", near)
        if second:
            add(f"blocks.{l}.mlp", f"block {l}: MLP", 1)
        else:
            add(f"blocks.{l}.qk", f"block {l}: QK", 1)
            add(f"blocks.{l}.v", f"block {l}: V", near)
    add("tokens_out", "next tokens", 1)
    return rows


def row_of(name: str, depth: int) -> str:
    """The key of a row of a class at a depth, which counts only where a class has a row at each."""
    return f"{name}@{depth}" if name in AT_DEPTHS else name


def strongest(edges: Edges, rows: dict[str, Row], n: int) -> Wires:
    """About n wires: of each matrix (each of q, k, v) the same share, at least one, those of greatest |w|."""
    share = min(1.0, n / sum(map(len, edges)))
    index = {key: i for i, key in enumerate(rows)}
    parts = [_wires(p, index, np.argsort(-p.weights, kind="stable")[: max(1, int(share * len(p)))]) for p in edges]
    columns = [np.concatenate(found) for found in zip(*parts, strict=True)]
    order = np.argsort(columns[-1], kind="stable")
    return Wires(*(column[order] for column in columns))


def _wires(piece: Piece, index: dict[str, int], at: np.ndarray) -> tuple[np.ndarray, ...]:
    depth = _depth(piece.matrix, index)
    ends = [
        (index[row_of(name, depth)], nodes[at])
        for name, nodes in ((piece.row_class, piece.rows), (piece.column_class, piece.columns))
    ]
    (top, top_node), (bottom, bottom_node) = sorted(ends, key=lambda end: end[0])
    full = np.full(len(at), 0)
    return full + top, full + bottom, top_node, bottom_node, piece.weights[at]


def _depth(matrix: str, index: dict[str, int]) -> int:
    """The depth of the residual nodes that a matrix reads or writes."""
    if not matrix.startswith("blocks."):
        return max(int(k.partition("@")[2]) for k in index if "@" in k) if matrix.startswith("unembed") else 0
    _, l, part, which, _ = matrix.split(".")
    return 2 * int(l) + READS[f"{part}.{which}"]


def places(rows: dict[str, Row], layout: Layout, of_rows: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Where nodes are drawn.

    Args:
        rows: see `sheet_rows`.
        layout: where the nodes lie on their sheets.
        of_rows: (N,) which row each is in.
        nodes: (N,) which node of the row's class each is.

    Returns:
        (N, 2) float64: x in (0, 1), or to 1 + SHEAR on a square sheet; y about that of the row.
    """
    on_sheet = _on_sheet(rows, layout, of_rows, nodes)
    y = np.array([row.y for row in rows.values()])[of_rows]
    if layout.plan.sheet == 1:
        return np.stack([on_sheet[:, 0], y], 1)
    x, back = on_sheet.T
    return np.stack([x + SHEAR * (1 - back), y + TILT * (back - 0.5)], 1)


def lengths(rows: dict[str, Row], layout: Layout, wires: Wires) -> np.ndarray:
    """How long wires are on the sheet: (E,), as in the measures, without what lies between the rows."""
    top = _on_sheet(rows, layout, wires.top, wires.top_node)
    return np.abs(top - _on_sheet(rows, layout, wires.bottom, wires.bottom_node)).sum(1)


def _on_sheet(rows: dict[str, Row], layout: Layout, of_rows: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    found = np.zeros((len(nodes), layout.plan.sheet))
    for i, row in enumerate(rows.values()):
        found[of_rows == i] = layout.coordinates(row.name)[nodes[of_rows == i]]
    return found


def colour_of(length: np.ndarray) -> np.ndarray:
    """Which of COLOURS a wire of each length has."""
    return np.digitize(length, LONG, right=True)


def image(edges: Edges, layout: Layout, n: int = 2000, width: int = 480) -> np.ndarray:
    """The strongest wires as a picture (H, W, 3) uint8, H about 56 pixels for each row of nodes."""
    rows = sheet_rows(layout.plan)
    wires = strongest(edges, rows, n)
    ends = [places(rows, layout, *end) for end in ((wires.top, wires.top_node), (wires.bottom, wires.bottom_node))]
    heights = [row.y for row in rows.values()]
    scale = np.array([(width - 1) / (1 + SHEAR * (layout.plan.sheet - 1)), PIXELS])
    pixels = [(end + np.array([0, 0.3])) * scale for end in ends]
    shape = (int((heights[-1] + 0.6) * PIXELS), width)
    hues = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS], float)
    of_wire = colour_of(lengths(rows, layout, wires))
    ink = np.stack([_ink(*(p[of_wire == i] for p in pixels), wires.strength[of_wire == i], shape) for i in range(3)])
    total = ink.sum(0)
    hue = np.einsum("chw,cr->hwr", ink, hues) / np.maximum(total, 1e-9)[..., None]
    opacity = (1 - np.exp(-total))[..., None]
    found = 255 * (1 - opacity) + hue * opacity
    for at in np.concatenate(pixels).astype(int):
        found[at[1], at[0]] = 30  # a node
    return found.astype(np.uint8)


def _ink(start: np.ndarray, end: np.ndarray, strength: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """How much ink lines (E, 2) to (E, 2) leave on each pixel: (H, W)."""
    n_steps = np.ceil(np.abs(end - start).max(1)).astype(int) + 1
    of_each = np.repeat(np.arange(len(start)), n_steps)
    step = np.arange(len(of_each)) - np.repeat(n_steps.cumsum() - n_steps, n_steps)
    along = ((step + 0.5) / n_steps[of_each])[:, None]
    x, y = (start[of_each] + along * (end - start)[of_each]).astype(int).T
    amount = INK * np.minimum(1, strength / 4)[of_each]
    return np.bincount(y * shape[1] + x, amount, shape[0] * shape[1]).reshape(shape)
