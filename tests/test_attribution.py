"""Scores of edges, held to the gradient at their gates, to the whole difference they share out, and to single cuts."""

import pytest
import torch

from sparsetrain.config import AttributionOptions, RunConfig, load_config
from sparsetrain.model import Transformer
from sparsetrain.pruning import attribution, edges, objective
from sparsetrain.pruning.ablation import build_ablation, draw_places
from sparsetrain.pruning.component_graph import ComponentGraph
from sparsetrain.tasks import TaskData

TOPK = ["attn_in", "q", "k", "v", "attn_out", "mlp_in", "mlp_act", "mlp_out"]
DENSE = [f"model.abs_topk.{site}=1" for site in TOPK]
LEARNED = ["model.positions=learned", "model.bigram=false", "model.sink=false"]
MODELS = {
    "sparse": ["model.positions=concat", "model.d_pos=4", "model.norm=rms"],
    "layer": ["model.norm=layer", "model.activation=gelu_tanh", *LEARNED, *DENSE],
    "bare": ["model.norm=none", "model.activation=relu", *LEARNED, *DENSE],
    "split": ["model.norm=rms", *LEARNED, *(f"model.abs_topk.{site}=0.5" for site in TOPK)],
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
