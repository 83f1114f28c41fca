"""Scores of edges, held to the gradient at their gates, to the whole difference they share out, and to single cuts."""

import pytest
import torch

from sparsetrain.bench.known_circuits import PROGRAMS, by_removal, load_program, named_edges
from sparsetrain.bench.made_circuits import gate, gate_data
from sparsetrain.config import RunConfig, load_config
from sparsetrain.model import Transformer
from sparsetrain.prune_config import AttributionOptions
from sparsetrain.pruning import attribution, curves, edges, evaluate, objective
from sparsetrain.pruning.ablation import build_ablation, draw_places
from sparsetrain.pruning.channel_edges import ChannelGraph
from sparsetrain.pruning.component_graph import ComponentGraph
from sparsetrain.tasks import TaskData

DENSE = ["model.abs_topk=1"]
LEARNED = ["model.positions=learned", "model.bigram=false", "model.sink=false"]
MODELS = {
    "sparse": ["model.positions=concat", "model.d_pos=4", "model.norm=rms"],
    "layer": ["model.norm=layer", "model.activation=gelu_tanh", *LEARNED, *DENSE],
    "bare": ["model.norm=none", "model.activation=relu", *LEARNED, *DENSE],
    "split": ["model.norm=rms", *LEARNED, "model.abs_topk=0.5"],
}
KINDS = ["zero", "mean_data", "mean_task", "mean_position", "resample", "corrupted"]


def build(name: str) -> Transformer:
    sizes = ["model.n_layers=2", "model.d_model=16", "model.d_head=4", "model.n_ctx=12", "sparsity.density=1"]
    options = load_config(RunConfig, [*sizes, *MODELS[name]]).model
    model = Transformer(options, 20).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.4)
    return model


def prompts() -> TaskData:
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(20, (6, 9), generator=g)
    answers = torch.randint(20, (6,), generator=g)
    corrupted = tokens.view(3, 2, 9).flip(1).reshape(6, 9)
    last = torch.tensor([8, 8, 5, 5, 7, 7])
    return TaskData("made", tokens, last, answers, (answers + 1) % 20, answers, tuple("abcdef"), corrupted)


