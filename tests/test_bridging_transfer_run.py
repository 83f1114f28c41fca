"""A circuit carried across a bridge by the command: its result, the table, refusals."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from made_bridge import chosen, exact_bridge

import sparsetrain
from sparsetrain import checkpoint
from sparsetrain.bridge_config import BridgeConfig
from sparsetrain.bridging.dense import OwnModel
from sparsetrain.bridging.directions import read_of
from sparsetrain.bridging.residuals import BridgeError
from sparsetrain.bridging.transfer import transfer
from sparsetrain.bridging.transfer_measures import describe
from sparsetrain.config import config_to_yaml, load_config
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.circuit import Circuit, CircuitError, save_circuit
from sparsetrain.pruning.evaluate import Calibration


@pytest.fixture(scope="module")
def bridged(rotated_run, dense_run, tmp_path_factory):
    """The rotated run with an exact bridge, and circuits of a few nodes and of components."""
    source, rotation = rotated_run
    run = tmp_path_factory.mktemp("transfer") / "run"
    shutil.copytree(source, run)
    model, tokenizer = sparsetrain.load(run)
    folder = run / "bridges" / "dense"
    folder.mkdir(parents=True)
    sparse = OwnModel(model, tokenizer)
    bridge = exact_bridge(sparse, rotation)
    checkpoint.save_sparse(folder / "bridge.safetensors", bridge.state_dict())
    config = load_config(BridgeConfig, [f"bridge.sparse={run}", f"bridge.dense={dense_run}", "bridge.topk=1"])
    (folder / "config.yaml").write_text(config_to_yaml(config))
    report = {"pairs": [{**vars(p), "explained_to_dense": 1.0} for p in bridge.pairs]}
    (folder / "report.json").write_text(json.dumps(report))
    nodes = chosen(sparse, blocks__0__attn_in=[3], blocks__1__mlp_in=[1, 4], blocks__0__q=[2], final_resid=[9])
    settings = {"prune": {"seed": 0}, "run": "run", "task": "single_double_quote"}
    circuit = Circuit("single_double_quote", "node_masks", "channel", nodes, [], Ablation("zero", {}), Calibration(),
                      settings=settings)  # fmt: skip
    made = {
        "node_masks": circuit,
        "of_components": replace(circuit, graph="component", nodes={"embed": torch.ones(1, dtype=torch.bool)}),
        "of_another": replace(circuit, nodes={"final_resid": torch.ones(5, dtype=torch.bool)}),
        "of_other_weights": replace(circuit, settings={**settings, "model": "0123"}),
        "of_no_reads": replace(circuit, nodes=chosen(sparse, blocks__0__q=[2])),
    }
    for name, each in made.items():
        save_circuit(run / "circuits" / "single_double_quote" / name, each)
    return run


@pytest.fixture(scope="module")
def found(bridged):
    return json.loads(transfer(bridged, "single_double_quote", n_pairs=4, n_random=3).read_text())


def own_sites(run):
    return OwnModel(*sparsetrain.load(run)).sites


def test_the_result_is_complete(found, bridged):
    assert (bridged / "bridges/dense/transfer/single_double_quote/node_masks/transfer.json").exists()
    nodes = ["blocks.0.attn_in:3", "blocks.1.mlp_in:1", "blocks.1.mlp_in:4", "final_resid:9"]
    assert [node["node"] for node in found["nodes"]] == nodes and found["n_nodes"] == 5
    assert found["one_node"][-1]["nodes"][0] in nodes[:3] and found["not_transferable"] == {}
    assert found["made_of"].keys() == {"circuit", "bridge"}
    assert found["n_prompts"] == 8 and found["strengths"] == pytest.approx([i / 10 for i in range(11)])
    assert [one["nodes"] for one in found["one_node"]] == [[one["name"]] for one in found["one_node"]]
    everywhere = [read if read != "final_in" else "final_resid" for read in map(read_of, own_sites(bridged))]
    for one, reads in zip(found["one_channel"], (everywhere, everywhere[:-1]), strict=False):
        channel = one["name"].removeprefix("channel ")
        assert channel in {"3", "1", "4", "9"} and one["nodes"] == [f"{read}:{channel}" for read in reads]
    assert len(found["one_channel"]) == 2
    for one in [*found["one_node"], *found["one_channel"]]:
        assert one["random_lowest"] <= one["random_rise"] <= one["random_highest"]
        assert one["ratio"] == pytest.approx(one["rise"] / one["random_size"])
    assert found["explained_to_dense"].keys() == {"blocks.0.resid_pre", "blocks.1.resid_mid", "final_resid"}
    assert set(found["curves"]) == {"circuit", "probe", "patch", "random"}
    for name, curve in found["curves"].items():
        keys = {"mean", "lowest", "highest"} if name == "random" else {"mean", "se"}
        n = 3 if name == "random" else 11
        for side in ("both", "to_negative", "to_positive"):
            for measure in ("own", "other", "logit_difference"):
                assert {k: len(v) for k, v in curve[side][measure].items()} == dict.fromkeys(keys, n)
        start = curve["both"]["other"]["mean"][0]
        assert start == pytest.approx(found["curves"]["patch"]["both"]["other"]["mean"][0], rel=1e-4)
    for node in found["nodes"]:
        both = node["curve"]["both"]["other"]["mean"]
        assert node["rise"] == pytest.approx(both[-1] - both[0], abs=1e-6)
    for key in ("logit_difference", "text_loss"):
        row = found["ablation"][key]
        assert row["random"]["lowest"] <= row["random"]["mean"] <= row["random"]["highest"]
    assert found["ablation"]["n_directions"] == 4
    before = found["ablation"]["logit_difference"]["before"]
    assert before == pytest.approx(found["dense_model"]["logit_difference"], rel=1e-4)


def test_the_same_again_gives_the_same_bits(found, bridged):
    assert json.loads(transfer(bridged, "single_double_quote", n_pairs=4, n_random=3).read_text()) == found


def test_the_table_tells_each_node_and_a_share_that_is_not_defined(found):
    text = describe(found | {"not_transferable": {"blocks.0.mlp_in:2": "the bridge has no pair for it"}})
    assert all(node["node"] in text for node in found["nodes"])
    assert "not blocks.0.mlp_in:2: the bridge has no pair" in text and "4 of the 5 nodes" in text
    assert "not defined, since it does not do the task" in describe(found)  # of twenty steps of training
    row = {"value": 0.5, "low": 0.4, "high": 0.6}
    shares = dict.fromkeys(("circuit", "random", "probe", "patch"), row)
    text = describe(found | {"share": shares, "share_inside": shares})
    assert text.count("the circuit's directions             +0.500  (+0.400 to +0.600)") == 2


@pytest.mark.parametrize(
    ("circuit", "bridge", "error", "words"),
    [
        ("topk_masks", "dense", CircuitError, "--circuit must be one of those in .*, got 'topk_masks'"),
        (
            "node_masks",
            "other",
            BridgeError,
            "--bridge must be one that is finished in .* are dense, got 'other'",
        ),
        ("of_components", "dense", CircuitError, "got one of the graph 'component', whose heads and MLPs"),
        ("of_another", "dense", CircuitError, "must hold a circuit of this run's model"),
        ("of_other_weights", "dense", CircuitError, "got one of other weights .0123.; prune again"),
        ("of_no_reads", "dense", BridgeError, "none: none of its nodes reads the residual stream"),
    ],
)
def test_what_cannot_be_carried_is_refused(bridged, circuit, bridge, error, words):
    with pytest.raises(error, match=words):
        transfer(bridged, "single_double_quote", circuit, bridge)
