"""cost.py, fiedler.py and relayout.py."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import planted, random_edges, small_plan

from sparsetrain.locality.cost import Cost, total_cost
from sparsetrain.locality.fiedler import fiedler_layout, slots_by, smooth_vectors
from sparsetrain.locality.measures import mean_length
from sparsetrain.locality.positions import identity, random_layout, slot_coordinates
from sparsetrain.locality.relayout import relayout, sweep

sheets = st.sampled_from([1, 2])


def adjacency(name, other, edges, plan):
    found = np.zeros((plan.classes[name].n, plan.classes[other].n))
    for p in edges:
        if (p.row_class, p.column_class) == (name, other):
            np.add.at(found, (p.rows, p.columns), p.weights)
        elif (p.column_class, p.row_class) == (name, other):
            np.add.at(found, (p.columns, p.rows), p.weights)
    return found


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), sheet=sheets, n=st.integers(1, 40), density=st.sampled_from([0.05, 0.3, 1.0]))
def test_cost_of_every_slot_is_the_weighted_sum_of_distances(seed, sheet, n, density):
    plan = small_plan(sheet, n)
    edges, layout = random_edges(plan, seed, density), random_layout(plan, seed)
    for name in plan.classes:
        slots = plan.slots(name)
        expected = np.zeros((plan.classes[name].n, len(slots)))
        for other in plan.classes:
            apart = np.abs(layout.coordinates(other)[:, None] - slots[None]).sum(-1)
            expected += adjacency(name, other, edges, plan) @ apart
        np.testing.assert_allclose(Cost(name, edges, layout).table(slots), expected, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), sheet=sheets)
def test_gain_of_a_swap_is_what_the_whole_cost_falls_by(seed, sheet):
    plan = small_plan(sheet)
    edges, layout = random_edges(plan, seed), random_layout(plan, seed)
    before = total_cost(edges, layout)
    nodes = np.random.default_rng(seed).permutation(13)
    a, b = nodes[:6], nodes[6:12]
    cost, places = Cost("a", edges, layout), layout.coordinates("a")
    gains = sum(cost.at(x, places[x]) - cost.at(x, places[y]) for x, y in ((a, b), (b, a)))
    together = layout.slots["a"].copy()
    for i, j, gain in zip(a, b, gains, strict=True):
        slots = layout.slots["a"].copy()
        slots[[i, j]] = slots[[j, i]]
        together[[i, j]] = together[[j, i]]
        np.testing.assert_allclose(before - total_cost(edges, layout.replace({"a": slots})), gain, atol=1e-11)
    np.testing.assert_allclose(before - total_cost(edges, layout.replace({"a": together})), gains.sum(), atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), sheet=sheets, n=st.integers(1, 200), density=st.sampled_from([0.02, 0.3]))
def test_no_sweep_raises_the_cost_and_heads_stay_whole(seed, sheet, n, density):
    plan = small_plan(sheet, n)
    edges, layout = random_edges(plan, seed, density), random_layout(plan, seed)
    rng = np.random.default_rng(seed)
    costs = [total_cost(edges, layout)]
    for _ in range(4):
        layout = sweep(edges, layout, rng)  # a Layout refuses heads that are mixed
        costs.append(total_cost(edges, layout))
    assert (np.diff(costs) <= 1e-9).all()
    assert np.array_equal(layout.slots["fixed"], np.arange(5))


def test_heads_find_their_best_order():
    """Three heads whose channels are joined to one place each: the best of the six orders is reached."""
    plan = small_plan()
    edges = []
    for p in random_edges(plan, 0, 0.0):
        if p.column_class == "fixed":  # head h to the fixed node 4 - 2 h alone
            rows = np.arange(plan.classes[p.row_class].n)
            ends = {"rows": rows, "columns": 4 - 2 * (rows // plan.classes[p.row_class].block)}
            edges.append(replace(p, **ends, weights=np.ones(len(rows))))
    found = relayout(edges, identity(plan), 0)
    best = min(
        total_cost(edges, identity(plan).replace({"heads": blocks(order, 4), "more": blocks(order, 2)}))
        for order in permutations(range(3))
    )
    assert total_cost(edges, found) == pytest.approx(best, abs=1e-12)
    assert (found.slots["heads"] // 4).tolist() == [2] * 4 + [1] * 4 + [0] * 4


def blocks(order, block):
    return (np.array(order)[:, None] * block + np.arange(block)).ravel()


@pytest.mark.parametrize(("inside", "below"), [(0.9, 0.09), (0.7, 0.15)])
@pytest.mark.parametrize("fresh", [True, False])
def test_planted_modules_are_found(inside, below, fresh):
    plan, edges = planted(inside)
    start = random_layout(plan, 0)
    assert mean_length(edges, start) == pytest.approx(1 / 3, abs=0.01)
    assert mean_length(edges, relayout(edges, start, 0, fresh=fresh)) < below


@pytest.mark.parametrize("sheet", [1, 2])
def test_the_same_seed_gives_the_same_layout(sheet):
    plan = small_plan(sheet, 100)
    edges = random_edges(plan, 1)
    one, same = (relayout(edges, random_layout(plan, 0), 5, fresh=True) for _ in range(2))
    assert all(np.array_equal(one.slots[name], same.slots[name]) for name in one.slots)


def test_smooth_vectors_are_those_of_the_normalised_laplacian():
    plan = small_plan()
    edges = random_edges(plan, 3, 0.6)
    names = list(plan.classes)
    whole = np.block([[adjacency(a, b, edges, plan) for b in names] for a in names])
    degrees = whole.sum(1)
    degrees = degrees + degrees.mean()
    known = np.sqrt(degrees) / np.linalg.norm(np.sqrt(degrees))
    outside = np.eye(len(known)) - np.outer(known, known)
    _, vectors = np.linalg.eigh(outside @ (whole / np.sqrt(np.outer(degrees, degrees))) @ outside)
    expected = vectors[:, ::-1][:, :2] / np.sqrt(degrees)[:, None]
    found = np.concatenate(list(smooth_vectors(edges, plan, 2, 0).values()))
    for one, other in zip(found.T, expected.T, strict=True):
        assert abs(one @ other) / np.linalg.norm(one) / np.linalg.norm(other) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("sheet", [1, 2])
@pytest.mark.parametrize("n", [1, 5, 12, 49])
def test_nodes_whose_vectors_are_places_get_these_places(n, sheet):
    shuffle = np.random.default_rng(0).permutation(n)
    assert np.array_equal(slots_by(slot_coordinates(n, sheet)[shuffle]), shuffle)


@pytest.mark.parametrize("sheet", [1, 2])
def test_fiedler_start_is_far_better_than_chance(sheet):
    plan, edges = planted(0.9)
    plan = replace(plan, sheet=sheet)
    start = random_layout(plan, 0)
    assert mean_length(edges, fiedler_layout(edges, start, 0)) < 0.7 * mean_length(edges, start)
