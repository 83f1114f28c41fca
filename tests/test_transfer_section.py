"""The section of a circuit's page on a dense model: every number it must tell, in place, and that it draws."""

import json
import re
import shutil

import pytest

from sparsetrain.analysis.circuit_page import write_page
from sparsetrain.analysis.line_chart import Line, chart
from sparsetrain.analysis.transfer_section import NOT_DEFINED, section
from sparsetrain.bridging.transfer import FORMAT, made_of
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.circuit import Circuit, load_circuit, save_circuit
from sparsetrain.pruning.evaluate import Calibration
from sparsetrain.pruning.graph import full

MADE_OF = {"circuit": "12", "bridge": "34"}
NODES = ["blocks.0.attn_in:3", "blocks.1.mlp_in:1", "final_resid:9"]


def curve(*keys, n=11):
    rising = {key: [0.1 + i / (n - 1) / 2 for i in range(n)] for key in keys}
    return {side: dict.fromkeys(("own", "other", "logit_difference"), rising)
            for side in ("both", "to_negative", "to_positive")}  # fmt: skip


def alone(name, n, ratio):
    return {
        "name": name, "nodes": [""] * n, "rise": 0.125, "random_rise": 0.0625, "random_lowest": -0.5,
        "random_highest": 0.25, "random_size": 0.0125, "ratio": ratio, "low": 8.5, "high": 11.5,
        "steepest_rise": 0.375 if n == 1 else None,
    }  # fmt: skip


@pytest.fixture
def found():
    node = {
        "site": "s", "dense_site": "d", "dense_read": "blocks.1.attn_in", "length": 1.5, "change": 0.25,
        "curve": curve("mean", "se"), "rise": 0.125, "random_rise": 0.0625, "probe_rise": 0.5, "share": 0.375,
    }  # fmt: skip
    row = {"before": 4.5, "after": 1.25, "probe": 2.5, "random": {"mean": 4.25, "lowest": 4.125, "highest": 4.375}}
    share = {"value": 0.625, "low": 0.5, "high": 0.75}
    return {
        "format": FORMAT, "made_of": MADE_OF, "counterfactual_rise": 0.5,
        "task": "single_double_quote", "circuit": "node_masks", "bridge": "dense", "dense": "<other model>",
        "n_nodes": 9, "n_prompts": 64, "n_random": 20, "alignment": "all tokens", "answers": ["'", '"<'],
        "not_transferable": {NODES[2]: "the bridge has no pair for final_resid"},
        "explained_to_dense": {"s": 0.875}, "strengths": [i / 10 for i in range(11)],
        "random_strengths": [0.0, 0.5, 1.0],
        "dense_model": {"logit_difference": 4.5, "logit_difference_se": 0.25, "accuracy": 0.875, "does_the_task": True},
        "curves": {**dict.fromkeys(("circuit", "probe", "patch"), curve("mean", "se")),
                   "random": curve("mean", "lowest", "highest", n=3)},
        "share": {**dict.fromkeys(("circuit", "probe", "patch"), share), "random": share | {"lowest": 0, "highest": 1}},
        "nodes": [node | {"node": name} for name in NODES[:2]],
        "share_inside": dict.fromkeys(("circuit", "probe", "patch", "random"), share | {"value": 0.3125}),
        "one_node": [alone(NODES[0], 1, 10.0)], "one_channel": [alone("channel 1", 4, 20.0)],
        "ablation": {"n_directions": 2, "n_text_tokens": 4096, "logit_difference": row, "text_loss": row},
    }  # fmt: skip


def test_the_section_tells_shares_controls_and_every_direction(found):
    text = section(found, MADE_OF)
    assert text.count("<strong>62.5%</strong>") == 4 and "50.0% to 75.0% over pairs; 31.2% before the last norm" in text
    assert "<strong>10.0 x random</strong>" in text and "+0.1250; by random directions +0.0625" in text
    assert "One channel of the residual stream: channel 1, 4 reads</b><strong>20.0 x random" in text
    assert text.count("8.5 to 11.5 over pairs and draws") == 2
    assert text.count("by the steepest direction of its length +0.3750") == 1  # of a node at one read
    rows = re.findall(r"<tr>((?:<td>[^<]*</td>)+)</tr>", text)
    cells = [re.findall(r"<td>([^<]*)</td>", row) for row in rows]
    assert cells == [
        [name, "blocks.1.attn_in", "0.88", "1.5", "0.25", "+0.1250", "+0.0625", "+0.5000", "+0.375"]
        for name in NODES[:2]
    ]
    assert "final_resid:9</code>: the bridge has no pair for final_resid" in text
    assert "<strong>1.250</strong><small>before 4.500; random 4.250; probe 2.500" in text
    assert text.count("<svg") == 4 + 2
    assert "&lt;other model&gt;" in text and "<other" not in text
    assert "STALE" not in text


