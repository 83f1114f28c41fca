"""The circuit page: its layout, its data, and what a reader can do with it in a browser."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsetrain.analysis import snippets
from sparsetrain.analysis.circuit_data import FORMAT
from sparsetrain.analysis.circuit_layout import channel_of, site_of
from sparsetrain.analysis.circuit_page import write_page
from sparsetrain.analysis.readings import cautions, readings
from sparsetrain.checkpoint import load_run
from sparsetrain.files import WriteError
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.channel_edges import ChannelGraph
from sparsetrain.pruning.circuit import Circuit, list_edges, load_circuit, save_circuit
from sparsetrain.pruning.evaluate import Calibration
from sparsetrain.pruning.graph import kept_edges, node_sites, without_dangling
from sparsetrain.tasks import encode_task, load_task

MEASURES = {
    "task_loss": 0.2, "task_accuracy": 0.9, "task_loss_uncalibrated": 0.5, "n_nodes": 40, "n_edges": 80, "kl": 0.5,
    "agreement": 0.95, "completeness_loss": 1.1, "random_ablation_loss": 0.12, "random_ablation_loss_std": 0.02,
    "random_circuit_loss": 0.68, "full_model_loss": 0.1, "full_model_loss_calibrated": 0.08, "n_dangling": 0,
    "full_model_accuracy": 0.97, "target_loss": 0.25,
    "train_loss": 0.19, "chance_loss": 0.693,
    "nonsense": {"answers": [" a", " b"], "reached": True, "task_loss": 0.24, "task_accuracy": 0.9, "n_nodes": 400,
                 "n_edges": 900, "full_model_loss": 1.4},
}  # fmt: skip


def test_snippets_are_the_highest_peaks_of_both_signs():
    found = torch.zeros(4, 30)
    found[0, 3], found[1, 29], found[2, 10], found[2, 11] = 0.5, 2.0, -1.0, 0.25
    seen = snippets.on_corpus(found)
    assert [(s["window"], s["start"], s["peak"]) for s in seen["positive"]] == [(1, 6, 23), (0, 0, 3), (2, 0, 11)]
    assert seen["positive"][0]["values"] == [0] * 23 + [2.0]
    assert [(s["window"], s["values"][s["peak"]]) for s in seen["negative"]] == [(2, -1.0)]
    assert seen["active"] == pytest.approx(4 / 120, rel=0.01)
    assert snippets.on_prompts(found[:2], torch.tensor([4, 2])) == [[0, 0, 0, 0.5, 0], [0, 0, 0]]


def test_every_measure_has_a_row_and_missing_ones_have_none():
    rows = {row.label: row for row in readings(MEASURES)}
    assert len(rows) == 8
    assert rows["Task loss"].value == "0.200"
    assert "0.120 ± 0.020" in rows["Loss without it"].control
    assert "' a'" in rows["Nonsense control"].meaning
    assert readings({}) == []
    assert [row.label for row in readings({"n_nodes": 1, "n_edges": 0})] == ["Nodes / edges"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"task_loss": 0.3}, "not on held-out ones"),
        ({"task_loss": 0.05}, "learnt by choosing what is kept"),
        ({"task_loss_uncalibrated": 0.8}, "was fitted"),
        ({"completeness_loss": 0.15}, "the model does not need it"),
        ({"n_dangling": 2}, "2 of the nodes lie on no path"),
        ({"kl": 1.5}, "not the model's prediction"),
        ({"nonsense": MEASURES["nonsense"] | {"n_nodes": 40}}, "says nothing about how"),
        ({"units": "edges", "nonsense": MEASURES["nonsense"] | {"n_edges": 80}}, "says nothing about how"),
    ],
)
def test_each_caution_is_given_where_it_is_due(changed, said):
    assert cautions(MEASURES) == []
    [caution] = cautions(MEASURES | changed)
    assert said in caution


def test_a_model_at_chance_is_said_to_have_no_circuit_to_be_faithful_to():
    assert not any("near chance" in caution for caution in cautions(MEASURES | {"full_model_loss_calibrated": 0.6}))
    assert any("near chance" in caution for caution in cautions(MEASURES | {"full_model_loss_calibrated": 0.69}))


def test_a_circuit_of_a_given_size_claims_no_target_that_it_missed():
    """It was cut at its size, whatever its loss, and not cleaned."""
    sized = MEASURES | {"size": 12, "units": "edges", "task_loss": 0.69, "train_loss": 0.68, "n_dangling": 1}
    missed, needed, dangles = cautions(sized | {"completeness_loss": 0.1, "task_loss_uncalibrated": 0.8})
    assert missed.startswith("A circuit of 12 edges, as it was asked for, misses the target of 0.25: 0.680 on")
    assert "can do the task" not in needed
    assert dangles.startswith("1 of the edges lies on no path") and "target" not in dangles
    [caution] = cautions(sized | {"train_loss": 0.2, "n_dangling": 0})
    assert "not on held-out ones" in caution


def test_a_loss_that_is_the_models_as_shown_is_not_called_less():
    assert cautions(MEASURES | {"task_loss": 1e-5, "full_model_loss_calibrated": 2e-5}) == []


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory) -> Path:
    """A circuit of the tiny run, for a task whose prompts would end a script element."""
    root = tmp_path_factory.mktemp("circuit")
    task = root / "closing_tag.jsonl"
    rows = [
        {"positive": f"{name} = '</script><!--'\nself", "negative": f"{name} = '</script><!--'\ndef",
         "positive_answer": ".", "negative_answer": " "}
        for name in ("name", "path", "data", "value", "key", "line", "text", "file", "node", "code", "func", "args")
    ]  # fmt: skip
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, _, config = load_run(tiny_run)
    generator = torch.Generator().manual_seed(0)
    sites = node_sites(config.model)
    drawn = {s: torch.rand(n, generator=generator) < 0.4 for s, n in sites.items()}
    for layer in range(config.model.n_layers):
        drawn[f"blocks.{layer}.k"] = drawn[f"blocks.{layer}.q"]
    nodes = without_dangling(model, drawn)
    ablation = Ablation("mean_data", {s: torch.rand(n, generator=generator) for s, n in sites.items()})
    edges = list_edges(ChannelGraph(model), kept_edges(model, nodes))
    circuit = Circuit("closing_tag", "by_hand", "channel", nodes, edges, ablation, Calibration())
    effects = {name: i / 100 for i, name in enumerate(circuit.node_names())}
    settings = {"prune": {"seed": 0}, "run": "shared", "task": str(task)}
    circuit = Circuit(**vars(circuit) | {"effects": effects, "measures": MEASURES, "settings": settings})
    save_circuit(root / "saved", circuit)
    write_page(tiny_run, root / "saved")
    return root / "saved"


def block(folder: Path, name: str) -> dict:
    page = (folder / "circuit.html").read_text(encoding="utf-8")
    [found] = re.findall(rf'<script type="application/json" id="{name}">(.*?)</script>', page)
    return json.loads(found)


def test_the_data_is_the_circuits(folder):
    circuit, data = load_circuit(folder), block(folder, "page-data")
    assert data["format"] == FORMAT
    assert [n["name"] for n in data["nodes"]] == circuit.node_names()
    names = [point["name"] for point in [*data["nodes"], *data["marks"]]]
    edges = [(names[a], names[b], weight) for a, b, weight in data["edges"]]
    assert edges == [(e.source, e.target, pytest.approx(e.weight, rel=5e-3)) for e in circuit.edges]
    assert [n["effect"] for n in data["nodes"]] == list(circuit.effects.values())
    assert data["measures"] == circuit.measures
    assert len(names) == len(set(names))


def test_links_go_from_a_write_to_later_reads_of_its_channel(folder):
    data = block(folder, "page-data")
    names = [point["name"] for point in [*data["nodes"], *data["marks"]]]
    order = ["embed", *load_circuit(folder).nodes]
    found = {(names[a], names[b]) for a, b, kind, _ in data["links"] if kind == "residual"}
    wanted = {
        (a, b)
        for a in names
        for b in names
        if a.startswith(("embed", "blocks.0.attn_out", "blocks.0.mlp_out", "blocks.1.attn_out", "blocks.1.mlp_out"))
        and (b.startswith("final_resid") or site_of(b).endswith("_in"))
        and channel_of(a) == channel_of(b)
        and order.index(site_of(a)) < order.index(site_of(b))
    }
    assert found == wanted
    assert found
    pairs = [(names[a], names[b]) for a, b, kind, _ in data["links"] if kind == "qk"]
    assert pairs
    assert all(b == a.replace(".q:", ".k:") for a, b in pairs)


def test_activations_are_the_full_models(folder, tiny_run):
    model, tokenizer, config = load_run(tiny_run)
    task = load_task(load_circuit(folder).settings["task"])
    prompts = encode_task(task, tokenizer, 4, "heldout", 0, config.model.n_ctx)
    data = block(folder, "page-data")
    for node in data["nodes"][:: len(data["nodes"]) // 5]:
        site = site_of(node["name"])
        channel = model.run(prompts.tokens, read=[site])[1][site][..., channel_of(node["name"])]
        for row, last, shown in zip(channel, prompts.last.tolist(), node["prompts"], strict=True):
            assert shown == pytest.approx(row[: last + 1].tolist(), rel=5e-3, abs=1e-6)
    shown = ["".join(prompt["tokens"]) for prompt in data["prompts"]]
    assert shown == list(prompts.prompts)
    assert all("</script>" in text for text in shown)


def test_nothing_in_the_data_ends_its_script_element(folder):
    page = (folder / "circuit.html").read_text(encoding="utf-8")
    for name in ("page-data", "figure-data"):
        inside = page.split(f'id="{name}">', 1)[1].split("</script>", 1)[0]
        assert "<" not in inside
        assert json.loads(inside)


def test_the_page_is_the_same_each_time(folder, tiny_run):
    before = (folder / "circuit.html").read_bytes()
    assert write_page(tiny_run, folder).read_bytes() == before


def test_the_page_is_written_whole_or_not_at_all(folder, tiny_run, monkeypatch):
    page = folder / "circuit.html"
    whole = page.read_bytes()
    page.write_text("an older page")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(WriteError, match="disk full; what was there before is untouched"):
        write_page(tiny_run, folder)
    assert page.read_text() == "an older page"
    assert {f.name for f in folder.iterdir()} == {"circuit.html", "circuit.json", "masks.safetensors", "metrics.json"}
    page.write_bytes(whole)


def test_a_circuit_without_nodes_has_a_page(folder, tiny_run, tmp_path):
    circuit = load_circuit(folder)
    nodes = {site: torch.zeros_like(mask) for site, mask in circuit.nodes.items()}
    save_circuit(tmp_path / "empty", Circuit(**vars(circuit) | {"nodes": nodes, "edges": [], "effects": {}}))
    write_page(tiny_run, tmp_path / "empty")
    assert block(tmp_path / "empty", "page-data")["nodes"] == []


@pytest.fixture
def page(open_page, folder):
    return open_page(folder / "circuit.html", width=1400)


def click_node(page, name: str) -> None:
    """Move the mouse to where Bokeh has drawn a node, and click."""
    page.evaluate("document.getElementById('picture').scrollIntoView()")
    place = page.evaluate(
        """(name) => {
            const plot = Bokeh.documents[0].roots()[0];
            const view = Bokeh.index.get_by_id(plot.id);
            const points = Bokeh.documents[0].get_model_by_name("nodes").data;
            const i = points.name.indexOf(name);
            const { x_scale, y_scale } = view.frame;
            const canvas = view.canvas_view.el.getBoundingClientRect();
            return [canvas.x + x_scale.compute(points.x[i]), canvas.y + y_scale.compute(points.y[i])];
        }""",
        name,
    )
    page.mouse.click(*place)


def busiest(data: dict) -> tuple[str, list[str], list[str]]:
    """The node with most edges of its lesser side, with the names of what comes in and what goes out."""
    ends = [([a for a, b, _ in data["edges"] if b == i], [b for a, b, _ in data["edges"] if a == i])
            for i in range(len(data["nodes"]))]  # fmt: skip
    i = max(range(len(ends)), key=lambda i: min(map(len, ends[i])))
    name = lambda j: data["nodes"][j]["name"]  # noqa: E731
    return name(i), [name(j) for j in ends[i][0]], [name(j) for j in ends[i][1]]


@pytest.mark.browser
def test_the_figure_holds_every_node_and_edge(page, folder):
    circuit = load_circuit(folder)
    models = """() => ["nodes", "edges"].map((name) => {
        const columns = Bokeh.documents[0].get_model_by_name(name).data;
        return Array.from(columns.name ?? columns.weight);
    })"""
    nodes, weights = page.evaluate(models)
    assert nodes == circuit.node_names()
    assert weights == pytest.approx([e.weight for e in circuit.edges], rel=5e-3)
    counts = page.evaluate(
        """() => {
            const data = JSON.parse(document.getElementById("page-data").textContent);
            return [data.nodes.length, data.edges.length];
        }"""
    )
    assert counts == [len(circuit.node_names()), len(circuit.edges)]
    assert page.locator("#measures .tile").count() == 8
    assert "closing_tag" in page.inner_text("h1")
    assert "null" not in page.inner_text("#header")


@pytest.mark.browser
def test_a_click_shows_a_node_and_a_row_leads_to_the_next(page, folder):
    data = block(folder, "page-data")
    name, before, after = busiest(data)
    click_node(page, name)
    page.wait_for_selector("#chosen")
    node = next(n for n in data["nodes"] if n["name"] == name)
    panel = page.inner_text("#panel")
    assert page.inner_text("#chosen") == name
    assert node["words"] in panel
    assert f"Incoming edges ({len(before)})" in panel
    assert f"Outgoing edges ({len(after)})" in panel
    assert "</script>" in panel
    assert page.locator(".pairs .heat").count() == 8
    page.click(f'#panel .row[data-node="{after[0]}"]')
    page.wait_for_function("(name) => document.getElementById('chosen').innerText === name", arg=after[0])
    click_node(page, name)
    page.wait_for_function("(name) => document.getElementById('chosen').innerText === name", arg=name)
    page.keyboard.press("Escape")
    page.wait_for_selector("#chosen", state="detached")


@pytest.mark.browser
def test_search_table_and_filter(page, folder):
    data = block(folder, "page-data")
    first = data["nodes"][0]["name"]
    page.fill("#search", first)
    page.press("#search", "Enter")
    assert page.inner_text("#chosen") == first
    page.click("#all_nodes summary")
    rows = page.locator("#all_nodes tbody tr")
    assert rows.count() == len(data["nodes"])
    rows.nth(0).locator("button").press("Enter")
    assert page.inner_text("#chosen") == max(data["nodes"], key=lambda n: n["effect"])["name"]
    page.locator("#threshold").evaluate("(slider) => { slider.value = 50; slider.dispatchEvent(new Event('input')); }")
    shown = page.evaluate("() => Bokeh.documents[0].get_model_by_name('edges_shown').indices.length")
    assert shown == pytest.approx(len(data["edges"]) / 2, abs=3)
    assert page.inner_text("#n_shown").startswith(f"{shown} of {len(data['edges'])} edges")
    page.uncheck("#links")
    assert page.evaluate("() => Bokeh.documents[0].get_model_by_name('links_drawn').visible") is False


@pytest.mark.browser
def test_the_python_of_a_node_runs(page, folder):
    data = block(folder, "page-data")
    node = next(n for n in data["nodes"] if any(n["prompts"][0]))
    page.evaluate("(name) => { location.hash = name; }", node["name"])
    page.wait_for_selector("#chosen")
    code = page.locator("pre.python").text_content()
    found = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(activation[0].tolist())"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == pytest.approx(node["prompts"][0], rel=5e-3, abs=1e-6)
