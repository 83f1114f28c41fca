"""Both graphs as edges that are cut one by one: identities that hold for any model, and work done by hand."""

import dataclasses

import pytest
import torch

from sparsetrain.config import RunConfig, load_config
from sparsetrain.model import Transformer
from sparsetrain.pruning import edges, evaluate, graph
from sparsetrain.pruning.ablation import build_ablation, draw_places
from sparsetrain.pruning.channel_edges import ChannelGraph
from sparsetrain.pruning.component_graph import ComponentGraph
from sparsetrain.tasks import TaskData, TaskError

SMALL = ["model.n_layers=2", "model.d_model=16", "model.d_head=4", "model.n_ctx=12", "sparsity.density=1"]
GPT2 = ["model.norm=layer", "model.activation=gelu_tanh", "model.positions=learned", "model.bigram=false",
        "model.sink=false", "model.abs_topk=1"]  # fmt: skip
MODELS = {"sparse": ["model.positions=concat", "model.d_pos=4"], "gpt2": GPT2}
KINDS = ["zero", "mean_data", "mean_task", "mean_position", "resample", "corrupted"]


def build(name: str) -> Transformer:
    options = load_config(RunConfig, [*SMALL, *MODELS[name]]).model
    model = Transformer(options, 20).double().requires_grad_(False)
    for p in model.parameters():
        weight = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype) * 0.5
        sparse = name == "sparse" and p.dim() == 2 and p.shape[0] != 20
        p.copy_(torch.where(torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.3, weight, 0)
                if sparse else weight)  # fmt: skip
    return model


def prompts() -> TaskData:
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(20, (6, 9), generator=g)
    last = torch.tensor([8, 8, 5, 5, 7, 7])
    answers = torch.randint(20, (6,), generator=g)
    corrupted = tokens.view(3, 2, 9).flip(1).reshape(6, 9)
    return TaskData("made", tokens, last, answers, (answers + 1) % 20, answers, tuple("abcdef"), corrupted)


def corpus() -> list[torch.Tensor]:
    return [torch.randint(20, (4, 12), generator=torch.Generator().manual_seed(i)) for i in range(3)]


GRAPHS = [
    (ChannelGraph, "sparse", {}),
    (ChannelGraph, "gpt2", {}),
    (ComponentGraph, "sparse", {}),
    (ComponentGraph, "gpt2", {}),
    (ComponentGraph, "gpt2", {"split_embedding": True}),
]


@pytest.fixture(params=GRAPHS, ids=lambda p: f"{p[0].__name__}-{p[1]}{'-split' * bool(p[2])}")
def any_graph(request):
    made, name, options = request.param
    return made(build(name), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_with_every_edge_the_circuit_is_the_model(any_graph, kind):
    data = prompts()
    ablation = build_ablation(any_graph.read, kind, corpus(), data)
    whole = any_graph.model(data.tokens)[torch.arange(6), data.last]
    kept = edges.all_answer_logits(any_graph, data, any_graph.edges, ablation)
    torch.testing.assert_close(kept, whole, rtol=0, atol=1e-6)


def test_means_of_positions_serve_prompts_longer_than_those_they_were_taken_of(any_graph):
    of, data = any_graph, prompts()
    short = data.take([2, 3]).trimmed()
    ablation = build_ablation(of.read, "mean_position", [], short)
    outputs = edges.all_answer_logits(of, data, of.edges, ablation)
    assert (outputs - evaluate.all_answer_logits(of.model, data, graph.full(of.model), ablation)).abs().max() < 1e-9
    means = ablation.replacements(of.read, data, torch.zeros_like(data.tokens))
    for mean in means.values():
        assert mean.shape[-2] == data.tokens.shape[1]
        assert (mean[..., 6:, :] == mean[..., 5:6, :]).all(), "past the last position its mean is taken"


def test_with_no_edge_the_circuit_is_the_corrupted_run(any_graph):
    """Of the component graph. In the channel graph the residual stream still carries the embedding."""
    data = prompts()
    nothing = {group: torch.zeros_like(there) for group, there in any_graph.edges.items()}
    logits = edges.all_answer_logits(any_graph, data, nothing, build_ablation(any_graph.read, "corrupted", [], data))
    if any_graph.kind == "component":
        corrupted = any_graph.model.final_resid(data.corrupted)[torch.arange(6), data.last]
        expected = any_graph.model.logits(corrupted, data.tokens[torch.arange(6), data.last])
    else:
        embedding = any_graph.model.embed(data.tokens) - any_graph.model.embed(data.corrupted)
        resid = any_graph.model.final_resid(data.corrupted) + embedding
        expected = evaluate.logits_at_answers(any_graph.model, resid, data)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["zero", "mean_data", "corrupted"])
