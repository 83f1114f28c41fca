"""measures.py and modularity.py."""

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import planted, random_edges, small_plan

from sparsetrain.locality.edges import Piece
from sparsetrain.locality.measures import (
    block_fill,
    clusterability,
    length_measures,
    mean_count_length,
    mean_length,
    random_length,
    shuffled,
)
from sparsetrain.locality.modularity import mean_pairwise, modularity_measures
from sparsetrain.locality.positions import LocalityError, Matrix, NodeClass, Plan, identity, random_layout
from sparsetrain.locality.relayout import relayout

PAIR = Plan({"a": NodeClass(4), "b": NodeClass(4)}, (Matrix("m", ("a",), ("b",)),))


def two_wires(weights=(3.0, 1.0)):
    return [Piece("m", 0, "a", "b", np.array([0, 3]), np.array([0, 1]), np.array(weights))]


def test_mean_lengths_by_hand():
    layout = identity(PAIR)  # lengths 0 and 1/2
    assert mean_length(two_wires(), layout) == 0.125
    assert mean_count_length(two_wires(), layout) == 0.25


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), sheet=st.sampled_from([1, 2]), n=st.integers(1, 30))
def test_random_length_is_the_mean_over_all_pairs_of_slots(seed, sheet, n):
    plan = small_plan(sheet, n)
    edges = random_edges(plan, seed, 0.5)
    total = weight = 0.0
    for p in edges:
        apart = np.abs(plan.slots(p.row_class)[:, None] - plan.slots(p.column_class)).sum(-1)
        total, weight = total + p.weights.sum() * apart.mean(), weight + p.weights.sum()
    assert random_length(edges, plan) == pytest.approx(total / weight, abs=1e-12)


def test_shuffles_keep_every_degree_and_differ_by_seed():
    edges = random_edges(small_plan(), 0)
    for one, other, again in zip(edges, shuffled(edges, 1), shuffled(edges, 1), strict=True):
        assert np.array_equal(np.bincount(one.rows), np.bincount(other.rows))
        assert np.array_equal(np.bincount(one.columns), np.bincount(other.columns))
        assert np.array_equal(other.columns, again.columns)
    assert not np.array_equal(shuffled(edges, 1)[0].columns, shuffled(edges, 2)[0].columns)


def test_a_shuffled_model_is_no_more_local_than_its_null_and_a_modular_one_is():
    plan, edges = planted(0.9)
    start = random_layout(plan, 0)
    found = length_measures(edges, relayout(edges, start, 0, fresh=True), seeds=(1,))
    assert found["ratio"] < 0.4 and found["random"] == pytest.approx(1 / 3, abs=1e-3)
    assert sum(found["histogram"]) == pytest.approx(1)
    assert found["longer"][0.1] > found["longer"][0.25] > 0
    other = shuffled(edges, 7)
    null = length_measures(other, relayout(other, start, 0, fresh=True), seeds=(1,))
    assert null["ratio"] == pytest.approx(1, abs=0.02)


def test_clusterability_of_blocks_is_one_and_of_chance_a_kth():
    n, k = 64, 8
    plan = Plan({"a": NodeClass(n), "b": NodeClass(n)}, PAIR.matrices)
    same = np.arange(n)[:, None] * k // n == np.arange(n) * k // n
    blocks = [Piece("m", 0, "a", "b", *same.nonzero(), np.ones(int(same.sum())))]
    assert clusterability(blocks, identity(plan), k) == 1
    found = [clusterability(blocks, random_layout(plan, seed), k) for seed in range(20)]
    assert np.mean(found) == pytest.approx(1 / k, abs=0.02)
    assert clusterability(two_wires((3.0, 1.0)), identity(PAIR), 2) == 0.9  # 9 of 9 + 1 by squares


def test_block_fill_by_hand():
    rows, columns = np.array([0, 1, 1, 3]), np.array([0, 0, 1, 3])
    edges = [Piece("m", 0, "a", "b", rows, columns, np.ones(4))]
    assert block_fill(edges, identity(PAIR), 2, 0.25) == 0.75  # one tile of four
    assert block_fill(edges, identity(PAIR), 2, 1.0) == 1.0
    apart = identity(PAIR).replace({"a": np.array([0, 2, 1, 3])})  # node 1 goes to slot 2, another tile
    assert block_fill(edges, apart, 2, 0.25) == 0.5


def test_block_fill_of_a_modular_model_rises_with_its_layout():
    plan, edges = planted(0.9)
    scattered = random_layout(plan, 0)
    placed = relayout(edges, scattered, 0, fresh=True)
    assert block_fill(edges, placed, 16, 0.2) > 0.8 > 0.4 > block_fill(edges, scattered, 16, 0.2)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(0, 12), sheet=st.sampled_from([1, 2]))
def test_mean_distance_of_pairs(seed, n, sheet):
    places = np.random.default_rng(seed).random((n, sheet))
    expected = np.mean([np.abs(a - b).sum() for a, b in combinations(places, 2)]) if n > 1 else 0
    assert mean_pairwise(places) == pytest.approx(expected, abs=1e-12)


def test_modularity_of_separate_groups_is_known_and_far_above_its_null():
    """Four complete bipartite groups without edges between them: Q = 1 - 1/4."""
    n = 16
    plan = Plan({"a": NodeClass(n), "b": NodeClass(n)}, PAIR.matrices)
    ends = np.array([(i, j) for i, j in product(range(n), repeat=2) if i // 4 == j // 4])
    edges = [Piece("m", 0, "a", "b", *ends.T, np.ones(len(ends)))]
    found = modularity_measures(edges, identity(plan), seeds=(0, 1, 2))
    assert found["q"] == pytest.approx(0.75) and found["n_communities"] == 4
    assert found["z"] > 5 and max(found["null"]) < 0.6
    assert found["spread"] < 0.4
    mixed = modularity_measures(edges, random_layout(plan, 1), seeds=(0, 1, 2))
    assert mixed["q"] == found["q"] and mixed["spread"] > 0.8


def test_measures_without_a_null_are_refused():
    with pytest.raises(LocalityError, match="null must have one seed or more, got none"):
        length_measures(two_wires(), identity(PAIR), seeds=())
    with pytest.raises(LocalityError, match="null must have two seeds or more, got 1"):
        modularity_measures(two_wires(), identity(PAIR), seeds=(0,))


def test_q_and_k_that_join_the_same_nodes_are_one_edge_of_the_graph():
    """Modularity adds parallel edges up: twice the same piece is the graph with doubled weights."""
    plan = small_plan()
    edges = random_edges(plan, 0)
    twice = [*edges, *(replace(p) for p in edges)]
    back = [
        replace(p, row_class=p.column_class, column_class=p.row_class, rows=p.columns, columns=p.rows) for p in edges
    ]
    measured = [
        modularity_measures(e, identity(plan), seeds=(0, 1))["q"] for e in (edges, twice, [*edges, *back])
    ]  # a layer's two matrices join the same nodes the one way and the other
    assert measured == pytest.approx([measured[0]] * 3)
