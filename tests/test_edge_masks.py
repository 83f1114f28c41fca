"""Edge Pruning on programs whose circuits are known, its gates, and a training that was killed."""

import dataclasses

import pytest
import torch

from sparsetrain.bench import known_circuits
from sparsetrain.prune_config import EdgeMaskOptions, TopkMaskOptions
from sparsetrain.pruning import cut as cutting
from sparsetrain.pruning import edge_masks, edges, mask_training, topk_masks
from sparsetrain.pruning.objective import squared_error
from sparsetrain.pruning.space import EdgeSpace

QUICK = {"edge": EdgeMaskOptions(steps=30), "topk": TopkMaskOptions(steps=15)}
METHODS = {"edge": edge_masks.rank, "topk": topk_masks.rank}


def known(program: str, kind: str = "zero") -> known_circuits.KnownCircuit:
    (path,) = known_circuits.PROGRAMS.glob(f"{program}.safetensors")
    model, data = known_circuits.load_program(path)
    graph = known_circuits.ComponentGraph(model, split_embedding=True)
    return known_circuits.by_removal(graph, data, kind)


def rank(method: str, circuit: known_circuits.KnownCircuit, metric=squared_error, **settings):
    return METHODS[method](circuit.graph, circuit.data, circuit.ablation, metric, QUICK[method], **settings)


def test_the_exact_circuit_of_xproportion_is_found():
    circuit = known("xproportion")
    options = EdgeMaskOptions(steps=300)
    scores = edge_masks.rank(circuit.graph, circuit.data, circuit.ablation, squared_error, options)
    truth = edges.flat(circuit.graph, circuit.edges)
    values = edges.flat(circuit.graph, scores)
    assert values[truth].min() > values[~truth].max(), "every edge of the circuit stays open longer than any other"

    prompts = list(edges.batches(circuit.graph, circuit.data, circuit.ablation))

    def change(kept):
        return known_circuits.change(circuit.graph, prompts, kept)

    cut = cutting.smallest(EdgeSpace(circuit.graph), scores, change, known_circuits.TOLERANCE)
    assert cut.reached
    assert torch.equal(edges.flat(circuit.graph, cut.kept), truth)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits_and_another_one_others(method):
    circuit = known("hist")
    first, again, other = (edges.flat(circuit.graph, rank(method, circuit, seed=s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_training_goes_on_to_the_same_bits(method, tmp_path, monkeypatch):
    monkeypatch.setattr(mask_training, "SAVE_EVERY", 7)
    circuit, path = known("hist"), tmp_path / "state.safetensors"
    whole = rank(method, circuit)
    calls = []

    def killed(outputs, data, extremes):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return squared_error(outputs, data, extremes)

    killed.__name__ = squared_error.__name__
    with pytest.raises(KeyboardInterrupt):
        rank(method, circuit, killed, state=path)
    assert list(tmp_path.glob("state*.safetensors"))
    resumed = rank(method, circuit, state=path)
    assert torch.equal(edges.flat(circuit.graph, resumed), edges.flat(circuit.graph, whole))
    assert len(calls) == 20


def test_a_state_of_another_training_is_refused(tmp_path):
    circuit, path = known("hist"), tmp_path / "state.safetensors"
    rank("edge", circuit, state=path)
    with pytest.raises(mask_training.StateError, match=r'must be of this training.*"seed": 1.*delete it to start anew'):
        rank("edge", circuit, seed=1, state=path)
    other = dataclasses.replace(circuit, data=circuit.data.take(range(len(circuit.data))[::-1]))
    with pytest.raises(mask_training.StateError, match="must be of this training"):
        rank("edge", other, state=path)
    bias = circuit.graph.model.unembed.weight[0, 0]
    bias += 1
    with pytest.raises(mask_training.StateError, match="must be of this training"):
        rank("edge", circuit, state=path)
    path.write_bytes(b"no tensors")
    with pytest.raises(mask_training.StateError, match="must be a saved training, got: .*; delete it to start anew"):
        rank("edge", circuit, state=path)


@pytest.mark.parametrize("method", METHODS)
def test_where_no_edge_matters_all_scores_are_zero(method, caplog):
    circuit = known("length", "corrupted")  # the length of another sequence is the same
    scores = rank(method, circuit)
    assert all((group == 0).all() for group in scores.values())
    assert "no edge matters" in caplog.text
    cut = cutting.smallest(EdgeSpace(circuit.graph), scores, lambda kept: 0.0, 0.1)
    assert cut.reached
    assert edges.n_edges(cut.kept) == 0


def test_gates_follow_their_distribution():
    """At log alpha 0 as often 0 as 1; and zero as often as `open_probability` says."""
    generator = torch.Generator().manual_seed(0)
    for log_alpha in (-1.0, 0.0, 2.0):
        gates = edge_masks.hard_concrete(torch.full((200_000,), log_alpha), generator)
        expected = edge_masks.open_probability(torch.tensor(log_alpha)).item()
        assert abs((gates > 0).float().mean().item() - expected) < 0.005
    gates = edge_masks.hard_concrete(torch.zeros(200_000), generator)
    assert abs((gates == 0).float().mean() - (gates == 1).float().mean()) < 0.005
    assert ((gates > 0) & (gates < 1)).any()


@pytest.mark.parametrize("size", [0.3, 1.0, 7.5, 49.0])
def test_masks_of_a_size_sum_to_it_and_have_the_published_gradient(size):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(50, generator=generator, dtype=torch.float64).mul(3).requires_grad_()
    downstream = torch.randn(50, generator=generator, dtype=torch.float64)
    masks = topk_masks.masks_of_size(scores, size, 0.5)
    assert abs(masks.sum().item() - size) < 1e-6
    (gradient,) = torch.autograd.grad(masks @ downstream, scores)
    slope = (masks * (1 - masks)).detach()
    expected = slope / 0.5 * (downstream - (downstream @ slope) / slope.sum())
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)


def test_of_several_starts_the_one_is_kept_whose_cuts_lose_least(monkeypatch):
    circuit = known("hist")
    truth = edges.flat(circuit.graph, circuit.edges).float()
    starts, begun_with = [-truth, truth, 1 - 2 * truth], []

    def train(state, *_):
        begun_with.append(state["values"].clone())
        state["values"] += 1
        return {"total": starts.pop(0)}

    monkeypatch.setattr(topk_masks, "train", train)
    options = TopkMaskOptions(steps=1, starts=3)
    scores = topk_masks.rank(circuit.graph, circuit.data, circuit.ablation, squared_error, options)
    assert torch.equal(edges.flat(circuit.graph, scores), truth) and not starts
    spread = truth.std(correction=0)
    for begun, expected in zip(begun_with, (truth * 0, truth / spread, -truth / spread), strict=True):
        torch.testing.assert_close(begun, expected, msg="each start begins with the one before upside down")
