"""Locality in training: what each pressure does in a step, that budgets and bits hold, that places are kept."""

import json
import shutil

import pytest
import torch

import sparsetrain
from sparsetrain import checkpoint, sparsity
from sparsetrain.config import STRONGEST, ConfigError, RunConfig, load_config
from sparsetrain.data import batch
from sparsetrain.locality.positions import LocalityError
from sparsetrain.locality.pressure import distances, wire_cost
from sparsetrain.step import train_step
from sparsetrain.train import _start, train

PRESSURES = ["loss", "proximal", "selection"]
CANDIDATES = ["sparsity.gradient=candidates", "sparsity.candidates=2", "sparsity.refill_every=3"]


def started(tiny, folder, *overrides):
    return _start(load_config(RunConfig, [*tiny, f"run.out={folder}", *overrides]))


def step(run):
    x, y = batch(run.corpus.tokens("train"), 0, run.step, 0, 4, 32)
    return train_step(run, run.model.loss, x, y)


def weights(run_dir):
    return sparsetrain.load(run_dir)[0].state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("pressure", PRESSURES)
def test_without_strength_a_run_is_what_it_is_without_locality(tiny, tiny_run, tmp_path, pressure):
    arguments = [*tiny, f"run.out={tmp_path}", f"locality.pressure={pressure}", "locality.strength=0"]
    run_dir = train(load_config(RunConfig, [*arguments, "locality.relayout_every=4"]))
    assert same(weights(run_dir), weights(tiny_run))  # places moved, the model did not


@pytest.mark.parametrize("more", [[], CANDIDATES], ids=["dense", "candidates"])
@pytest.mark.parametrize("pressure", PRESSURES)
def test_the_budget_holds_and_wires_get_shorter(tiny, tmp_path, pressure, more):
    strength = {"loss": 1e-2, "proximal": 20, "selection": 8}[pressure]
    on = [f"locality.pressure={pressure}", "locality.relayout_every=0", "sparsity.density=0.15", *more]
    lengths = []
    for k in (0, strength):
        run = started(tiny, tmp_path / str(k), *on, f"locality.strength={k}", "locality.ramp=0", "locality.rest=1")
        for _ in range(16):
            step(run)
            for t in run.tensors:
                assert int((t.dense() != 0).sum()) <= t.l0(run.config.sparsity, (run.step - 1) / 20)
        edges = run.wiring.edges()
        lengths.append(
            sum((p.weights * p.lengths(run.wiring.layout)).sum() for p in edges) / sum(p.weights.sum() for p in edges)
        )
    assert lengths[1] < lengths[0] - 0.005, lengths


def test_the_gradient_added_is_that_of_the_cost_whether_weights_are_held_whole_or_not(tiny, tmp_path):
    runs = [
        started(tiny, tmp_path / str(i), "locality.pressure=loss", "locality.strength=0.5", "locality.ramp=0", *more)
        for i, more in enumerate(([], CANDIDATES))
    ]
    for _ in range(12):
        step(runs[1])
    held = {name: t.linear.candidates is not None for name, t in runs[1].wiring.matrices.items() if t.linear}
    assert any(held.values())
    for run in runs:
        for p in run.model.parameters():
            p.grad = torch.zeros_like(p)
        run.wiring.add_gradients_(0.5)
        for name, t in run.wiring.matrices.items():
            whole = t.dense().clone().requires_grad_()
            rows, columns = (x.float() for x in run.wiring.layout.matrix_coordinates(name))
            parts = [(0, 32), (32, 64), (64, 96)] if "qkv" in name else [(0, len(whole))]
            cost = sum(wire_cost(whole[a:b], distances(rows[a:b], columns)) for a, b in parts)
            (expected,) = torch.autograd.grad(0.5 * cost, whole)
            at = t.linear.indices() if t.linear is not None and t.linear.candidates is not None else slice(None)
            assert torch.allclose(t.parameter.grad.flatten(), expected.flatten()[at], atol=1e-6), name


