"""sheet.py: where rows, nodes and wires are drawn, by hand, and that the image shows them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_locality_export import OPTIONS, trained

from sparsetrain.locality.edges import edges_of
from sparsetrain.locality.positions import identity, plan_of, random_layout
from sparsetrain.locality.sheet import COLOURS, SHEAR, TILT, image, lengths, places, sheet_rows, strongest

PLAN = plan_of(OPTIONS, 11)
EVERY = 10**9


@pytest.fixture(scope="module")
def edges():
    return edges_of(trained(OPTIONS), PLAN)


def test_rows_stand_in_forward_order_with_the_residual_between_the_layers():
    block = ["blocks.{}.qk", "blocks.{}.v", "residual@{}", "blocks.{}.mlp", "residual@{}"]
    expected = ["tokens_in", "residual@0"]
    for l in range(2):
        expected += [key.format(n) for key, n in zip(block, (l, l, 2 * l + 1, l, 2 * l + 2), strict=True)]
    rows = sheet_rows(PLAN)
    assert list(rows) == [*expected, "tokens_out"]
    heights = [row.y for row in rows.values()]
    assert heights == sorted(heights) and len(set(heights)) == len(heights)
    concat = sheet_rows(plan_of(replace(OPTIONS, positions="concat"), 11, tokens=False))
    assert [key for key in concat if "positions" in key] == [f"positions@{i}" for i in range(4)]
    assert not any("tokens" in key for key in concat)
    assert "contexts" in sheet_rows(plan_of(replace(OPTIONS, positions="learned"), 11))


@pytest.mark.parametrize(
    ("matrix", "part", "top", "bottom"),
    [
        ("embed.weight", 0, "tokens_in", "residual@0"),
        ("blocks.0.attn.qkv.weight", 1, "residual@0", "blocks.0.qk"),
        ("blocks.1.attn.qkv.weight", 2, "residual@2", "blocks.1.v"),
        ("blocks.0.attn.out.weight", 0, "blocks.0.v", "residual@1"),
        ("blocks.1.mlp.up.weight", 0, "residual@3", "blocks.1.mlp"),
        ("blocks.1.mlp.out.weight", 0, "blocks.1.mlp", "residual@4"),
        ("unembed.weight", 0, "residual@4", "tokens_out"),
    ],
)
def test_each_matrix_joins_its_rows_and_its_nodes(edges, matrix, part, top, bottom):
    rows = sheet_rows(PLAN)
    piece = next(p for p in edges if (p.matrix, p.part) == (matrix, part))
    wires = strongest([piece], rows, EVERY)
    keys = list(rows)
    assert {(keys[a], keys[b]) for a, b in zip(wires.top, wires.bottom, strict=True)} == {(top, bottom)}
    ends = (piece.rows, piece.columns) if matrix == "embed.weight" else (piece.columns, piece.rows)
    expected = sorted(zip(piece.weights, *ends, strict=True))
    assert sorted(zip(wires.strength, wires.top_node, wires.bottom_node, strict=True)) == expected
    layout = random_layout(PLAN, 0)
    assert sorted(lengths(rows, layout, wires)) == pytest.approx(sorted(piece.lengths(layout)))


def test_the_strongest_of_every_matrix_are_taken_weakest_first(edges):
    rows = sheet_rows(PLAN)
    n = sum(map(len, edges)) // 10
    wires = strongest(edges, rows, n)
    expected = np.concatenate([np.sort(p.weights)[::-1][: max(1, int(n / sum(map(len, edges)) * len(p)))]
                               for p in edges])  # fmt: skip
    assert wires.strength.tolist() == sorted(expected)
    assert n - 2 * len(edges) < len(wires.top) <= n + len(edges)


def test_a_square_is_drawn_as_a_plane():
    plan = plan_of(OPTIONS, 11, sheet=2)
    rows = sheet_rows(plan)
    layout = identity(plan)
    n = plan.classes["residual"].n
    row = list(rows).index("residual@1")
    found = places(rows, layout, np.full(n, row), np.arange(n))
    x, back = layout.coordinates("residual").T
    assert found[:, 0] == pytest.approx(x + SHEAR * (1 - back))
    assert found[:, 1] == pytest.approx(rows["residual@1"].y + TILT * (back - 0.5))
    heights = [r.y for r in rows.values()]
    assert min(np.diff(heights)) > TILT, "planes do not lie on each other"


@pytest.mark.parametrize("sheet", [1, 2])
def test_the_image_shows_a_wire_in_the_colour_of_its_length(sheet):
    """A model with one strong wire in each matrix but one, from node to node of the same index, or across."""
    plan = plan_of(OPTIONS, 11, sheet)
    model = trained(OPTIONS)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for name, p in model.named_parameters():
            if name in {m.name for m in plan.matrices}:
                p[0, 0] = 1.0
        model.blocks[1].mlp.up.weight[0, 0], model.blocks[1].mlp.up.weight[71, 0] = 0.0, 1.0
    drawn = image(edges_of(model, plan), identity(plan), width=240)
    assert drawn.dtype == np.uint8 and drawn.shape[1:] == (240, 3)
    red, blue = (np.array([int(COLOURS[i][j : j + 2], 16) for j in (1, 3, 5)]) for i in (2, 0))
    y = list(sheet_rows(plan).values())[[*sheet_rows(plan)].index("residual@3")].y
    near = {}
    for what, colour in (("red", red), ("blue", blue)):
        hue = (255.0 - drawn) @ (255 - colour) / (np.linalg.norm(255.0 - drawn, axis=2) + 1e-9)
        hit = (hue / np.linalg.norm(255.0 - colour) > 0.999) & (drawn.min(2) < 250)
        near[what] = np.flatnonzero(hit.any(1))
    assert len(near["red"]) and len(near["blue"])
    assert near["red"].min() > (y + 0.3 - 0.5) * 56 and near["red"].max() < (y + 0.3 + 1.5) * 56
