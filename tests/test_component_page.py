"""The page of heads and MLPs: what it says without a browser, and that it draws and answers in one."""

import re

import pytest
import torch

import sparsetrain
from sparsetrain.analysis.circuit_page import write_page
from sparsetrain.analysis.component_page import last_attention
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.circuit import Circuit, list_edges, save_circuit
from sparsetrain.pruning.component_graph import ComponentGraph
from sparsetrain.pruning.evaluate import Calibration
from sparsetrain.pruning.space import EdgeSpace
from sparsetrain.tasks import encode_task, load_task


@pytest.fixture(scope="module")
def circuit(tiny_run) -> Circuit:
    graph = ComponentGraph(sparsetrain.load(tiny_run)[0])
    kept = {group: torch.zeros_like(there) for group, there in graph.edges.items()}
    kept["blocks.0.v"][1, 0] = kept["blocks.0.mlp"][0, 2] = kept["blocks.1.q"][3, 5] = kept["logits"][0, 9] = True
    scores = {group: torch.arange(there.numel()).view(there.shape) - 2.0 for group, there in graph.edges.items()}
    edges = list_edges(graph, kept, scores)
    settings = {"prune": {"seed": 0}, "run": "tiny", "task": "single_double_quote"}
    return Circuit(
        "single_double_quote", "attribution", "component", EdgeSpace(graph).nodes(kept), edges, Ablation("zero", {}),
        Calibration(), scores, {edges[0].name: 0.25}, {"n_nodes": 6, "n_edges": 4, "graph": "component"}, settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(circuit, tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("component") / "circuit"
    save_circuit(folder, circuit)
    return write_page(tiny_run, folder)


def test_the_page_names_every_edge_with_its_score_and_effect(page, circuit):
    text = page.read_text()
    rows = re.findall(
        r"<tr><td><code>(.*?)</code></td><td><code>(.*?)</code></td><td[^>]*>(.*?)</td><td>(.*?)</td>", text
    )
    assert {(a, b.replace("&lt;", "<").replace("&gt;", ">")) for a, b, _, _ in rows} == {
        (edge.source, edge.target) for edge in circuit.edges
    }
    first = circuit.edges[0]
    assert (first.source, "a0.h1&lt;v&gt;", f"{first.score:.3g}", "0.25") in rows


def test_the_same_circuit_gives_the_same_page(page, tiny_run):
    before = page.read_bytes()
    assert write_page(tiny_run, page.parent).read_bytes() == before


def test_attention_is_that_of_the_model(tiny_run):
    """By hand from queries and keys; with a sink the rest goes there."""
    model, tokenizer = sparsetrain.load(tiny_run)
    data = encode_task(load_task("single_double_quote"), tokenizer, 2, "heldout", 0, 64)
    weights = last_attention(model, data)[1]
    _, seen = model.run(data.tokens, read=["blocks.1.q", "blocks.1.k", "blocks.1.v", "blocks.1.z"])
    v = seen["blocks.1.v"].unflatten(-1, (-1, model.options.d_head))
    z = torch.einsum("nht,nthk->nhk", weights, v).flatten(1)
    torch.testing.assert_close(z, seen["blocks.1.z"][torch.arange(len(data)), data.end], rtol=1e-4, atol=1e-5)
    assert (weights.sum(-1) <= 1 + 1e-6).all()


@pytest.mark.browser
def test_the_page_draws_and_answers_offline(page, open_page):
    tab = open_page(page)
    assert tab.locator("#picture canvas").count() >= 1
    edges = "Bokeh.documents[0].get_model_by_name('edges').data.alpha"
    before = tab.evaluate(f"[...{edges}]")
    tab.evaluate("Bokeh.documents[0].get_model_by_name('nodes').selected.indices = [0]")
    after = tab.evaluate(f"[...{edges}]")
    assert after != before and min(after) < 0.1, "the edges of other components fade"
    tab.evaluate("Bokeh.documents[0].get_model_by_name('nodes').selected.indices = []")
    assert tab.evaluate(f"[...{edges}]") == before
