"""From rankings to circuits, on losses whose smallest sets are known."""

import logging
import math
import re

import pytest
import torch

from sparsetrain.bench import made_circuits
from sparsetrain.pruning import cut as cutting
from sparsetrain.pruning.component_graph import ComponentGraph
from sparsetrain.pruning.edges import flat, n_edges, unflat
from sparsetrain.pruning.methods import METHODS
from sparsetrain.pruning.space import EdgeSpace, units


@pytest.fixture
def graph():
    return ComponentGraph(made_circuits.gate("and"), split_embedding=True)


@pytest.fixture
def space(graph):
    return EdgeSpace(graph)


def needs(graph, *wanted):
    """A loss that counts how many of these edges, by number, are missing."""
    return lambda kept: float(sum(not flat(graph, kept)[i] for i in wanted))


def ranked(graph, *best):
    scores = torch.zeros(n_edges(graph.edges))
    scores[list(best)] = torch.arange(len(best), 0, -1).float()
    return unflat(graph, scores)


def numbers(graph, kept):
    return flat(graph, kept).nonzero().flatten().tolist()


def path(graph):
    """Numbers of tokens > head 1's values > logits."""
    found = {group: torch.zeros_like(there) for group, there in graph.edges.items()}
    found["blocks.0.v"][1, 0] = found["logits"][0, graph.sources.index("a0.h1")] = True
    return numbers(graph, found)


def test_a_perfect_ranking_is_cut_where_it_should_be(graph, space):
    wanted = path(graph)
    cut = cutting.smallest(space, ranked(graph, *wanted), needs(graph, *wanted), 0.0)
    assert cut.reached
    assert numbers(graph, cut.kept) == wanted
    assert cut.loss == 0


def test_cleaning_makes_up_for_a_bad_ranking(graph, space):
    wanted = path(graph)
    others = [i for i in range(n_edges(graph.edges)) if i not in wanted]
    cut = cutting.smallest(space, ranked(graph, *others), needs(graph, *wanted), 0.0)
    assert numbers(graph, cut.kept) == wanted
    uncleaned = cutting.smallest(space, ranked(graph, *others), needs(graph, *wanted), 0.0, clean_evaluations=0)
    assert len(numbers(graph, uncleaned.kept)) > len(wanted)


def test_cleaning_without_a_terminal_says_now_and_then_how_far_it_is(graph, space, monkeypatch, caplog):
    wanted, n = path(graph), n_edges(graph.edges)
    others = [i for i in range(n) if i not in wanted]
    with caplog.at_level(logging.INFO):
        cutting.smallest(space, ranked(graph, *others), needs(graph, *wanted), 0.0)
        assert not caplog.messages  # it takes less than the time between two lines
        monkeypatch.setattr(cutting, "TELL_SECONDS", 0)
        cut = cutting.smallest(space, ranked(graph, *others), needs(graph, *wanted), 0.0, clean_evaluations=50)
    done = [re.fullmatch(r"cleaning: (\d+) of (\d+) edges looked at, (\d+) left, \d+ tries at most", line).groups()
            for line in caplog.messages]  # fmt: skip
    assert len(done) > 3 and int(done[-1][2]) == len(wanted) == len(numbers(graph, cut.kept))
    assert any(looked_at == of for looked_at, of, _ in done)


def test_few_needed_of_many_take_few_evaluations(graph, space):
    n = n_edges(graph.edges)
    count = cutting._Counted(needs(graph, 3), 0.0)
    cut = cutting.clean(space, count(graph.edges), units(graph.edges), count, 1000)
    assert numbers(graph, cut.kept) == [3]
    assert count.n < n


def test_an_edge_that_could_go_once_another_went_goes(graph, space):
    """Cutting 0 is harmful only while 1 is there, and 0 is tried first."""

    def loss(kept):
        kept = flat(graph, kept)
        return float(kept[1] and not kept[0]) + needs(graph, 7)(unflat(graph, kept))

    count = cutting._Counted(loss, 0.0)
    start = torch.zeros(n_edges(graph.edges), dtype=torch.bool)
    start[[0, 1, 7]] = True
    every = units(graph.edges)
    order = [every[i] for i in (0, 7, 1, *range(2, 7), *range(8, len(start)))]
    cut = cutting.clean(space, count(unflat(graph, start)), order, count, 1000)
    assert numbers(graph, cut.kept) == [7]


def test_where_nothing_reaches_the_target_the_best_is_returned(graph, space):
    cut = cutting.smallest(space, ranked(graph, 0, 1, 2), lambda kept: 1.0 + abs(n_edges(kept) - 8), 0.5)
    assert not cut.reached
    assert (n_edges(cut.kept), cut.loss) == (8, 1.0)
    nothing = cutting.smallest(space, ranked(graph), lambda kept: math.nan, 0.5)
    assert not nothing.reached
    assert nothing.loss == math.inf


def test_the_empty_set_is_an_answer(graph, space):
    cut = cutting.smallest(space, ranked(graph), lambda kept: 0.0, 0.5)
    assert cut.reached
    assert n_edges(cut.kept) == 0
    assert cut.n_evaluations == 1


def test_dangling_edges_go_if_the_target_holds_without_them(graph, space):
    wanted = path(graph)
    dangling = [0, 1]  # what head 0, which nobody reads, reads to make queries
    scores = ranked(graph, *dangling, *wanted)
    cut = cutting.smallest(space, scores, needs(graph, *wanted), 0.0, clean_evaluations=0)
    assert numbers(graph, cut.kept) == wanted
    stays = cutting.smallest(space, scores, needs(graph, *wanted, *dangling), 0.0)
    assert numbers(graph, stays.kept) == sorted(wanted + dangling)


def test_scores_are_kept_by_size_where_they_are_effects_and_by_value_elsewhere():
    scores = {"edges": torch.tensor([-2.0, 1.0])}
    kept_by = {name: method.worth(scores)["edges"].tolist() for name, method in METHODS.items()}
    assert kept_by.pop("attribution") == [2, 1]
    assert all(values == [-2, 1] for values in kept_by.values())
