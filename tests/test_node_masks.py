"""Learnt masks and the cut, on a model whose circuit is known by construction."""

import copy
import dataclasses

import pytest
import torch

from sparsetrain.config import RunConfig, load_config
from sparsetrain.model import Transformer
from sparsetrain.prune_config import PruneConfig
from sparsetrain.pruning import evaluate, graph, mask_training, node_masks
from sparsetrain.pruning.ablation import Ablation, build_ablation, site_reader
from sparsetrain.pruning.cut import Problem, find, smallest
from sparsetrain.pruning.measures import measure
from sparsetrain.pruning.methods import METHODS
from sparsetrain.pruning.space import NodeSpace
from sparsetrain.tasks import TaskData

METHOD = METHODS["node_masks"]
RANK = METHOD.rank
QUICK = ["node_masks.steps=30", "node_masks.batch_pairs=8"]
THOROUGH = ["node_masks.steps=150", "node_masks.lr=0.01", "node_masks.count_penalty=1e-3"]


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Token 1 asks for 3 and token 2 for 4, through mlp_in:0 -> a neuron (of two) -> mlp_out:1; the rest is noise."""
    options = load_config(
        RunConfig,
        ["model.n_layers=1", "model.d_model=8", "model.d_head=4", "model.mlp_ratio=1", "model.n_ctx=8",
         "model.activation=relu", "model.bigram=false", "model.sink=false", "sparsity.density=1", "model.abs_topk=1"],
    ).model  # fmt: skip
    g = torch.Generator().manual_seed(0)
    model = Transformer(options, 9)
    block = model.blocks[0]
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(0.05 * torch.randn(p.shape, generator=g))
        model.embed.weight[:, :2] = 0
        model.embed.weight[:, 2:] = 0.3 * torch.randn(9, 6, generator=g)
        # Else the noise alone tells the two tokens apart, and the search finds that (it did: one node, through the
        # scale of the last norm).
        model.embed.weight[2] = model.embed.weight[1]
        model.embed.weight[1, 0], model.embed.weight[2, 0] = 1, -1
        block.attn.out.weight[:2] = 0
        block.mlp.up.weight[:2] = 0
        block.mlp.up.weight[0, 0], block.mlp.up.weight[1, 0] = 3, -3
        block.mlp.out.weight[:2] = 0
        block.mlp.out.weight[1, 0], block.mlp.out.weight[1, 1] = 3, -3
        model.unembed.weight[3, :], model.unembed.weight[4, :] = 0, 0
        model.unembed.weight[3, 1], model.unembed.weight[4, 1] = 3, -3
    return model


@pytest.fixture(scope="module")
def data() -> TaskData:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 9, (64, 5), generator=g)
    last = torch.randint(1, 5, (32,), generator=g).repeat_interleave(2)
    rows = torch.arange(64)
    positive = rows % 2 == 0
    tokens[rows, last] = torch.where(positive, 1, 2)
    correct = torch.where(positive, 3, 4)
    return TaskData("made", tokens, last, correct, 7 - correct, torch.full((64,), 3), tuple(map(str, range(64))))


@pytest.fixture(scope="module")
def ablation(model) -> Ablation:
    g = torch.Generator().manual_seed(2)
    return build_ablation(
        site_reader(model, graph.node_sites(model.options)),
        "mean_data",
        [torch.randint(9, (32, 8), generator=g) for _ in range(4)],
    )


def problem(model, data, ablation, config) -> Problem:
    return Problem(NodeSpace(model, config.tie_qk), data, ablation, config)


def named(nodes) -> set[str]:
    return {f"{s.removeprefix('blocks.0.')}:{c}" for s, m in nodes.items() for c in m.nonzero().flatten().tolist()}


def test_the_known_circuit_is_found(model, data, ablation):
    config = load_config(PruneConfig, [*THOROUGH, "node_masks.batch_pairs=16"])
    cut, _, _ = find(problem(model, data, ablation, config), METHOD)
    assert cut.reached
    assert cut.loss <= 0.15
    assert named(cut.kept) in (
        {"mlp_in:0", "mlp_act:0", "mlp_out:1", "final_resid:1"},
        {"mlp_in:0", "mlp_act:1", "mlp_out:1", "final_resid:1"},
    )
    assert graph.n_edges(model, cut.kept) == 2, "the simplest MLP circuit (Gao et al. 2025, footnote 3)"


def test_a_killed_search_goes_on_to_the_same_bits(model, data, ablation, tmp_path, monkeypatch):
    monkeypatch.setattr(mask_training, "SAVE_EVERY", 7)
    asked = dataclasses.replace(problem(model, data, ablation, load_config(PruneConfig, QUICK)), state=tmp_path)
    whole = RANK(dataclasses.replace(asked, state=None))
    steps = []

    def killed(difference):
        steps.append(1)
        if len(steps) == 18:
            raise KeyboardInterrupt
        return evaluate.task_losses(difference)

    with monkeypatch.context() as patched:
        patched.setattr(node_masks, "task_losses", killed)
        with pytest.raises(KeyboardInterrupt):
            RANK(asked)
        resumed = RANK(asked)
    assert len(steps) == 18 + 30 - 14, "14 steps were saved"
    assert all(torch.equal(resumed[site], whole[site]) for site in whole)
    with pytest.raises(mask_training.StateError, match="must be of this training"):
        RANK(dataclasses.replace(asked, config=dataclasses.replace(asked.config, tie_qk=False)))


def test_measures_of_the_known_circuit(model, data, ablation):
    config = load_config(PruneConfig, [*THOROUGH, "node_masks.batch_pairs=16"])
    cut, _, _ = find(problem(model, data, ablation, config), METHOD)
    found = measure(problem(model, data, ablation, config), data, cut)
    assert (found["n_nodes"], found["n_edges"], found["n_dangling"]) == (4, 2, 0)
    assert found["task_loss"] < 0.15
    assert found["full_model_loss"] < 0.01
    assert found["completeness_loss"] > 0.5, "the model needs the circuit"
    assert found["random_ablation_loss"] < 0.5 * found["completeness_loss"], "it does not need other nodes"
    assert found["random_circuit_loss"] > 0.6
    assert found["agreement"] == 1


def test_a_task_that_needs_no_node_has_an_empty_circuit(model, data, ablation):
    with_table = copy.deepcopy(model)
    with_table.options = dataclasses.replace(model.options, bigram=True)
    with_table.bigram = torch.nn.Parameter(torch.zeros(9, 9))
    with torch.no_grad():
        with_table.bigram[1, 3] = with_table.bigram[2, 4] = 8.0
    cut, _, _ = find(problem(with_table, data, ablation, load_config(PruneConfig, ["node_masks.steps=5"])), METHOD)
    assert cut.reached
    assert named(cut.kept) == set()


def test_a_search_is_deterministic_goes_on_and_finds_no_larger_circuit(model, data, ablation, tmp_path):
    pytest.importorskip("optuna")
    config = load_config(PruneConfig, [*QUICK, "node_masks.search_trials=3"])
    asked = problem(model, data, ablation, config)
    first, _, used = find(asked, METHOD)
    find(dataclasses.replace(asked, state=tmp_path), METHOD)
    (tmp_path / "trial_2" / "node_masks.safetensors").unlink()  # as if it had been killed before the last trial
    second, _, again = find(dataclasses.replace(asked, state=tmp_path), METHOD)
    assert named(first.kept) == named(second.kept)
    assert used == again
    plain, _, _ = find(problem(model, data, ablation, load_config(PruneConfig, QUICK)), METHOD)
    assert graph.n_edges(model, first.kept) <= graph.n_edges(model, plain.kept)


def test_the_model_is_left_as_it_was(model, data, ablation):
    before = [p.clone() for p in model.parameters()]
    RANK(problem(model, data, ablation, load_config(PruneConfig, ["node_masks.steps=3"])))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_impossible_target_is_reported_with_the_best_loss(model, data, ablation):
    config = load_config(PruneConfig, ["node_masks.steps=20", "target_loss=0"])
    cut, _, _ = find(problem(model, data, ablation, config), METHOD)
    assert not cut.reached
    assert cut.loss < 0.15


def test_the_cut_is_where_the_target_is_just_reached(model, data, ablation):
    config = load_config(PruneConfig, THOROUGH)
    tau = RANK(problem(model, data, ablation, config))
    to_cut = problem(model, data, ablation, config)
    cut = smallest(to_cut.space, tau, lambda kept: to_cut.score(kept)[0], config.target_loss, clean_evaluations=0)
    n = graph.n_nodes(cut.kept)
    assert cut.reached
    fewer = NodeSpace(model, True).top(tau, n - 1)
    logits = evaluate.all_answer_logits(model, data, fewer, ablation)
    loss = evaluate.task_score(logits, data, evaluate.calibrate(logits, data))[0]
    assert graph.n_nodes(fewer) == n or loss > config.target_loss


def test_step_function_is_a_step_with_a_sigmoids_slope():
    tau = torch.tensor([-0.5, 0.0, 0.5], requires_grad=True)
    gate = node_masks.StepFunction.apply(tau, 2.0)
    assert gate.tolist() == [0, 1, 1]
    gate.sum().backward()
    s = torch.sigmoid(tau.detach() / 2)
    torch.testing.assert_close(tau.grad, s * (1 - s) / 2)


def test_tied_channels_are_kept_together(model):
    tau = {"blocks.0.attn_in": torch.tensor([0.5, -1.0]), "blocks.0.q": torch.tensor([0.2, 0.4]),
           "blocks.0.k": torch.tensor([0.2, 0.4])}  # fmt: skip
    assert named(NodeSpace(model, True).top(tau, 2)) == {"attn_in:0", "q:1", "k:1"}
    assert named(NodeSpace(model, False).top(tau, 2)) == {"attn_in:0", "q:1"}


def test_a_greater_penalty_keeps_fewer_nodes(model, data, ablation):
    kept = []
    for penalty in ("0", "1e-2"):
        config = load_config(PruneConfig, ["node_masks.steps=60", f"node_masks.count_penalty={penalty}"])
        tau = RANK(problem(model, data, ablation, config))
        kept.append(sum(int((t >= 0).sum()) for t in tau.values()))
    assert kept[1] < kept[0]
