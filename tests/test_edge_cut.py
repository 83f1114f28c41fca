"""From rankings to edge sets, on losses whose smallest sets are known."""

import math

import pytest
import torch

from sparsetrain.bench import made_circuits
from sparsetrain.pruning import edge_cut
from sparsetrain.pruning.component_graph import ComponentGraph
from sparsetrain.pruning.edges import flat, n_edges, unflat


@pytest.fixture
def graph():
    return ComponentGraph(made_circuits.gate("and"), split_embedding=True)


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


def test_a_perfect_ranking_is_cut_where_it_should_be(graph):
    wanted = path(graph)
    cut = edge_cut.smallest(graph, ranked(graph, *wanted), needs(graph, *wanted), 0.0)
    assert cut.reached
    assert numbers(graph, cut.edges) == wanted
    assert cut.loss == 0


def test_cleaning_makes_up_for_a_bad_ranking(graph):
    wanted = path(graph)
    others = [i for i in range(n_edges(graph.edges)) if i not in wanted]
    cut = edge_cut.smallest(graph, ranked(graph, *others), needs(graph, *wanted), 0.0)
    assert numbers(graph, cut.edges) == wanted
    uncleaned = edge_cut.smallest(graph, ranked(graph, *others), needs(graph, *wanted), 0.0, clean_evaluations=0)
    assert len(numbers(graph, uncleaned.edges)) > len(wanted)


def test_few_needed_of_many_take_few_evaluations(graph):
    n = n_edges(graph.edges)
    count = edge_cut._Counted(needs(graph, 3), 0.0)
    cut = edge_cut.clean(graph, count(graph.edges), torch.arange(n), count, 1000)
    assert numbers(graph, cut.edges) == [3]
    assert count.n < n


def test_an_edge_that_could_go_once_another_went_goes(graph):
    """Cutting 0 is harmful only while 1 is there, and 0 is tried first."""

    def loss(kept):
        kept = flat(graph, kept)
        return float(kept[1] and not kept[0]) + needs(graph, 7)(unflat(graph, kept))

    count = edge_cut._Counted(loss, 0.0)
    start = torch.zeros(n_edges(graph.edges), dtype=torch.bool)
    start[[0, 1, 7]] = True
    order = torch.tensor([0, 7, 1, *range(2, 7), *range(8, len(start))])
    cut = edge_cut.clean(graph, count(unflat(graph, start)), order, count, 1000)
    assert numbers(graph, cut.edges) == [7]


def test_where_nothing_reaches_the_target_the_best_is_returned(graph):
    cut = edge_cut.smallest(graph, ranked(graph, 0, 1, 2), lambda kept: 1.0 + abs(n_edges(kept) - 8), 0.5)
    assert not cut.reached
    assert (n_edges(cut.edges), cut.loss) == (8, 1.0)
    nothing = edge_cut.smallest(graph, ranked(graph), lambda kept: math.nan, 0.5)
    assert not nothing.reached
    assert nothing.loss == math.inf


def test_the_empty_set_is_an_answer(graph):
    cut = edge_cut.smallest(graph, ranked(graph), lambda kept: 0.0, 0.5)
    assert cut.reached
    assert n_edges(cut.edges) == 0
    assert cut.n_evaluations == 1


def test_dangling_edges_go_if_the_target_holds_without_them(graph):
    wanted = path(graph)
    dangling = [0, 1]  # what head 0, which nobody reads, reads to make queries
    scores = ranked(graph, *dangling, *wanted)
    cut = edge_cut.smallest(graph, scores, needs(graph, *wanted), 0.0, clean_evaluations=0)
    assert numbers(graph, cut.edges) == wanted
    stays = edge_cut.smallest(graph, scores, needs(graph, *wanted, *dangling), 0.0)
    assert numbers(graph, stays.edges) == sorted(wanted + dangling)