def test_what_is_not_defined_is_said(found):
    without = {"share": None, "share_inside": None, "one_node": [alone(NODES[0], 1, None)]}
    text = section(found | without, MADE_OF)
    assert NOT_DEFINED in text and text.count("not defined") >= 5


def test_what_was_measured_by_another_version_is_not_shown(found):
    text = section({"format": "sparsetrain-transfer-1", "bridge": "dense"}, MADE_OF)
    assert "another version of sparsetrain (sparsetrain-transfer-1), so it is not shown" in text


@pytest.mark.parametrize(
    ("now", "what"),
    [
        ({"circuit": "x", "bridge": "34"}, "the circuit"),
        ({"circuit": "12", "bridge": "x"}, "the bridge"),
        ({}, "the circuit and the bridge"),
    ],
)
def test_a_section_of_another_circuit_or_bridge_says_that_it_is_stale(found, now, what):
    assert f"STALE: {what} changed since this was measured" in section(found, now)


def test_a_page_is_stale_once_the_circuit_or_the_bridge_changed(page):
    """By what their files hold, as the page reads them."""
    run = page.parents[3]
    bridge = run / "bridges" / "dense"
    assert "STALE" not in page.read_text()
    (bridge / "bridge.safetensors").write_bytes(b"another")
    assert "STALE: the bridge changed" in write_page(run, page.parent).read_text()
    (bridge / "bridge.safetensors").write_bytes(b"maps")
    assert "STALE" not in write_page(run, page.parent).read_text()
    circuit = load_circuit(page.parent)
    circuit.nodes["blocks.0.attn_in"][5] = True
    save_circuit(page.parent, circuit)
    assert "STALE: the circuit changed" in write_page(run, page.parent).read_text()


def test_a_chart_puts_its_points_where_they_are():
    drawn = chart("t", [Line("a", "#000", [0, 0.5, 1], [0, 1, 2], [0, 1, 2], [0, 1, 4])], 152, 150)
    (line,) = re.findall(r'polyline points="([^"]+)"', drawn)
    points = [tuple(map(float, point.split(","))) for point in line.split()]
    assert [x for x, _ in points] == [44, 94, 144]
    assert [y for _, y in points] == [120, 95, 70]  # of 0, 1 and 2, on the way to 4 at 20
    signed = chart("t", [Line("a", "#000", [0, 1], [-1, 1], [-1, 1], [-1, 1])], 152, 150)
    assert re.findall(r'polyline points="([^"]+)"', signed) == ["44.0,120.0 144.0,20.0"]
    assert ">0</text>" in signed and ">-1</text>" in signed


@pytest.fixture
def page(found, tiny_run, tmp_path):
    """A circuit's page in a copy of a run where a transfer has been made."""
    import sparsetrain

    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    settings = {"prune": {"seed": 0}, "run": "tiny", "task": "single_double_quote"}
    nodes = {site: mask & False for site, mask in full(sparsetrain.load(run)[0]).items()}
    for name in NODES:
        nodes[name.split(":")[0]][int(name.split(":")[1])] = True
    circuit = Circuit("single_double_quote", "node_masks", "channel", nodes, [], Ablation("zero", {}), Calibration(),
                      settings=settings)  # fmt: skip
    folder = run / "circuits" / "single_double_quote" / "node_masks"
    save_circuit(folder, circuit)
    without = write_page(run, folder).read_text()
    assert '<section class="transfer">' not in without
    bridge = run / "bridges" / "dense"
    there = bridge / "transfer" / "single_double_quote" / "node_masks"
    there.mkdir(parents=True)
    (bridge / "report.json").write_text("{}")
    (bridge / "bridge.safetensors").write_bytes(b"maps")
    (there / "transfer.json").write_text(json.dumps(found | {"made_of": made_of(folder, bridge)}))
    return write_page(run, folder)


@pytest.mark.browser
def test_the_page_shows_the_section_offline(page, open_page):
    tab = open_page(page, ".transfer svg polyline")
    boxes = [chart.bounding_box() for chart in tab.locator(".transfer svg").all()]
    assert len(boxes) == 6 and all(box["width"] > 200 and box["height"] > 100 for box in boxes)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1200
