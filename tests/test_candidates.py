"""Training at candidates against the paper's rule, and what happens to them over a run."""

import shutil

import pytest
import torch

import sparsetrain
from sparsetrain import checkpoint
from sparsetrain.candidates import n_candidates
from sparsetrain.config import RunConfig, load_config
from sparsetrain.data import batch
from sparsetrain.loop import TrainingError
from sparsetrain.optim import scale_gradients_
from sparsetrain.step import read_weights_, train_step
from sparsetrain.train import _start, train

CANDIDATES = ["sparsity.gradient=candidates", "sparsity.candidates=2", "sparsity.refill_every=3"]


def start(tiny, folder, *overrides):
    return _start(load_config(RunConfig, [*tiny, "sparsity.density=0.15", f"run.out={folder}", *overrides]))


def step_(run):
    c = run.config
    x, y = batch(run.corpus.tokens("train"), c.run.seed, run.step, 0, c.train.batch_size, c.model.n_ctx)
    return train_step(run, run.model.loss, x, y)[0].item()


def hold_everything_(run):
    """Every entry a candidate, its moments with it: what c = all and T = 1 come to."""
    for t in run.tensors:
        if t.linear is not None:
            former = t.linear.hold_(torch.arange(t.size))
            state = run.optimizer.state[t.parameter]
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = state[moment].flatten()[former]
    read_weights_(run)


def test_all_candidates_at_every_step_are_the_papers_rule(tiny, tmp_path):
    paper, ours = start(tiny, tmp_path / "paper"), start(tiny, tmp_path / "ours")
    assert step_(paper) == step_(ours)
    hold_everything_(ours)
    for _ in range(8):
        assert step_(ours) == pytest.approx(step_(paper), abs=1e-4)
        hold_everything_(ours)
    for a, b in zip(paper.tensors, ours.tensors, strict=True):
        torch.testing.assert_close(a.dense(), b.dense(), rtol=1e-3, atol=1e-4)


def test_what_is_held_follows_the_candidates_and_the_budget(tiny, tmp_path):
    run = start(tiny, tmp_path, *CANDIDATES)
    held = []
    for _ in range(run.config.train.steps):
        refills = run.step % 3 == 0
        progress = run.step / run.config.train.steps
        step_(run)
        for t in run.tensors:
            if t.linear is None:
                continue
            n = n_candidates(t, run.config.sparsity, progress)
            assert int((t.dense() != 0).sum()) <= t.l0(run.config.sparsity, progress)
            if refills:
                assert t.parameter.shape == (t.linear.shape if n == t.size else (n,)), t.name
            for moment in ("exp_avg", "exp_avg_sq"):
                assert run.optimizer.state[t.parameter][moment].shape == t.parameter.shape
        held.append(sum(t.parameter.numel() for t in run.tensors if t.linear is not None))
    size = sum(t.size for t in run.tensors if t.linear is not None)
    assert held[0] == size and held[-1] == pytest.approx(2 * 0.15 * size, rel=0.01)


