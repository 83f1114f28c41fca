"""Where each node of a circuit is drawn: a row for each site in forward order, and columns that keep edges short.

Residual channels have a column of their own, the same in every row, so that a channel's way down the residual
stream is a vertical line. They stand on whole numbers; heads and neurons stand halfway between, as near as they can
to what they are connected with.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sparsetrain.pruning.graph import READS, WRITES

SWEEPS = 12
NARROWEST = 12  # columns; a circuit of three nodes is not spread over the whole page
BAND_GAP = 0.6  # rows
TITLES = {
    "embed": "tokens", "positions": "positions", "attn_in": "reads", "q": "q", "k": "k", "v": "v",
    "attn_out": "writes", "mlp_in": "reads", "mlp_act": "neurons", "mlp_out": "writes",
}  # fmt: skip

Placing = dict[str, float]


@dataclass(frozen=True)
class Row:
    """A site that has nodes."""

    site: str
    title: str
    y: float


@dataclass(frozen=True)
class Band:
    """The rows of one part of the model."""

    title: str
    top: float
    bottom: float


@dataclass(frozen=True)
class Head:
    """A box around the q, k and v nodes of an attention head."""

    layer: int
    head: int
    left: float
    right: float
    top: float
    bottom: float


@dataclass(frozen=True)
class Layout:
    """Positions in rows and columns; y grows downwards, in forward order."""

    n_columns: int
    positions: dict[str, tuple[float, float]]
    rows: list[Row]
    bands: list[Band]
    heads: list[Head]


@dataclass(frozen=True)
class _Block:
    """Points of a row or, for a head, of three rows, that stay together; one tuple for each row."""

    rows: tuple[tuple[str, ...], ...]

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(name for row in self.rows for name in row)


def lay_out(names: Sequence[str], edges: Iterable[tuple[str, str, float]], sites: Sequence[str], d_head: int) -> Layout:
    """Place the points of a circuit.

    Args:
        names: points as "site:channel"; nodes, and what stands for the two ends of the model.
        edges: (source, target, weight).
        sites: every site in forward order; rows of sites without points are left out.
        d_head: channels of an attention head.

    Returns:
        The layout: the same for the same arguments, with points of a row at least one column apart.
    """
    by_site = {site: sorted((n for n in names if site_of(n) == site), key=channel_of) for site in sites}
    neighbours = _neighbours(edges)
    groups = _block_groups(by_site, d_head)
    columns = sorted({channel_of(n) for n in names if is_residual(site_of(n))})
    members = {c: [n for n in names if is_residual(site_of(n)) and channel_of(n) == c] for c in columns}
    n_columns = max(NARROWEST, len(columns), *(sum(map(_n_slots, blocks)) for blocks in groups), 0)
    x = _shortest(columns, members, groups, neighbours, n_columns)
    rows = _rows([site for site in sites if by_site[site]])
    y = {row.site: row.y for row in rows}
    positions = {name: (x[name], y[site_of(name)]) for name in names}
    return Layout(n_columns, positions, rows, _bands(rows), _heads(positions, d_head))


def site_of(name: str) -> str:
    """The site of a point's name."""
    return name.rpartition(":")[0]


def channel_of(name: str) -> int:
    """The channel of a point's name."""
    return int(name.rpartition(":")[2])


def kind_of(site: str) -> str:
    """A site's name without its block."""
    return site.rpartition(".")[2]


def is_residual(site: str) -> bool:
    """Whether a site's channels are those of the residual stream, or positions beside it."""
    return kind_of(site) in (*READS, *WRITES, "embed", "positions", "final_resid")


def edge_length(edges: Iterable[tuple[str, str, float]], x: Mapping[str, float]) -> float:
    """Sum of weight x horizontal distance: what the layout makes small."""
    return sum(abs(weight) * abs(x[source] - x[target]) for source, target, weight in edges)


def _neighbours(edges: Iterable[tuple[str, str, float]]) -> dict[str, list[tuple[str, float]]]:
    found = defaultdict(list)
    for source, target, weight in edges:
        found[source].append((target, abs(weight)))
        found[target].append((source, abs(weight)))
    return found


