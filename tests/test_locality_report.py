"""What `sparsetrain locality` writes and says: measures, tables, the page, errors."""

import json
import shutil

import numpy as np
import pytest
import torch

from sparsetrain.analysis.locality_report import numbers, run_circuits, write_report
from sparsetrain.analysis.locality_text import reading, report_text
from sparsetrain.analysis.sheet_page import write_sheet
from sparsetrain.checkpoint import load_run, load_sparse
from sparsetrain.cli import main
from sparsetrain.locality.circuit_measures import wiring_measures
from sparsetrain.locality.measures import mean_length
from sparsetrain.locality.positions import LocalityError, from_tensors
from sparsetrain.locality.run import open_run
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.channel_edges import ChannelGraph
from sparsetrain.pruning.circuit import Circuit, CircuitError, list_edges, save_circuit
from sparsetrain.pruning.evaluate import Calibration
from sparsetrain.pruning.graph import kept_edges, node_sites, without_dangling

MEASURES = {"task_loss": 0.1, "logit_difference": 1.5, "full_model_logit_difference": 4.0}


def circuit_of(model, seed, share=0.4):
    generator = torch.Generator().manual_seed(seed)
    drawn = {s: torch.rand(n, generator=generator) < share for s, n in node_sites(model.options).items()}
    for layer in range(model.options.n_layers):
        drawn[f"blocks.{layer}.k"] = drawn[f"blocks.{layer}.q"]
    nodes = without_dangling(model, drawn)
    edges = list_edges(ChannelGraph(model), kept_edges(model, nodes))
    settings = {"prune": {"seed": 0}, "run": "run", "task": "t", "cost": {"seconds": 12.5, "peak_bytes": 2**20}}
    return Circuit("t", "by_hand", "channel", nodes, edges, Ablation("zero", {}), Calibration(), measures=MEASURES,
                   settings=settings)  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A run with two circuits of channels, one of components and one without edges."""
    copied = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(tiny_run, copied, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "circuits"))
    model = load_run(copied)[0]
    for task, name, seed in (("one", "first", 0), ("two", "second", 1)):
        save_circuit(copied / "circuits" / task / name, circuit_of(model, seed))
    save_circuit(copied / "circuits" / "two" / "empty", circuit_of(model, 1, share=0))
    components = Circuit(**vars(circuit_of(model, 1, share=0)) | {"graph": "component", "nodes": {}})
    save_circuit(copied / "circuits" / "two" / "components", components)
    return copied


@pytest.fixture(scope="module")
def found(run):
    return write_report(run, run_circuits(run), named=False)


def test_the_file_holds_the_measures_and_the_layout_they_are_of(run, found):
    assert json.loads((run / "locality" / "measures.json").read_text()) == json.loads(json.dumps(found))
    laid = open_run(run)
    layout = from_tensors(laid.plan, load_sparse(run / "locality" / "layout.safetensors"))
    assert found["layout"] == "afterwards"
    assert found["length"]["length"] == mean_length(laid.edges, layout) == found["relayout"]["length"]
    assert len(found["length"]["null"]) == 3
    assert found["relayout"]["ratio"] == pytest.approx(found["length"]["ratio"])
    assert found["index_order"]["length"] > 1.1 * found["length"]["length"]
    assert sum(found["length"]["histogram"]) == pytest.approx(1)
    assert found["n_edges"] == sum(map(len, laid.edges))


def test_circuits_are_measured_where_they_have_a_place(run, found):
    assert set(found["circuits"]) == {"one/first", "two/second"}
    assert "component graph" in found["skipped"]["two/components"]
    assert "got 0 of which 0" in found["skipped"]["two/empty"]
    laid, circuit = open_run(run), run_circuits(run)["one/first"]
    ends = [(e.source, e.target) for e in circuit.edges]
    ours = found["circuits"]["one/first"]
    assert ours["wiring"] == wiring_measures(ends, laid.edges, laid.layout)
    assert (ours["n_nodes"], ours["n_edges"]) == (len(circuit.node_names()), len(circuit.edges))
    [overlap] = found["overlaps"]
    assert (overlap["a"], overlap["b"]) == ("one/first", "two/second") and 0 < overlap["shared"] < 1


def test_the_measures_of_discovery_name_their_sources(run, found):
    costs, summary = found["discovery"], json.loads((run / "summary.json").read_text())
    assert costs["run"]["training_seconds"] == summary["seconds"]
    assert costs["run"]["training_peak_bytes"] == summary["peak_bytes"] > 2**20
    assert costs["run"]["inference_milliseconds"] > 0
    assert costs["circuits"]["one/first"]["logit_difference_gap"] == 2.5
    assert costs["circuits"]["one/first"]["discovery_seconds"] == 12.5
    named = {key for row in (costs["run"], *costs["circuits"].values()) for key in row}
    assert named == set(costs["sources"])


def test_the_numbers_for_a_sweep_are_those_of_the_report(run, found, tiny_run):
    told = numbers(run)
    circuits = found["circuits"].values()
    assert told["wire_length"] == found["length"]["length"] and told["modularity"] == found["modularity"]["q"]
    assert told["circuit_edge_share"] == np.mean([c["wiring"]["edge_share"] for c in circuits])
    ratios = [c["spread"]["distance"] / c["spread"]["random_distance"] for c in circuits]
    assert told["circuit_distance"] == pytest.approx(np.mean(ratios)) and len(ratios) == 2
    assert told["logit_difference_gap"] == 2.5
    bare = numbers(shutil.copytree(tiny_run, run.parent / "bare", ignore=shutil.ignore_patterns("circuits")))
    assert bare["wire_length"] == told["wire_length"] and bare["circuit_span"] is None


def test_the_tables_show_all_of_it(found):
    text = report_text(found)
    length, q = found["length"], found["modularity"]
    for shown in (f"{length['length']:.4f}", f"{length['ratio']:.3f}", f"{np.mean(length['null']):.4f}",
                  f"z {q['z']:.1f}", "one/first", "left out: two/components", "discovery_seconds"):  # fmt: skip
        assert shown in text
    assert reading(found) in text
    kept = report_text({**found, "layout": "kept"})
    assert "the layout kept with the model" in kept and "laid out after the fact" in kept
    local = {**found, "length": {**length, "length": 0.1, "ratio": 0.5}}
    assert "The wires are 50.0% shorter than those of shuffled models" in reading(local)
    assert "nothing local" in reading({**found, "length": {**length, "length": max(length["null"])}})


def test_a_task_or_names_choose_circuits(run):
    assert set(run_circuits(run, task="one")) == {"one/first"}
    assert set(run_circuits(run, names=["second", "first"])) == {"one/first", "two/second"}
    with pytest.raises(CircuitError, match=r"which are one/first, .*, got --circuit third$"):
        run_circuits(run, names=["first", "third"])
    with pytest.raises(CircuitError, match=r"got --circuit first of --task two$"):
        run_circuits(run, "two", ["first"])
    with pytest.raises(CircuitError, match=r"got --task three$"):
        run_circuits(run, "three")


def test_a_named_circuit_of_components_is_an_error_that_changes_nothing(run, found, capsys):
    before = (run / "locality" / "measures.json").read_bytes()
    with pytest.raises(LocalityError, match="two/components: a circuit must be of the channel graph"):
        write_report(run, run_circuits(run, names=["components"]), named=True)
    assert main(["locality", str(run), "--circuit", "third"]) == 1
    assert capsys.readouterr().err.startswith("error: circuits must be among those of")
    assert (run / "locality" / "measures.json").read_bytes() == before


def test_export_says_what_it_leaves_behind(run, tmp_path, capsys):
    assert main(["locality", str(run), "--export", str(tmp_path / "new")]) == 0
    assert "circuits were left behind" in capsys.readouterr().out
    assert main(["locality", str(run), "--export", str(tmp_path / "new")]) == 1
    assert "which exists; name another" in capsys.readouterr().err


def test_the_page_is_the_same_each_time_and_nothing_in_its_data_ends_a_script(run, found):
    page = run / "locality" / "sheet.html"
    before, circuits = page.read_bytes(), run_circuits(run)
    shown = {name: circuits[name] for name in found["circuits"]}
    write_sheet(page, open_run(run), json.loads((run / "locality" / "measures.json").read_text()), shown)
    assert page.read_bytes() == before
    inside = page.read_text(encoding="utf-8").split('id="figure-data">', 1)[1].split("</script>", 1)[0]
    assert "<" not in inside and json.loads(inside)


HOVER = """() => {
    const plot = Bokeh.documents[0].get_model_by_name("layout");
    const view = Bokeh.index.find_one_by_id(plot.id);
    const nodes = Bokeh.documents[0].get_model_by_name("nodes").data;
    const i = nodes.name.indexOf("residual:7");
    const canvas = view.canvas_view.el.getBoundingClientRect();
    const { x_scale, y_scale } = view.frame;
    const [x, y] = [x_scale.compute(nodes.x_layout[i]), y_scale.compute(nodes.y_layout[i])];
    return [nodes.name[i], canvas.x + x, canvas.y + y];
}"""  # where a node is drawn


@pytest.mark.browser
def test_the_page_draws_offline_and_lights_up_a_circuit(run, found, open_page):
    page = open_page(run / "locality" / "sheet.html", width=1300)
    model = lambda name: f"Bokeh.documents[0].get_model_by_name('{name}')"  # noqa: E731
    assert page.locator("#picture canvas").count() >= 3
    wires = page.evaluate(f"{model('wires')}.data.opacity.length")
    assert page.evaluate(f"{model('wires_shown')}.indices.length") == wires <= 3000
    bright = page.evaluate(f"Math.max(...{model('wires')}.data.alpha)")
    page.evaluate("document.getElementById('picture').scrollIntoView()")
    name, *place = page.evaluate(HOVER)
    page.mouse.move(*place)
    page.wait_for_selector(f"text={name}")
    page.evaluate(f"{model('circuit')}.value = 'one/first'")
    assert page.evaluate(f"Math.max(...{model('wires')}.data.alpha)") < 0.3 * bright
    shown = page.evaluate(f"{model('dots_shown')}.indices.map((i) => {model('dots')}.data.name[i])")
    circuit = run_circuits(run)["one/first"]
    assert shown == circuit.node_names()
    pairs = page.evaluate(
        f"{model('lit_shown')}.indices.map((i) => [{model('lit')}.data.source[i], {model('lit')}.data.target[i]])"
    )
    assert {tuple(pair) for pair in pairs} >= {(e.source, e.target) for e in circuit.edges}
    page.evaluate(f"{model('share')}.value = 10")
    assert page.evaluate(f"{model('wires_shown')}.indices.length") == pytest.approx(wires / 10, abs=1)
    assert page.locator("#circuits tbody tr").count() == 2
