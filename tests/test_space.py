"""Sets of units, nodes or edges: random ones like them, their complement, and what each unit is worth."""

import pytest
import torch

import sparsetrain
from sparsetrain.config import load_config
from sparsetrain.prune_config import PruneConfig
from sparsetrain.pruning import evaluate, graph, space
from sparsetrain.pruning.ablation import build_ablation
from sparsetrain.pruning.channel_edges import ChannelGraph
from sparsetrain.pruning.component_graph import ComponentGraph
from sparsetrain.pruning.cut import Problem, effects
from sparsetrain.pruning.space import EdgeSpace, NodeSpace
from sparsetrain.tasks import encode_task, load_task


@pytest.fixture(scope="module")
def loaded(tiny_run):
    return sparsetrain.load(tiny_run)


@pytest.fixture(scope="module")
def problem(loaded) -> Problem:
    model, tokenizer = loaded
    data = encode_task(load_task("single_double_quote"), tokenizer, 2, "train", 0, 64)
    nodes = NodeSpace(model, tie_qk=True)
    corpus = [torch.randint(400, (4, 32), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    ablation = build_ablation(nodes.read, "mean_data", corpus)
    return Problem(nodes, data, ablation, load_config(PruneConfig, []))


def test_effects_are_what_ablating_each_unit_alone_does(problem):
    kept = {site: mask.clone() for site, mask in problem.space.everything.items()}
    for site, mask in kept.items():
        mask[3:] = site == "final_resid"
    _, calibration = problem.score(kept)
    found = effects(problem, kept, calibration)
    base, without = (
        evaluate.task_score(problem.space.logits(problem.data, k, problem.ablation), problem.data, calibration)[0]
        for k in (kept, space.without(kept, [("blocks.1.mlp_in", (2,))]))
    )
    assert found["blocks.1.mlp_in", (2,)] == pytest.approx(without - base, abs=1e-7)
    assert len(found) == space.n_units(kept)


def test_random_nodes_match_the_circuit_site_by_site_and_avoid_it(problem):
    nodes = {site: torch.zeros_like(mask) for site, mask in problem.space.everything.items()}
    nodes["blocks.0.q"][:7], nodes["blocks.1.mlp_act"][5:9], nodes["blocks.0.v"][:30] = True, True, True
    drawn = space.random_like(problem.space.everything, nodes, torch.Generator().manual_seed(0))
    assert {s: int(m.sum()) for s, m in drawn.items()} == {s: int(m.sum()) for s, m in nodes.items()}
    assert not (drawn["blocks.0.q"] & nodes["blocks.0.q"]).any()
    assert int((drawn["blocks.0.v"] & nodes["blocks.0.v"]).sum()) == 28, "only as many as there is no other room for"


@pytest.mark.parametrize("made", [ChannelGraph, ComponentGraph])
def test_random_edges_are_edges(loaded, made):
    of = EdgeSpace(made(loaded[0]))
    kept = of.top({group: torch.rand(there.shape) for group, there in of.everything.items()}, 9)
    drawn = space.random_like(of.everything, kept, torch.Generator().manual_seed(0))
    assert space.n_units(drawn) == 9
    for group, there in of.everything.items():
        assert not (drawn[group] & ~there).any()
        assert int(drawn[group].sum()) == int(kept[group].sum())
    rest = space.complement(of.everything, kept)
    assert space.n_units(rest) == space.n_units(of.everything) - 9


def test_units_have_names(loaded):
    model, _ = loaded
    assert NodeSpace(model, True).name(("blocks.0.q", (3,))) == "blocks.0.q:3"
    assert EdgeSpace(ChannelGraph(model)).name(("blocks.0.q", (3, 4))) == "blocks.0.attn_in:4->blocks.0.q:3"
    assert EdgeSpace(ComponentGraph(model)).name(("blocks.1.q", (3, 2))) == "a0.h1->a1.h3<q>"


def test_the_ends_of_edges_are_the_nodes_of_a_circuit(loaded):
    of = EdgeSpace(ComponentGraph(loaded[0]))
    kept = {group: torch.zeros_like(there) for group, there in of.everything.items()}
    kept["blocks.1.q"][3, 2] = kept["logits"][0, 0] = True
    nodes = of.nodes(kept)
    assert {s: m.nonzero().flatten().tolist() for s, m in nodes.items() if m.any()} == {
        "embed": [0], "blocks.0.heads": [1], "blocks.1.heads": [3], "logits": [0],
    }  # fmt: skip
    channel = EdgeSpace(ChannelGraph(loaded[0]))
    some = channel.top({g: torch.rand(t.shape) for g, t in channel.everything.items()}, 5)
    assert graph.n_nodes({s: m for s, m in channel.nodes(some).items() if s != "final_resid"}) >= 5
