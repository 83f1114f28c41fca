"""The layout of a circuit's picture: in forward order, without overlaps, with short edges, the same each time."""

import random
from itertools import pairwise

import pytest

from sparsetrain.analysis import circuit_layout
from sparsetrain.analysis.circuit_layout import Layout, channel_of, edge_length, lay_out, site_of
from sparsetrain.config import ModelOptions
from sparsetrain.pruning.graph import node_sites

SITES = ["embed", *node_sites(ModelOptions(n_layers=2, d_model=32, d_head=8)), "logits"]


def random_graph(n_nodes: int, n_edges: int) -> tuple[list[str], list[tuple[str, str, float]]]:
    rng = random.Random(0)
    every = [f"{site}:{c}" for site in SITES for c in range(32)]
    names = sorted(rng.sample(every, n_nodes), key=lambda n: (SITES.index(site_of(n)), channel_of(n)))
    pairs = [sorted(rng.sample(names, 2), key=names.index) for _ in range(n_edges)]
    return names, [(a, b, rng.uniform(-1, 1)) for a, b in pairs if site_of(a) != site_of(b)]


@pytest.fixture(scope="module")
def laid_out() -> tuple[list[str], list[tuple[str, str, float]], Layout]:
    names, edges = random_graph(200, 1200)
    return names, edges, lay_out(names, edges, SITES, d_head=8)


def test_layout_is_the_same_each_time(laid_out):
    names, edges, layout = laid_out
    assert lay_out(names, edges, SITES, d_head=8) == layout


def test_rows_stand_in_forward_order(laid_out):
    names, _, layout = laid_out
    present = [site for site in SITES if any(site_of(n) == site for n in names)]
    assert [row.site for row in layout.rows] == present
    assert all(below.y - above.y > 0.99 for above, below in pairwise(layout.rows))
    y = {row.site: row.y for row in layout.rows}
    assert all(layout.positions[n][1] == y[site_of(n)] for n in names)
    titles = [band.title for band in layout.bands]
    assert titles == [
        "embedding", "L0 attention", "L0 MLP", "L1 attention", "L1 MLP", "final residual", "logits",
    ]  # fmt: skip


def test_no_two_points_overlap(laid_out):
    names, _, layout = laid_out
    assert set(layout.positions) == set(names)
    for row in layout.rows:
        xs = sorted(x for x, y in layout.positions.values() if y == row.y)
        assert all(right - left >= 1 for left, right in pairwise(xs)), row.site
        assert xs[0] >= 0
        assert xs[-1] <= layout.n_columns


def test_heads_do_not_overlap_and_hold_their_nodes(laid_out):
    names, _, layout = laid_out
    for layer in (0, 1):
        boxes = sorted((h.left, h.right) for h in layout.heads if h.layer == layer)
        assert all(right <= left for (_, right), (left, _) in pairwise(boxes))
    box = {(h.layer, h.head): h for h in layout.heads}
    for name in names:
        if site_of(name).endswith((".q", ".k", ".v")):
            head = box[int(name.split(".")[1]), channel_of(name) // 8]
            x, y = layout.positions[name]
            assert head.left < x < head.right
            assert head.top <= y <= head.bottom


def test_residual_channels_keep_their_column_and_pairs_their_place(laid_out):
    names, _, layout = laid_out
    column, pair = {}, {}
    for name in names:
        x = layout.positions[name][0]
        if circuit_layout.is_residual(site_of(name)):
            assert column.setdefault(channel_of(name), x) == x
        if site_of(name).endswith((".q", ".k")):
            assert pair.setdefault((site_of(name)[:-1], channel_of(name)), x) == x
    assert len(set(column.values())) == len(column)


def test_sweeps_shorten_the_edges(laid_out, monkeypatch):
    names, edges, layout = laid_out
    monkeypatch.setattr(circuit_layout, "SWEEPS", 1)
    once = lay_out(names, edges, SITES, d_head=8)
    length = edge_length(edges, {n: x for n, (x, _) in layout.positions.items()})
    assert length < edge_length(edges, {n: x for n, (x, _) in once.positions.items()})


def test_chains_that_cross_by_number_are_drawn_side_by_side():
    """Channels 1 -> neuron 9 -> 1 and 2 -> neuron 5 -> 2: neuron 9 goes to the left of neuron 5."""
    edges = [
        ("blocks.0.mlp_in:1", "blocks.0.mlp_act:9", 1.0), ("blocks.0.mlp_act:9", "blocks.0.mlp_out:1", 1.0),
        ("blocks.0.mlp_in:2", "blocks.0.mlp_act:5", 1.0), ("blocks.0.mlp_act:5", "blocks.0.mlp_out:2", 1.0),
    ]  # fmt: skip
    names = list(dict.fromkeys(name for a, b, _ in edges for name in (a, b)))
    x = {n: place[0] for n, place in lay_out(names, edges, SITES, d_head=8).positions.items()}
    assert x["blocks.0.mlp_in:1"] < x["blocks.0.mlp_in:2"]
    assert x["blocks.0.mlp_act:9"] < x["blocks.0.mlp_act:5"]
    assert all(abs(x[a] - x[b]) <= 1 for a, b, _ in edges)


def test_a_crowd_that_wants_the_edge_stays_inside():
    """Twelve neurons of channel 31 want to stand at its column, the last one; there is room for them to its left."""
    fans = [("blocks.0.mlp_in:31", f"blocks.0.mlp_act:{i}", 1.0) for i in range(12)]
    edges = [*fans, *((f"blocks.0.mlp_in:{i}", f"blocks.0.mlp_act:{20 + i}", 1.0) for i in range(6))]
    names = list(dict.fromkeys(name for a, b, _ in edges for name in (a, b)))
    layout = lay_out(names, edges, SITES, d_head=8)
    xs = [layout.positions[b][0] for _, b, _ in edges]
    assert layout.n_columns == 18
    assert sorted(xs) == [i + 0.5 for i in range(18)]