def _block_groups(by_site: Mapping[str, list[str]], d_head: int) -> list[list[_Block]]:
    """The blocks that share one row: heads of an attention layer, single neurons, answers."""
    groups = []
    for site, here in by_site.items():
        if kind_of(site) == "q":
            three = [by_site[site], by_site[site[:-1] + "k"], by_site[site[:-1] + "v"]]
            heads = sorted({channel_of(n) // d_head for row in three for n in row})
            groups.append([_Block(tuple(_of_head(row, h, d_head) for row in three)) for h in heads])
        elif kind_of(site) not in ("k", "v") and not is_residual(site):
            groups.append([_Block(((name,),)) for name in here])
    return [group for group in groups if group]


def _of_head(names: Iterable[str], head: int, d_head: int) -> tuple[str, ...]:
    return tuple(n for n in names if channel_of(n) // d_head == head)


def _n_slots(block: _Block) -> int:
    if len(block.rows) == 1:
        return 1
    q, k, v = block.rows
    return max(len({channel_of(n) for n in (*q, *k)}), len(v))


def _shortest(
    columns: list[int], members: Mapping[int, list[str]], groups: list[list[_Block]],
    neighbours: Mapping[str, list[tuple[str, float]]], n_columns: int,
) -> Placing:  # fmt: skip
    """Place rows and columns in turn by the mean of their neighbours; keep the sweep with the shortest edges."""
    edges = [(a, b, w / 2) for a, near in neighbours.items() for b, w in near]
    x: Placing = {}
    order, best, length = list(columns), {}, float("inf")
    for _ in range(SWEEPS):
        x = x | _spread(order, members, n_columns)
        for blocks in groups:
            x |= _place_blocks(blocks, x, neighbours, n_columns)
        now = edge_length(edges, x)
        if now < length:
            best, length = x, now
        centre = {c: _barycentre(members[c], x, neighbours, x[members[c][0]]) for c in columns}
        order = sorted(columns, key=lambda c: (centre[c], c))
    return best


def _spread(order: Sequence[int], members: Mapping[int, list[str]], n_columns: int) -> Placing:
    """Residual channels in this order, evenly over the whole numbers from 0 to n_columns."""
    step = max(1.0, n_columns / (len(order) + 1))
    first = (n_columns - step * (len(order) - 1)) / 2
    return {name: float(int(first + i * step + 0.5)) for i, c in enumerate(order) for name in members[c]}


def _barycentre(
    names: Iterable[str], x: Placing, neighbours: Mapping[str, list[tuple[str, float]]], default: float
) -> float:
    pulls = [(x[other], weight) for name in names for other, weight in neighbours.get(name, ()) if other in x]
    total = sum(weight for _, weight in pulls)
    return sum(place * weight for place, weight in pulls) / total if total else default


def _place_blocks(
    blocks: list[_Block], x: Placing, neighbours: Mapping[str, list[tuple[str, float]]], n_columns: int
) -> Placing:
    """Blocks side by side, each as near to its neighbours as the others let it."""
    middle = n_columns / 2
    centres = {b: _barycentre(b.members, x, neighbours, middle) for b in blocks}
    ordered = sorted(blocks, key=lambda b: (centres[b], channel_of(b.members[0])))
    lefts = _apart([centres[b] - _n_slots(b) / 2 for b in ordered], [_n_slots(b) for b in ordered], n_columns)
    placed: Placing = {}
    for block, left in zip(ordered, lefts, strict=True):
        placed |= _inside(block, left, x, neighbours, middle)
    return placed


def _inside(
    block: _Block, left: int, x: Placing, neighbours: Mapping[str, list[tuple[str, float]]], default: float
) -> Placing:
    """Slots of a head: a query and its key above each other, values in an order of their own."""
    if len(block.rows) == 1:
        return {block.members[0]: left + 0.5}
    pairs, values = defaultdict(list), [[v] for v in block.rows[2]]
    for name in (*block.rows[0], *block.rows[1]):
        pairs[channel_of(name)].append(name)
    placed: Placing = {}
    for stacks in (list(pairs.values()), values):
        stacks.sort(key=lambda s: (_barycentre(s, x, neighbours, default), channel_of(s[0])))
        first = left + (_n_slots(block) - len(stacks)) // 2
        placed |= {name: first + i + 0.5 for i, stack in enumerate(stacks) for name in stack}
    return placed


def _apart(wanted: Sequence[float], widths: Sequence[int], n_columns: int) -> list[int]:
    """Left edges, nearest to the wanted ones by least squares, that keep the order and do not overlap.

    Without the widths before it, each edge only has to be no less than the one before: isotonic regression, solved
    by pooling neighbours that are out of order.
    """
    before = [sum(widths[:i]) for i in range(len(widths))]
    pools: list[tuple[float, int]] = []  # (mean, size)
    for want, offset in zip(wanted, before, strict=True):
        mean, size = want - offset, 1
        while pools and pools[-1][0] > mean:
            other, n = pools.pop()
            mean, size = (mean * size + other * n) / (size + n), size + n
        pools.append((mean, size))
    free = n_columns - sum(widths)
    fitted = [min(max(mean, 0.0), free) for mean, size in pools for _ in range(size)]
    return [int(place) + offset for place, offset in zip(fitted, before, strict=True)]


def _rows(sites: Iterable[str]) -> list[Row]:
    rows: list[Row] = []
    y, band = 0.0, None
    for site in sites:
        if rows:
            y = round(y + (1 if _band_title(site) == band else 1 + BAND_GAP), 2)
        band = _band_title(site)
        rows.append(Row(site, TITLES.get(kind_of(site), ""), y))
    return rows


def _bands(rows: Iterable[Row]) -> list[Band]:
    bands: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        bands[_band_title(row.site)].append(row.y)
    margin = (1 + BAND_GAP) / 2
    return [Band(title, min(ys) - margin, max(ys) + margin) for title, ys in bands.items()]


def _band_title(site: str) -> str:
    if not site.startswith("blocks."):
        return {"final_resid": "final residual"}.get(site, "embedding" if is_residual(site) else site)
    part = "MLP" if kind_of(site).startswith("mlp") else "attention"
    return f"L{site.split('.')[1]} {part}"


def _heads(positions: Mapping[str, tuple[float, float]], d_head: int) -> list[Head]:
    found = defaultdict(list)
    for name, place in positions.items():
        if kind_of(site_of(name)) in ("q", "k", "v"):
            found[int(name.split(".")[1]), channel_of(name) // d_head].append(place)
    return [
        Head(
            l, h, min(x for x, _ in at) - 0.5, max(x for x, _ in at) + 0.5, min(y for _, y in at), max(y for _, y in at)
        )
        for (l, h), at in sorted(found.items())
    ]
