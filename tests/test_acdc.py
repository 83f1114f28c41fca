"""ACDC on circuits that are known, and a long search that is killed."""

import pytest
import torch

from sparsetrain.bench.known_circuits import PROGRAMS, by_removal, known_circuits, load_program, named_edges
from sparsetrain.bench.made_circuits import gate, gate_data
from sparsetrain.config import ModelOptions
from sparsetrain.model import Transformer
from sparsetrain.prune_config import AcdcOptions
from sparsetrain.pruning import acdc, edges, objective
from sparsetrain.pruning.ablation import build_ablation
from sparsetrain.pruning.component_graph import ComponentGraph
from sparsetrain.pruning.curves import auroc, compare
from sparsetrain.tasks import TaskData


def known(name: str, kind: str = "zero"):
    model, data = load_program(PROGRAMS / f"{name}.safetensors")
    return by_removal(ComponentGraph(model, split_embedding=True), data, kind)


@pytest.mark.parametrize("kind", ["zero", "corrupted"])
@pytest.mark.parametrize("name", ["xproportion", "hist"])
def test_known_circuits_are_found_exactly(name, kind):
    case = known(name, kind)
    arguments = case.graph, case.data, case.ablation, objective.squared_error
    found = acdc.find(*arguments, 1e-4)
    assert compare(case.graph, found, case.edges)["exact"]
    scores = acdc.rank(*arguments, AcdcOptions(lowest_tau=1e-5, highest_tau=0.1, n_taus=5))
    assert auroc(case.graph, scores, case.edges) == 1


def test_the_known_channels_of_a_sparse_transformer_are_ranked_first():
    (case,) = (
        case for case in known_circuits([], made=True, device=torch.device("cpu"))
        if (case.name, case.ablation.kind) == ("quote_closing", "zero")
    )  # fmt: skip
    assert case.graph.kind == "channel"
    scores = acdc.rank(case.graph, case.data, case.ablation, objective.squared_error, AcdcOptions(n_taus=5))
    assert auroc(case.graph, scores, case.edges) == 1


def test_a_sweep_is_many_searches_in_one():
    """The score of an edge is the largest threshold whose own search keeps it; of a model that is not made for it."""
    model = Transformer(ModelOptions(n_layers=1, d_model=8, d_head=4, n_ctx=6, bigram=False), 10).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=generator))
    tokens = torch.randint(10, (8, 6), generator=generator)
    answers = tokens[:, 0]
    data = TaskData("random", tokens, torch.full((8,), 5), answers, (answers + 1) % 10, answers, tuple("abcdefgh"))
    graph = ComponentGraph(model)
    arguments = graph, data, build_ablation(graph.read, "zero", [], data), objective.kl
    scores = acdc.rank(*arguments, AcdcOptions(lowest_tau=0.001, highest_tau=10, n_taus=5))
    expected = torch.zeros(edges.n_edges(graph.edges))
    for tau in (0.001, 0.01, 0.1, 1, 10):
        expected[edges.flat(graph, acdc.find(*arguments, tau))] = tau
    torch.testing.assert_close(edges.flat(graph, scores), expected)
    assert len(expected.unique()) > 2, "the thresholds must not all choose alike"


def test_of_an_or_it_keeps_one_branch():
    """What makes alternatives worth asking for (`alternatives.py`)."""
    graph, data = ComponentGraph(gate("or"), split_embedding=True), gate_data("or")
    ablation = build_ablation(graph.read, "corrupted", [], data)
    found = acdc.find(graph, data, ablation, objective.logit_difference, 1e-3)
    branch = [("tokens", "a0.h0<v>"), ("a0.h0", "m0"), ("m0", "logits")]
    assert compare(graph, found, named_edges(graph, branch))["exact"]


class Killed(BaseException):
    """What a kill looks like from inside."""


def test_a_killed_search_goes_on_where_it_was(tmp_path):
    case, state = known("xproportion"), tmp_path / "search.json"
    options = AcdcOptions(lowest_tau=1e-4, highest_tau=1, n_taus=5)
    calls = []

    def squared_error(*outputs):
        calls.append(1)
        if len(calls) == limit:
            raise Killed
        return objective.squared_error(*outputs)

    arguments = case.graph, case.data, case.ablation, squared_error, options
    limit = None
    expected = acdc.rank(*arguments)
    whole = len(calls)
    calls, limit = [], whole // 2
    with pytest.raises(Killed):
        acdc.rank(*arguments, state=state)
    calls, limit = [], None
    resumed = acdc.rank(*arguments, state=state)
    assert len(calls) < 0.7 * whole
    assert all(torch.equal(resumed[group], expected[group]) for group in expected)
    calls = []
    acdc.rank(*arguments, state=state)
    assert len(calls) == len(list(edges.batches(case.graph, case.data, case.ablation))), (
        "only the full model is run again"
    )
    with pytest.raises(ValueError, match="must hold a search with the same settings, got taus .*; delete it"):
        acdc.rank(*arguments[:-1], AcdcOptions(n_taus=3), state=state)
    case.graph.model.unembed.weight[0, 0] += 1
    with pytest.raises(ValueError, match="must hold a search with the same settings, got weights and prompts"):
        acdc.rank(*arguments, state=state)
    state.write_text("{")
    with pytest.raises(ValueError, match="must hold a saved search, got: .*; delete it to start anew"):
        acdc.rank(*arguments, state=state)


def test_hours_are_announced(monkeypatch, caplog):
    case = known("hist")
    monkeypatch.setattr(acdc, "LONG", 0)
    acdc.find(case.graph, case.data, case.ablation, objective.squared_error, 1e-4)
    assert "once for each of 13 edges of the component graph" in caplog.text
