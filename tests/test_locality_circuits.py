"""circuit_measures.py"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_locality_export import OPTIONS, trained

from sparsetrain.locality.circuit_measures import nodes_by_class, overlap_measures, spread_measures, wiring_measures
from sparsetrain.locality.edges import edges_of
from sparsetrain.locality.positions import LocalityError, identity, plan_of, random_layout
from sparsetrain.model import site_widths
from sparsetrain.pruning import graph

PLAN = plan_of(OPTIONS, 11)


def mask(n, *at):
    found = torch.zeros(n, dtype=torch.bool)
    found[list(at)] = True
    return found


@pytest.fixture(scope="module")
def model():
    return trained(OPTIONS)


@pytest.fixture(scope="module")
def edges(model):
    return edges_of(model, PLAN)


def test_nodes_are_those_of_the_classes_and_count_once():
    options = replace(OPTIONS, positions="concat")
    plan = plan_of(options, 11)
    masks = {
        "blocks.0.attn_in": mask(29, 3, 26),
        "blocks.0.attn_out": mask(24, 3, 4),
        "final_resid": mask(24, 3),
        "blocks.1.q": mask(24, 7),
        "blocks.1.k": mask(24, 7, 8),
        "blocks.1.v": mask(24, 7),
        "blocks.1.mlp_act": mask(72, 70),
    }
    found = {name: at.tolist() for name, at in nodes_by_class(masks, identity(plan)).items()}
    assert found == {
        "residual": [3, 4],
        "positions": [2],
        "blocks.1.qk": [7, 8],
        "blocks.1.v": [7],
        "blocks.1.mlp": [70],
    }
    every = {site: torch.ones(n, dtype=torch.bool) for site, n in site_widths(options).items()}
    full = nodes_by_class(every, identity(plan))
    assert {n: len(at) for n, at in full.items()} == {
        n: c.n for n, c in plan.classes.items() if not n.startswith("tokens")
    }


def test_wiring_of_a_circuit_by_hand(model, edges):
    layout = random_layout(PLAN, 0)
    qkv, up = model.blocks[1].attn.qkv.weight.detach(), model.blocks[0].mlp.up.weight.detach()
    k = qkv[24:48]
    i, j = k.nonzero()[5].tolist()
    a, b = up.nonzero()[9].tolist()
    found = wiring_measures(
        [(f"blocks.1.attn_in:{j}", f"blocks.1.k:{i}"), (f"blocks.0.mlp_in:{b}", f"blocks.0.mlp_act:{a}")], edges, layout
    )
    where = {name: layout.coordinates(name)[:, 0] for name in PLAN.classes}
    weights = [abs(k[i, j]) / k[k != 0].abs().mean(), abs(up[a, b]) / up[up != 0].abs().mean()]
    lengths = [
        abs(where["blocks.1.qk"][i] - where["residual"][j]),
        abs(where["blocks.0.mlp"][a] - where["residual"][b]),
    ]
    wire = sum(float(w) * float(d) for w, d in zip(weights, lengths, strict=True))
    inner = [p for p in edges if p.matrix.startswith("blocks")]
    assert found["length"] == pytest.approx(wire / float(sum(weights)))
    assert found["wire_share"] == pytest.approx(wire / sum(p.weights @ p.lengths(layout) for p in inner))
    assert found["edge_share"] == 2 / sum(map(len, inner))


def test_a_circuit_of_all_edges_is_the_whole_wiring(model, edges):
    names = [(f"{w.source}:{j}", f"{w.target}:{i}") for w in graph.wires(model) for i, j in w.weight.nonzero().tolist()]
    found = wiring_measures(names, edges, random_layout(PLAN, 0))
    assert found["wire_share"] == found["weight_share"] == found["edge_share"] == 1
    assert found["length"] == found["model_length"]


def test_nodes_in_one_place_are_enriched_and_random_ones_are_not(edges):
    layout = random_layout(PLAN, 0)
    near = {name: np.sort(layout.order(name)[8:12]) for name in ("residual", "blocks.0.v", "blocks.1.qk")}
    found = spread_measures(near, edges, layout, 0)
    assert found["z"] > 3 and found["distance"] < 0.5 * found["random_distance"]
    assert found["span"] == pytest.approx(3 / 24) and found["random_span"] > 0.4
    assert found["window"] >= 0.5 > found["random_window"]
    rng = np.random.default_rng(5)
    z = [
        spread_measures({n: rng.choice(24, 4, replace=False) for n in near}, edges, layout, 0, n_draws=50)["z"]
        for _ in range(40)
    ]
    assert abs(np.mean(z)) < 0.6 and 0.6 < np.std(z) < 1.6


def test_random_nodes_are_as_well_joined(edges):
    """The best joined residual channels lie in the middle here: with their degrees taken in, that is no enrichment."""
    degrees = sum(
        np.bincount(p.columns, p.weights, 24) for p in edges if p.column_class == "residual"
    ) + sum(np.bincount(p.rows, p.weights, 24) for p in edges if p.row_class == "residual")  # fmt: skip
    by_degree = np.argsort(-degrees)
    from_middle = np.argsort(np.abs(np.arange(24) - 11.5), kind="stable")
    slots = np.empty(24, np.int64)
    slots[by_degree] = from_middle
    layout = identity(PLAN).replace({"residual": slots})
    found = spread_measures({"residual": np.sort(by_degree[:4])}, edges, layout, 0)
    assert found["distance"] < 0.15 and found["random_distance"] < 0.2


def test_overlap_of_places_without_a_common_node(edges):
    layout = identity(PLAN)
    left, also_left = {"residual": np.arange(0, 8, 2)}, {"blocks.0.v": np.arange(0, 8, 2)}
    right = {"residual": np.arange(16, 24)}
    same = overlap_measures(left, also_left, edges, layout, 0)
    assert same["overlap"] == 1 and same["shared"] == 0 and same["random_overlap"] < 0.8
    assert overlap_measures(left, right, edges, layout, 0)["overlap"] == 0
    assert overlap_measures(left, left, edges, layout, 0)["shared"] == 1


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (("input", "a0.h1<q>"), 'must be named "site:channel"'),
        (("blocks.0.attn_in:0", "logits:0"), "edge must end at a channel of q, k, v"),
        (("blocks.0.attn_in:24", "blocks.0.q:0"), "must be a channel of the layout's model, got blocks.0.attn_in:24"),
        (("blocks.7.attn_in:2", "blocks.7.q:0"), "got blocks.7.q:0"),
    ],
)
def test_edges_of_another_graph_are_refused(edges, pair, words):
    with pytest.raises(LocalityError, match=words):
        wiring_measures([pair], edges, identity(PLAN))


def test_edges_that_are_zero_in_the_model_and_no_edges_are_refused(model, edges):
    i, j = (model.blocks[0].mlp.up.weight == 0).nonzero()[0].tolist()
    with pytest.raises(LocalityError, match="nonzero weights of the model, got 1 of which 0 are"):
        wiring_measures([(f"blocks.0.mlp_in:{j}", f"blocks.0.mlp_act:{i}")], edges, identity(PLAN))
    with pytest.raises(LocalityError, match="got 0 of which 0"):
        wiring_measures([], edges, identity(PLAN))


def test_component_graphs_are_refused():
    with pytest.raises(LocalityError, match="got blocks.0.heads:1; prune channels"):
        nodes_by_class({"blocks.0.heads": mask(4, 1)}, identity(PLAN))