def test_selection_keeps_the_greatest_of_weight_times_factor(tiny, tmp_path):
    run = started(tiny, tmp_path, "locality.pressure=selection", "locality.ramp=0", "sparsity.min_alive=0")
    t = next(t for t in run.tensors if t.name == "blocks.0.mlp.up.weight")
    before = t.dense().clone()
    rows, columns = (x.float() for x in run.wiring.layout.matrix_coordinates(t.name))
    favour = before.abs() * (-4 * distances(rows, columns)).exp()
    sparsity.project_all_([t], run.config.sparsity, 0.5, lambda name: run.wiring.factor(name, 0.5))
    kept = favour.flatten().topk(t.l0(run.config.sparsity, 0.5)).indices
    expected = torch.zeros_like(before).flatten()
    expected[kept] = before.flatten()[kept]
    assert torch.equal(t.dense().flatten(), expected)


def test_a_resumed_run_has_the_same_places_and_the_same_bits(tiny, tmp_path):
    on = ["locality.pressure=selection", "locality.relayout_every=5", "sparsity.anneal_stop=0.3"]
    whole = train(load_config(RunConfig, [*tiny, f"run.out={tmp_path}/a", *on]))
    shutil.copytree(whole, tmp_path / "b" / whole.name)
    again = tmp_path / "b" / whole.name
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / "step_00000020")
    train(load_config(RunConfig, [*tiny, f"run.out={tmp_path}/b", *on]))
    assert same(weights(again), weights(whole))
    files = [run / "checkpoints" / "step_00000020" / "layout.safetensors" for run in (whole, again)]
    assert same(*(checkpoint.load_sparse(file) for file in files))
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert any("locality/mean_length" in row for row in rows)


def test_places_of_another_architecture_are_refused(tiny, tmp_path):
    run = started(tiny, tmp_path, "locality.pressure=selection")
    other = started(tiny, tmp_path, "locality.pressure=selection", "model.d_model=48")
    with pytest.raises(LocalityError, match=r"does not fit the architecture.*\n.*residual must be a permutation of 48"):
        other.wiring.load_(run.wiring.tensors())


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["locality.strength=200"], r"locality.strength must be in \[0, 160\]"),
        (["locality.strength=-1"], r"locality.strength must be in \[0, 160\]"),
        (["locality.ramp=0.9"], "locality.rest must be at least locality.ramp = 0.9, got 0.75"),
        (["locality.pressure=selection", "locality.length=mean"], "locality.length must be wire where"),
        (["locality.sheet=3"], r"locality.sheet must be in \[1, 2\], got 3"),
        (["locality.biases=true"], "locality.biases must be false unless pressure is loss and gap above 0"),
        (["locality.pressure=proximal", "locality.gap=1", "locality.biases=true"], "locality.biases must be false"),
        (["locality.pressure=selection", "locality.gap=1"], "locality.gap must be 0 where pressure is selection"),
        (
            ["locality.pressure=selection", "locality.strength=40", "locality.sheet=2"],
            "locality.strength must be at most 30 where pressure is selection and sheet 2, got 40",
        ),
    ],
)
def test_settings_that_cannot_be(tiny, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(RunConfig, [*tiny, *overrides])


def test_a_model_that_stays_too_dense_for_its_nodes_to_move_is_refused(tiny, tmp_path):
    dense = [*tiny, f"run.out={tmp_path}", "locality.pressure=loss", "sparsity.density=0.3"]
    with pytest.raises(ConfigError, match="at most 25% of the weights .* got 30%.*locality.relayout_every=0"):
        train(load_config(RunConfig, dense))
    train(load_config(RunConfig, [*dense, "locality.relayout_every=0", "train.steps=2"]))


def test_the_strongest_selection_leaves_the_budget_as_it_is(tiny, tmp_path):
    strong = ["locality.pressure=selection", f"locality.strength={STRONGEST}", "locality.relayout_every=0"]
    run = started(tiny, tmp_path, *strong)
    sparsity.project_all_(run.tensors, run.config.sparsity, 0.2, lambda name: run.wiring.factor(name, 0.2))
    for t in run.tensors:
        assert t.dense().count_nonzero() == t.l0(run.config.sparsity, 0.2), t.name


def test_a_layout_is_not_looked_for_while_the_model_is_dense(tiny, tmp_path, monkeypatch):
    """Its wires, two numbers and a half for each weight, would be the peak of memory."""
    run = started(tiny, tmp_path, "locality.pressure=loss", "locality.relayout_every=1")
    monkeypatch.setattr(run.wiring, "edges", lambda: pytest.fail("listed"))
    run.wiring.move_(1)