def test_a_gate_has_the_gradient_of_finite_differences(any_graph, kind):
    data = prompts().take([0, 1])
    ablation = build_ablation(any_graph.read, kind, corpus(), data)
    places = draw_places(ablation, data.tokens, torch.Generator())
    start = {group: 0.6 * there.double() for group, there in any_graph.edges.items()}
    weights = torch.randn(2, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(gates):
        return (edges.answer_logits(any_graph, data, gates, ablation, places) * weights).sum()

    leaves = {group: gate.clone().requires_grad_() for group, gate in start.items()}
    gradients = dict(zip(leaves, torch.autograd.grad(value(leaves), leaves.values()), strict=True))
    for group, there in any_graph.edges.items():
        i, j = there.nonzero()[-1].tolist()
        step = torch.zeros_like(start[group])
        step[i, j] = 1e-6
        up, down = (value({**start, group: start[group] + s * step}) for s in (1, -1))
        torch.testing.assert_close(gradients[group][i, j], (up - down) / 2e-6, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("positions", ["learned", "concat", "none"])
def test_positions_before_the_first_corrupted_token_may_be_left_out(positions):
    """Half open gates give the same outputs, and the same gradients, with and without them."""
    options = load_config(RunConfig, [*SMALL, *GPT2, f"model.positions={positions}", "model.d_pos=4"]).model
    component = ComponentGraph(Transformer(options, 20, torch.Generator().manual_seed(0)).double())
    data = prompts()
    before = torch.arange(9) < torch.tensor([3, 3, 4, 4, 0, 0])[:, None]
    data = dataclasses.replace(data, corrupted=torch.where(before, data.tokens, data.corrupted))
    ablation = build_ablation(component.read, "corrupted", [], data)
    replacements = ablation.replacements(component.read, data, torch.zeros_like(data.tokens))
    shared = replacements["shared"]
    assert (shared.sum(1) >= torch.tensor([3, 3, 4, 4, 0, 0])).all() and not shared.all()
    found = []
    for named in (replacements, {name: x for name, x in replacements.items() if name != "shared"}):
        leaves = [gate.double().requires_grad_() for gate in edges.like(component, 0.6).values()]
        outputs = edges.gated_logits(component, data, dict(zip(component.edges, leaves, strict=True)), named)
        found.append([outputs, *torch.autograd.grad(outputs.square().sum(), leaves)])
    for ours, whole in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-12)
        assert whole.abs().max() > 0


def test_partners_that_are_the_prompts_themselves_leave_the_model_as_it_is():
    component, data = ComponentGraph(build("gpt2")), prompts()
    data = dataclasses.replace(data, corrupted=data.tokens)
    nothing = {group: torch.zeros_like(there) for group, there in component.edges.items()}
    cut = edges.all_answer_logits(component, data, nothing, build_ablation(component.read, "corrupted", [], data))
    whole = component.model(data.tokens)[torch.arange(6), data.last]
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-9)