def corpus() -> list[torch.Tensor]:
    return [torch.randint(20, (4, 12), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def component(name: str) -> ComponentGraph:
    return ComponentGraph(build(name), split_embedding=name == "split")


def slope(graph, data, ablation, metric, gate=1.0, inputs_at=1.0):
    """By autograd through the masked run: the gradient of the metric's mean at gates of one value."""
    gates = {
        group: torch.full(there.shape, gate, dtype=torch.float64).requires_grad_()
        for group, there in graph.edges.items()
    }
    places = draw_places(ablation, data.tokens, torch.Generator().manual_seed(0))
    outputs = edges.answer_logits(graph, data, gates, ablation, places, inputs_at)
    (batch,) = edges.batches(graph, data, ablation)
    value = metric(outputs, data, batch.extremes).mean()
    return dict(zip(gates, torch.autograd.grad(value, gates.values()), strict=True))


def close(ours, theirs, atol=1e-9):
    for group, score in theirs.items():
        torch.testing.assert_close(ours[group], score, rtol=1e-5, atol=atol, msg=lambda m, g=group: f"{g}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_eap_is_the_gradient_at_open_gates(name, kind):
    graph, data = component(name), prompts()
    ablation = build_ablation(graph.read, kind, corpus(), data)
    options = AttributionOptions(estimator="eap", batch_prompts=4)
    ours = attribution.rank(graph, data, ablation, objective.logit_difference, options)
    close(ours, slope(graph, data, ablation, objective.logit_difference))
    assert max(score.abs().max() for score in ours.values()) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_interpolated_inputs_by_masked_runs(name):
    """Changes of the run as it is, gradients of runs in between: shifted replacements give both at gates of 1."""
    graph, data = component(name), prompts()
    ablation = build_ablation(graph.read, "corrupted", [], data)
    options = AttributionOptions(estimator="eap_ig_inputs", ig_steps=3, batch_prompts=4)
    ours = attribution.rank(graph, data, ablation, objective.logit_difference, options)
    clean, replaced = graph.read(data.tokens), graph.read(data.corrupted)
    expected = {group: torch.zeros_like(score) for group, score in ours.items()}
    for share in (0, 1 / 3, 2 / 3):
        embedding = torch.lerp(replaced["embed"].sum(0), clean["embed"].sum(0), share)
        _, sites = graph.model.run(data.tokens, graph.write_sites, {"embed": lambda x, e=embedding: e})
        between = {source: graph.writes(source, sites) for source in graph.source_names[1:]}
        between["embed"] = torch.lerp(replaced["embed"], clean["embed"], share)
        shifted = {source: between[source] - clean[source] + replaced[source] for source in graph.source_names}
        gates = {group: g.double().requires_grad_() for group, g in edges.like(graph, 1.0).items()}
        outputs = edges.gated_logits(graph, data, gates, shifted, 1 / (2 - share))  # leaves the embedding `between`
        value = objective.logit_difference(outputs, data, None).mean() / 3
        for group, gradient in zip(gates, torch.autograd.grad(value, gates.values()), strict=True):
            expected[group] += gradient
    close(ours, expected)


def test_interpolated_activations_one_component_at_a_time():
    """Of the edges to the logits, whose gradient can be had from any run; with one step it is EAP."""
    graph, data = component("layer"), prompts()
    ablation = build_ablation(graph.read, "corrupted", [], data)
    sites = ["embed", *(f"blocks.{l}.{s}" for l in range(2) for s in ("attn_out", "mlp_out"))]
    _, start = graph.model.run(data.corrupted, sites)
    clean, replaced = graph.read(data.tokens), graph.read(data.corrupted)
    changes = torch.cat([clean[source] - replaced[source] for source in graph.source_names])
    expected = 0
    for site in sites:
        for share in (0.5, 1):
            toward = {site: lambda x, site=site, share=share: torch.lerp(start[site], x, share)}
            _, seen = graph.model.run(data.tokens, ["final_resid"], toward)
            resid = seen["final_resid"].requires_grad_()
            outputs = evaluate.logits_at_answers(graph.model, resid, data)
            value = objective.logit_difference(outputs, data, None).mean() / (2 * len(sites))
            expected += torch.einsum("nbtd,btd->n", changes, torch.autograd.grad(value, resid)[0])
    for_steps = {
        steps: attribution.rank(
            graph, data, ablation, objective.logit_difference,
            AttributionOptions(estimator="eap_ig_activations", ig_steps=steps),
        ) for steps in (1, 2)
    }  # fmt: skip
    torch.testing.assert_close(for_steps[2]["logits"][0], expected)
    eap = AttributionOptions(estimator="eap")
    close(for_steps[1], attribution.rank(graph, data, ablation, objective.logit_difference, eap))
    assert (for_steps[2]["blocks.1.q"] - for_steps[1]["blocks.1.q"]).abs().max() > 1e-5


@pytest.mark.parametrize("made", ["component", "channel"])
@pytest.mark.parametrize("metric", [objective.logit_difference, objective.kl, objective.squared_error])
def test_integrated_gates_share_out_the_whole_difference(made, metric):
    graph, data = component("layer") if made == "component" else ChannelGraph(build("layer")), prompts()
    ablation = build_ablation(graph.read, "mean_task", [], data)
    options = AttributionOptions(estimator="gates", gate_points=16, batch_prompts=4)
    total = edges.flat(graph, attribution.rank(graph, data, ablation, metric, options)).sum().item()
    (batch,) = edges.batches(graph, data, ablation)
    nothing = {group: torch.zeros_like(there) for group, there in graph.edges.items()}
    full, empty = (edges.mean_metric(graph, [batch], kept, metric) for kept in (graph.edges, nothing))
    assert total == pytest.approx(full - empty, rel=1e-3)
    assert abs(full - empty) > 4e-3, "there must be something to share out"


@pytest.mark.parametrize("estimator", ["eap", "eap_ig_inputs", "gates"])
def test_the_channel_graph_is_scored_at_its_gates(estimator):
    graph, data = ChannelGraph(build("sparse")), prompts()
    ablation = build_ablation(graph.read, "mean_data", corpus(), data)
    options = AttributionOptions(estimator=estimator, ig_steps=2, gate_points=2, batch_prompts=4)
    ours = attribution.rank(graph, data, ablation, objective.logit_difference, options)
    gauss = 0.5 / 3**0.5
    points = {
        "eap": [(1, 1)], "eap_ig_inputs": [(1, 0), (1, 0.5)], "gates": [(0.5 - gauss, 1), (0.5 + gauss, 1)],
    }[estimator]  # fmt: skip
    parts = [slope(graph, data, ablation, objective.logit_difference, *point) for point in points]
    for group, there in graph.edges.items():
        expected = sum(part[group] for part in parts) / len(parts) * there
        torch.testing.assert_close(ours[group].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("made", ["component", "channel"])
def test_exact_scores_are_what_one_cut_costs(made):
    graph, data = component("sparse") if made == "component" else ChannelGraph(build("layer")), prompts()
    ablation = build_ablation(graph.read, "zero", [], data)
    prompts_ = list(edges.batches(graph, data, ablation))
    chosen = torch.tensor([0, 7, 40])
    scores = edges.flat(graph, attribution.exact(graph, prompts_, objective.kl, chosen))
    for edge in chosen.tolist():
        kept = torch.ones(len(scores), dtype=torch.bool)
        kept[edge] = False
        outputs = edges.all_answer_logits(graph, data, edges.unflat(graph, kept), ablation)
        whole = edges.all_answer_logits(graph, data, graph.edges, ablation)
        cost = evaluate.kl_divergence(whole, outputs)
        assert scores[edge].item() == pytest.approx(cost, rel=1e-4, abs=1e-9)
    assert not scores[1:7].any(), "the others are not run"


@pytest.mark.parametrize(("program", "kind"), [("reverse", "zero"), ("hist", "corrupted"), ("length", "zero")])
def test_checked_gates_rank_every_edge_of_a_known_circuit_first(program, kind):
    model, data = load_program(PROGRAMS / f"{program}.safetensors")
    case = by_removal(ComponentGraph(model, split_embedding=True), data, kind)
    scores = attribution.rank(
        case.graph, data, case.ablation, objective.squared_error, AttributionOptions(batch_prompts=256)
    )
    top = edges.top_edges(case.graph, scores, edges.n_edges(case.edges))
    assert curves.compare(case.graph, top, case.edges)["exact"]


def test_checked_gates_see_both_branches_of_an_or():
    """Cutting either changes nothing; and a budget of one run leaves all but one edge to the gradients."""
    graph, data = ComponentGraph(gate("or"), split_embedding=True), gate_data("or")
    ablation = build_ablation(graph.read, "corrupted", [], data)
    both = named_edges(graph, [("m0", "logits"), *((f"a0.h{h}", "m0") for h in range(2)),
                               *(("tokens", f"a0.h{h}<v>") for h in range(2))])  # fmt: skip
    for runs in (1, 32):
        options = AttributionOptions(check_runs=runs)
        scores = attribution.rank(graph, data, ablation, objective.logit_difference, options)
        assert curves.auroc(graph, scores, both) == 1


def test_a_flat_metric_is_refused_by_eap_alone():
    graph, data = component("layer"), prompts()
    ablation = build_ablation(graph.read, "zero", [], data)
    for at in (graph, ChannelGraph(graph.model)):
        ablation = build_ablation(at.read, "zero", [], data)
        for metric in (objective.kl, objective.squared_error):
            with pytest.raises(ValueError, match=f"at the full model, got zero from {metric.__name__}; take"):
                attribution.rank(at, data, ablation, metric, AttributionOptions(estimator="eap"))
    options = AttributionOptions(estimator="eap_ig_activations")
    with pytest.raises(ValueError, match="must be asked for on the component graph"):
        attribution.rank(at, data, ablation, objective.kl, options)


def test_growth_takes_the_best_edge_into_what_is_reached():
    graph = ComponentGraph(gate("add"))
    scores = {group: torch.zeros(there.shape) for group, there in graph.edges.items()}
    scores["logits"][0, 4], scores["logits"][0, 1] = 3, 1  # of the MLP, and of head 0
    scores["blocks.0.mlp"][0, 2] = 2  # of head 1
    scores["blocks.0.v"][2, 0] = 9  # into head 2, which nothing reached reads
    scores["blocks.0.v"][0, 0] = 4  # into head 0
    orders = {1: {("m0", "logits")}, 2: {("a0.h1", "m0")}, 3: {("a0.h0", "logits")}, 4: {("input", "a0.h0<v>")}}
    chosen = set()
    for n, added in orders.items():
        chosen |= added
        assert set(edges.edge_names(graph, attribution.grow(graph, scores, n))) == chosen
