"""Circuit files: what is not whole or not ours is refused in words."""

import dataclasses
import json

import pytest
import torch

from sparsetrain.cli import main
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.circuit import Circuit, CircuitError, Edge, load_circuit, overlaps, save_circuit
from sparsetrain.pruning.evaluate import Calibration


@pytest.fixture
def circuit() -> Circuit:
    sites = {"blocks.0.mlp_in": 3, "blocks.0.mlp_act": 4, "final_resid": 3}
    nodes = {s: torch.zeros(n, dtype=torch.bool) for s, n in sites.items()}
    nodes["blocks.0.mlp_in"][2] = nodes["blocks.0.mlp_act"][1] = True
    ablation = Ablation("mean_data", {s: torch.randn(n) for s, n in sites.items()})
    edges = [Edge("blocks.0.mlp_in:2", "blocks.0.mlp_act:1", "blocks.0.mlp.up.weight", 0.5)]
    return Circuit(
        "made", "node_masks", "channel", nodes, edges, ablation, Calibration(2.0, -1.0),
        ranking={site: torch.randn(n) for site, n in sites.items()}, measures={"kl": 1.5}, settings={"run": "x"},
        effects={"blocks.0.mlp_in:2": 0.25, "blocks.0.mlp_in:2->blocks.0.mlp_act:1": -0.5},
    )  # fmt: skip


def test_a_circuit_reads_back_as_it_was(circuit, tmp_path):
    save_circuit(tmp_path / "c", circuit)
    read = load_circuit(tmp_path / "c")
    assert read.node_names() == ["blocks.0.mlp_in:2", "blocks.0.mlp_act:1"]
    for name in ("task", "method", "graph", "edges", "calibration", "effects", "measures", "settings"):
        assert getattr(read, name) == getattr(circuit, name), name
    assert all(torch.equal(read.ablation.values[s], v) for s, v in circuit.ablation.values.items())
    assert all(torch.equal(read.ranking[s], v) for s, v in circuit.ranking.items())


def test_damaged_and_foreign_files_are_refused(circuit, tmp_path):
    save_circuit(tmp_path / "c", circuit)
    file = tmp_path / "c" / "circuit.json"
    whole = json.loads(file.read_text())
    for content, words in (
        ("{", "must hold circuit.json and masks.safetensors"),
        (json.dumps({**whole, "format": "other"}), "must have the format sparsetrain-circuit-2; prune again"),
        (json.dumps({**whole, "sites": ["blocks.9.q"]}), "holds a damaged circuit"),
        (json.dumps({k: v for k, v in whole.items() if k != "edges"}), "holds a damaged circuit: KeyError 'edges'"),
    ):
        file.write_text(content)
        with pytest.raises(CircuitError, match=words):
            load_circuit(tmp_path / "c")
    file.write_text(json.dumps(whole))
    (tmp_path / "c" / "masks.safetensors").write_bytes(b"short")
    with pytest.raises(CircuitError, match="must hold circuit.json and masks.safetensors"):
        load_circuit(tmp_path / "c")


def test_overlaps_are_shares_of_what_is_in_either(circuit):
    other = dataclasses.replace(circuit, edges=[], nodes={s: m.clone() for s, m in circuit.nodes.items()})
    other.nodes["final_resid"][0] = True
    found = overlaps({"a": circuit, "b": other, "c": circuit})
    assert found == {("a", "b"): (2 / 3, 0.0), ("a", "c"): (1.0, 1.0), ("b", "c"): (2 / 3, 0.0)}
    with pytest.raises(CircuitError, match="must be two or more, of one graph, got a: channel"):
        overlaps({"a": circuit})
    with pytest.raises(CircuitError, match="got a: channel, b: component"):
        overlaps({"a": circuit, "b": dataclasses.replace(circuit, graph="component")})
    wider = dataclasses.replace(circuit, nodes={**circuit.nodes, "final_resid": torch.zeros(4, dtype=torch.bool)})
    with pytest.raises(CircuitError, match="must be of models of one shape, got other numbers .* in c than in a"):
        overlaps({"a": circuit, "b": other, "c": wider})


def test_overlap_says_where_circuits_are_of_other_weights(circuit, tmp_path, capsys):
    for name, settings in {"a": {"model": "1"}, "b": {"model": "1"}, "seed": {"model": "2"}, "old": {}}.items():
        save_circuit(tmp_path / name, dataclasses.replace(circuit, settings=settings))
    for names, said in ((("a", "b"), False), (("a", "seed"), True), (("a", "old"), True)):
        assert main(["overlap", *(str(tmp_path / name) for name in names)]) == 0
        assert ("not known to be of the same weights" in capsys.readouterr().out) == said