def test_new_candidates_are_the_greatest_gradients_outside_the_nonzeros(tiny, tmp_path):
    run = start(tiny, tmp_path, *CANDIDATES, "sparsity.refill_share=1", "optim.lr=0")
    for t in run.tensors:  # nothing moves but the candidates: the rate is 0
        if t.linear is not None:
            t.parameter.data.view(-1)[torch.randperm(t.size)[t.size // 10 :]] = 0
    run.config.sparsity.__dict__.update(anneal_start=0, anneal_stop=0)
    run.step = 30
    step_(run)  # from the whole matrix to candidates
    c = run.config
    x, y = batch(run.corpus.tokens("train"), c.run.seed, 33, 0, c.train.batch_size, c.model.n_ctx)
    twin = start(tiny, tmp_path / "twin", "run.kernels=reference")
    twin.model.load_state_dict(
        {k: v.to_dense() if not isinstance(v, torch.Tensor) else v for k, v in checkpoint._weights(run.model).items()}
    )
    torch.nn.functional.cross_entropy(twin.model(x).flatten(0, 1), y.flatten()).backward()
    run.step = 33
    step_(run)
    for ours, theirs in zip(run.tensors, twin.tensors, strict=True):
        if ours.linear is not None:
            alive = theirs.dense().flatten() != 0
            score = theirs.parameter.grad.abs().flatten().masked_fill(alive, torch.inf)
            n = n_candidates(ours, c.sparsity, 1.0)
            found = score[ours.linear.indices()].sort().values
            torch.testing.assert_close(found, score.topk(n).values.sort().values, rtol=1e-3, atol=1e-7)


def test_a_killed_run_resumes_with_its_candidates_and_their_moments_bit_for_bit(tiny, tmp_path):
    whole, parts = ([*tiny, *CANDIDATES, f"run.out={tmp_path}/{name}"] for name in ("whole", "parts"))
    train(load_config(RunConfig, whole))
    train(load_config(RunConfig, [*parts, "train.checkpoint_every=10", "train.keep_checkpoints=9"]))
    for later in sorted((tmp_path / "parts/run/checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    shutil.rmtree(tmp_path / "parts/run/model")
    train(load_config(RunConfig, parts))
    a, b = (sparsetrain.load(tmp_path / name / "run")[0].state_dict() for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    last = checkpoint.latest_checkpoint(tmp_path / "parts/run")
    moments = checkpoint.load_sparse(last / "optimizer.safetensors")
    name = "blocks.0.mlp.up.weight"
    assert moments[f"{name}.exp_avg"].shape == moments[f"{name}.candidates"].shape


def test_candidates_train_with_parts_of_a_batch_and_activations_made_again(tiny, tmp_path):
    plain = start(tiny, tmp_path / "a", *CANDIDATES, "sparsity.refill_share=1")
    split = start(tiny, tmp_path / "b", *CANDIDATES, "sparsity.refill_share=1", "train.accumulate=2")
    again = start(tiny, tmp_path / "c", *CANDIDATES, "sparsity.refill_share=1", "train.checkpoint_activations=true")
    for _ in range(20):
        loss = step_(plain)
        assert step_(again) == pytest.approx(loss, abs=2e-3)
        assert step_(split) == pytest.approx(loss, abs=5e-2)  # its candidates are chosen on half a batch


def test_what_is_not_held_counts_as_zero_in_the_gradients_rms(tiny, tmp_path):
    run = start(tiny, tmp_path, *CANDIDATES)
    while run.step < 15:
        step_(run)
    generator = torch.Generator().manual_seed(0)
    for p in run.model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    sizes = {t.name: t.size for t in run.tensors if t.linear is not None}
    squares = sum(float(p.grad.double().square().sum()) for p in run.model.parameters())
    entries = sum(sizes.get(name, p.numel()) for name, p in run.model.named_parameters())
    assert any(p.numel() < sizes.get(name, 0) for name, p in run.model.named_parameters())
    assert scale_gradients_(run.model, "none").item() == pytest.approx((squares / entries) ** 0.5, rel=1e-5)


def test_a_matrix_is_held_at_candidates_as_soon_as_it_has_fewer_of_them_than_entries(tiny, tmp_path):
    run = start(tiny, tmp_path, "sparsity.gradient=candidates", "sparsity.candidates=2", "sparsity.refill_every=1000")
    while run.step < run.config.train.steps:
        progress = run.step / run.config.train.steps
        step_(run)
        for t in run.tensors:
            if t.linear is not None:
                assert (t.linear.candidates is None) == (n_candidates(t, run.config.sparsity, progress) == t.size)
    assert run.model.unembed.candidates is not None


def test_weights_that_diverge_at_a_refill_stop_training_with_its_own_error(tiny, tmp_path):
    run = start(tiny, tmp_path, *CANDIDATES)
    while run.step < 15:
        step_(run)
    run.model.blocks[0].mlp.up.weight.data.fill_(torch.nan)
    with pytest.raises(TrainingError, match="a weight became infinite or NaN at step 16"):
        step_(run)