def test_cutting_one_edge_between_components_by_hand():
    """m0 -> logits under zero ablation: the last norm reads the residual stream without what the first MLP wrote."""
    model, data = build("gpt2"), prompts()
    component = ComponentGraph(model)
    kept = {group: there.clone() for group, there in component.edges.items()}
    kept["logits"][0, component.sources.index("m0")] = False
    _, seen = model.run(data.tokens, read=["final_resid", "blocks.0.mlp_out"])
    expected = evaluate.logits_at_answers(model, seen["final_resid"] - seen["blocks.0.mlp_out"], data)
    ours = edges.all_answer_logits(component, data, kept, build_ablation(component.read, "zero", [], data))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_cutting_one_weight_by_hand():
    """A weight that is cut under zero ablation is a weight of zero."""
    model, data = build("sparse"), prompts()
    channel = ChannelGraph(model)
    ablation = build_ablation(channel.read, "zero", [], data)
    for group, wire in channel.wires.items():
        i, j = (wire.weight != 0).nonzero()[3].tolist()
        kept = {**channel.edges, group: channel.edges[group].clone()}
        kept[group][i, j] = False
        ours = edges.all_answer_logits(channel, data, kept, ablation)
        matrix = model.get_parameter(wire.matrix)
        row = i + (0 if group[-2:] not in (".k", ".v") else matrix.shape[0] // 3 * (1 + (group[-1] == "v")))
        before = matrix[row, j].item()
        matrix[row, j] = 0
        torch.testing.assert_close(ours, evaluate.logits_at_answers(model, model.final_resid(data.tokens), data))
        matrix[row, j] = before


@pytest.mark.parametrize(
    ("n_layers", "n_heads", "split", "n"),
    [(2, 1, True, 32), (4, 1, True, 94), (4, 1, False, 77), (12, 12, False, 32491)],
)
def test_the_published_numbers_of_edges(n_layers, n_heads, split, n):
    sizes = [f"model.n_layers={n_layers}", f"model.d_model={4 * n_heads}", "sparsity.density=1", "model.d_head=4"]
    model = Transformer(load_config(RunConfig, [*sizes, "model.positions=learned"]).model, 5)
    component = ComponentGraph(model, split_embedding=split)
    assert edges.n_edges(component.edges) == n
    assert len(edges.edge_names(component, component.edges)) == n


def test_edges_are_named_by_their_ends():
    component = ComponentGraph(build("gpt2"), split_embedding=True)
    only = {group: torch.zeros_like(there) for group, there in component.edges.items()}
    only["blocks.1.k"][2, 3] = only["blocks.0.mlp"][0, 1] = only["logits"][0, 6] = True
    assert edges.edge_names(component, only) == [("positions", "m0"), ("a0.h1", "a1.h2<k>"), ("m0", "logits")]
    channel = ChannelGraph(build("gpt2"))
    only = {group: torch.zeros_like(there) for group, there in channel.edges.items()}
    only["blocks.1.k"][2, 3] = True
    assert edges.edge_names(channel, only) == [("blocks.1.attn_in:3", "blocks.1.k:2")]


def test_dangling_edges_of_components_go():
    component = ComponentGraph(build("gpt2"))
    path = {group: torch.zeros_like(there) for group, there in component.edges.items()}
    path["blocks.0.v"][1, 0] = path["logits"][0, component.sources.index("a0.h1")] = True
    dangling = {group: kept.clone() for group, kept in path.items()}
    dangling["blocks.0.q"][2, 0] = True  # a head nobody reads
    dangling["logits"][0, component.sources.index("m1")] = True  # an MLP that reads nothing
    tidy = component.connected(dangling)
    assert all(torch.equal(tidy[group], path[group]) for group in path)


def test_dangling_edges_of_channels_go_with_what_they_fed():
    model = build("sparse")
    channel = ChannelGraph(model)
    connected = channel.connected(channel.edges)
    dead = {**channel.edges, "blocks.1.mlp_act": torch.zeros_like(channel.edges["blocks.1.mlp_act"])}
    tidy = channel.connected(dead)
    assert edges.n_edges(connected) > edges.n_edges(tidy) > 0
    assert not tidy["blocks.1.mlp_out"].any(), "neurons without inputs feed nothing"
    nodes = graph.end_nodes(model, tidy)
    assert not nodes["blocks.1.mlp_act"].any()
    assert nodes["final_resid"].any()


def test_flat_and_unflat_are_opposites_and_the_top_are_the_greatest():
    channel = ChannelGraph(build("sparse"))
    n = edges.n_edges(channel.edges)
    scores = torch.randperm(n, generator=torch.Generator().manual_seed(0)).double()
    groups = edges.unflat(channel, scores)
    assert torch.equal(edges.flat(channel, groups), scores)
    top = edges.top_edges(channel, groups, 7)
    assert edges.n_edges(top) == 7
    assert (edges.flat(channel, top) == (scores >= n - 7)).all()


def test_corrupted_prompts_are_asked_for_where_there_are_none():
    component = ComponentGraph(build("gpt2"))
    data = prompts()
    without = TaskData(
        *(getattr(data, f) for f in ("name", "tokens", "last", "correct", "wrong", "positive", "prompts"))
    )
    with pytest.raises(TaskError, match="'corrupted' needs for each prompt a corrupted one of as many tokens"):
        build_ablation(component.read, "corrupted", [], without)
    with pytest.raises(TaskError, match="'mean_data' needs the corpus"):
        build_ablation(component.read, "mean_data", [], data)
    with pytest.raises(ValueError, match="split_embedding needs model.positions=learned, got concat"):
        ComponentGraph(build("sparse"), split_embedding=True)
