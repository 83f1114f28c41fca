"""The loop: invariants after every step, exact resumption, and what happens when something goes wrong."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import sparsetrain
from sparsetrain import checkpoint, loop, sparsity, threads
from sparsetrain.checkpoint import CheckpointError
from sparsetrain.config import ConfigError, RunConfig, load_config
from sparsetrain.data import batch
from sparsetrain.loop import TrainingError
from sparsetrain.step import evaluate, train_step
from sparsetrain.train import _start, train

GOLDEN_STEPS = 12
GOLDEN_CURVE = [5.7255, 5.719, 5.4198, 5.164, 4.8864, 4.6357, 4.4486, 4.1027, 3.9237, 3.81, 3.7299, 3.6907]


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(run_dir):
    return sparsetrain.load(run_dir)[0].state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def command(arguments):
    return [sys.executable, "-m", "sparsetrain", "train", *arguments]


def steps_of(config, n):
    run = _start(config)
    tokens = run.corpus.tokens("train")
    losses = []
    for i in range(n):
        x, y = batch(tokens, config.run.seed, i, 0, config.train.batch_size, config.model.n_ctx)
        losses.append(train_step(run, run.model.loss, x, y)[0].item())
    return run, losses


def test_invariant_1_nonzeros_never_exceed_l0_after_any_step(tiny, tmp_path):
    config = load_config(RunConfig, [*tiny, f"run.out={tmp_path}", "sparsity.biases=sparse", "sparsity.density=0.15"])
    run = _start(config)
    tokens = run.corpus.tokens("train")
    falls = []
    for step in range(config.train.steps):
        x, y = batch(tokens, 0, step, 0, 4, 32)
        train_step(run, run.model.loss, x, y)
        counts = sparsity.count(run.tensors)
        for t in run.tensors:
            assert counts[t.name]["n_nonzero"] <= t.l0(config.sparsity, step / config.train.steps), (step, t.name)
        falls.append(sum(c["n_nonzero"] for c in counts.values()))
    assert falls[0] > 3 * falls[-1]
    assert falls[-1] == sum(t.l0(config.sparsity, 1.0) for t in run.tensors)


def test_a_step_is_the_paper_s_recipe_written_out(tiny, tmp_path):
    """The golden curve is not a list of numbers but the method written out: plain torch, in docs/method.md's order."""
    config = load_config(RunConfig, [*tiny, f"run.out={tmp_path}"])
    _, losses = steps_of(config, GOLDEN_STEPS)
    twin = _start(load_config(RunConfig, [*tiny, f"run.out={tmp_path}/twin"]))
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in twin.model.parameters()}
    c = config.optim
    for step in range(GOLDEN_STEPS):
        progress = step / config.train.steps
        x, y = batch(twin.corpus.tokens("train"), 0, step, 0, 4, 32)
        loss = -twin.model(x).log_softmax(-1).gather(-1, y[..., None]).mean()
        assert losses[step] == pytest.approx(loss.item(), abs=2e-4), step
        grads = torch.autograd.grad(loss, list(moments))
        rms = torch.cat([g.flatten() for g in grads]).square().mean().sqrt()
        density = sparsity.density(config.sparsity, progress)
        warm = min(1.0, progress / c.warmup)
        lr = c.lr * warm * (1 - progress) * (config.sparsity.density / density) ** 0.5
        with torch.no_grad():
            for (p, (m, v)), g in zip(moments.items(), grads, strict=True):
                g = g / (rms + 1e-5)
                m.lerp_(g, 1 - c.beta1)
                v.lerp_(g * g, 1 - c.beta2)
                m_hat, v_hat = m / (1 - c.beta1 ** (step + 1)), v / (1 - c.beta2 ** (step + 1))
                p -= lr * m_hat / (v_hat.sqrt() + c.eps)
            sparsity.project_all_(twin.tensors, config.sparsity, progress)
            for name, p in twin.model.named_parameters():
                if p.dim() > 1 and name != "bigram":
                    p -= lr * c.weight_decay * p


def test_the_golden_loss_curve(tiny, tmp_path):
    """Recorded losses: a change of initialisation, batches, model, optimiser or projection shows here."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(60):
        lines_of = [f"def f{i}_{j}(a{j}, b):\n    return a{j} + b * {i * j % 17}\n\n" for j in range(12)]
        (text / f"m{i:02}.py").write_text("".join(lines_of))
    arguments = [*tiny, f"run.out={tmp_path}", f"data.paths=[{text}]", f"data.cache={tmp_path}", "data.vocab_size=300"]
    _, losses = steps_of(load_config(RunConfig, arguments), len(GOLDEN_CURVE))
    assert losses == pytest.approx(GOLDEN_CURVE, abs=2e-3)


def test_threads_do_not_change_the_bits_of_a_step_of_the_quickstarts_size(tiny, tmp_path):
    """Large enough that torch shares out every kind of work."""
    arguments = [*tiny, "model.d_model=128", "model.d_head=16", "model.n_ctx=64", "train.batch_size=32",
                 "sparsity.density=0.1"]  # fmt: skip
    states = []
    for n in (1, 2, 4):
        torch.set_num_threads(n)
        run, losses = steps_of(load_config(RunConfig, [*arguments, f"run.out={tmp_path}/{n}"]), 2)
        states.append((losses, run.model.state_dict()))
    torch.set_num_threads(1)
    for losses, weights in states[1:]:
        assert losses == states[0][0]
        assert same(weights, states[0][1])


def test_in_bfloat16_threads_do_not_change(tiny, tmp_path, monkeypatch):
    """Bits may depend on their number there."""
    n_used = set()
    monkeypatch.setattr(threads.Threads, "record", lambda self, n, seconds: n_used.add(n))
    monkeypatch.setattr(loop, "n_cores", lambda: 2)
    arguments = [item for item in tiny if not item.startswith("run.threads")]
    train(load_config(RunConfig, [*arguments, f"run.out={tmp_path}", "run.dtype=bfloat16", "train.steps=5"]))
    torch.set_num_threads(1)
    assert n_used == {2}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_run_follows_the_same_curve(tiny, tmp_path):
    small = [*tiny, "model.n_layers=1", "train.steps=5"]
    config = load_config(RunConfig, [*small, f"run.out={tmp_path}", "run.compile=true"])
    plain = steps_of(load_config(RunConfig, [*small, f"run.out={tmp_path}/plain"]), 5)[1]
    logged = {row["step"]: row["loss/train"] for row in lines(train(config)) if "loss/train" in row}
    assert logged[5] == pytest.approx(plain[4], abs=2e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_follows_the_same_curve(tiny, tmp_path):
    curves = []
    for device in ("cpu", "cuda"):
        config = load_config(RunConfig, [*tiny, f"run.out={tmp_path}/{device}", f"run.device={device}"])
        run = _start(config)
        losses = []
        for i in range(6):
            x, y = batch(run.corpus.tokens("train"), 0, i, 0, 4, 32)
            losses.append(train_step(run, run.model.loss, x.to(run.device), y.to(run.device))[0].item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], abs=2e-3)


def test_training_lowers_the_loss(tiny, tmp_path):
    run = train(load_config(RunConfig, [*tiny, f"run.out={tmp_path}", "train.steps=100", "optim.lr=0.05"]))
    found = [row["loss/val"] for row in lines(run) if "loss/val" in row]
    assert found[-1] < found[0] - 0.3


def test_the_same_config_and_seed_give_the_same_bits_on_any_number_of_threads(tiny, tiny_run, tmp_path):
    for n in (1, 2):
        again = train(load_config(RunConfig, [*tiny, f"run.out={tmp_path}", f"run.name=t{n}", f"run.threads={n}"]))
        assert same(weights(again), weights(tiny_run)), n
    torch.set_num_threads(1)
    other = train(load_config(RunConfig, [*tiny, f"run.out={tmp_path}", "run.name=other", "run.seed=1"]))
    assert not same(weights(other), weights(tiny_run))


def test_ten_steps_kill_ten_steps_equal_twenty_bit_for_bit(tiny, tiny_run, tmp_path):
    arguments = [*tiny, f"run.out={tmp_path}", "run.name=shared"]
    # Nothing is written between the checkpoint of step 10 and its kill -9, which comes before step 20 is saved.
    killer = (
        "import os, signal, sys\nimport sparsetrain.train as t\nsave = t.RunSteps.save\n"
        "def save_and_die(steps):\n    save(steps)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "t.RunSteps.save = save_and_die\nfrom sparsetrain.cli import main\nmain(['train', *sys.argv[1:]])\n"
    )
    done = subprocess.run([sys.executable, "-c", killer, *arguments], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint.latest_checkpoint(tmp_path / "shared").name == "step_00000010"
    resumed = train(load_config(RunConfig, arguments))
    assert same(weights(resumed), weights(tiny_run))
    ours, theirs = ([(r["step"], r.get("loss/train")) for r in lines(run)] for run in (resumed, tiny_run))
    assert ours == theirs, "metrics read as if nothing had happened"


def test_ctrl_c_checkpoints_and_the_same_command_goes_on(tiny, tmp_path):
    arguments = [*tiny, f"run.out={tmp_path}", "run.name=stopped", "train.steps=3000", "train.checkpoint_every=100000"]
    process = subprocess.Popen(command(arguments), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    deadline = time.time() + 60
    while not (metrics.exists() and metrics.read_text()) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in errors
    newest = checkpoint.latest_checkpoint(tmp_path / "stopped")
    step = json.loads((newest / "state.json").read_text())["step"]
    assert 0 < step < 3000
    assert _start(load_config(RunConfig, arguments)).step == step


def test_a_finished_run_is_not_trained_again(tiny, trained):
    before = (trained / "metrics.jsonl").read_text()
    assert train(load_config(RunConfig, [*tiny, "run.name=shared"])) == trained
    assert (trained / "metrics.jsonl").read_text() == before


def test_a_resume_with_another_config_lists_every_difference(tiny, tiny_run):
    with pytest.raises(ConfigError) as error:
        train(
            load_config(RunConfig, [*tiny, "run.name=shared", "model.d_model=64", "optim.lr=0.5", "train.log_every=3"])
        )
    message = str(error.value)
    assert "model.d_model: 32 there, 64 now" in message
    assert "optim.lr: 0.02 there, 0.5 now" in message
    assert "log_every" not in message
    assert "choose another name" in message


def test_a_resume_on_another_corpus_is_refused(tiny, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(30):
        (text / f"{i}.py").write_text(f"def f{i}(): return {i}\n" * 30)
    arguments = [*tiny, f"run.out={tmp_path}", f"data.paths=[{text}]", "data.vocab_size=300", "train.steps=10"]
    train(load_config(RunConfig, arguments))
    (text / "0.py").write_text("changed = True\n" * 50)
    with pytest.raises(CheckpointError, match="was trained on another corpus or tokenizer"):
        train(load_config(RunConfig, arguments))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tiny, tmp_path):
    arguments = [*tiny, f"run.out={tmp_path}", "train.checkpoint_every=1", "optim.lr=1e30", "optim.warmup=0.3"]
    with pytest.raises(
        TrainingError, match=r"(the loss|a weight) became (nan|inf).* at step \d+; the last good state is .*step_0"
    ):
        train(load_config(RunConfig, arguments))
    kept = checkpoint.latest_checkpoint(tmp_path / "run")
    assert all(t.isfinite().all() for t in checkpoint.load_sparse(kept / "model.safetensors").values())
    assert kept.name >= "step_00000001"


def test_accumulation_and_checkpointed_activations_change_the_loss_by_rounding_alone(tiny, tmp_path):
    curves = []
    for i, extra in enumerate(([], ["train.accumulate=4"], ["train.checkpoint_activations=true"])):
        curves.append(steps_of(load_config(RunConfig, [*tiny, f"run.out={tmp_path}/{i}", *extra]), 6)[1])
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
    assert curves[2] == curves[0]


def test_bfloat16_autocast_follows_the_same_curve(tiny, tmp_path):
    plain = steps_of(load_config(RunConfig, [*tiny, f"run.out={tmp_path}/a"]), 6)[1]
    low = steps_of(load_config(RunConfig, [*tiny, f"run.out={tmp_path}/b", "run.dtype=bfloat16"]), 6)[1]
    assert low == pytest.approx(plain, abs=0.05)
    assert low != plain


def test_what_a_run_directory_holds(tiny_run):
    names = {p.name for p in tiny_run.iterdir()}
    assert {"config.yaml", "environment.json", "tokenizer.json", "checkpoints", "model", "metrics.jsonl",
            "tensorboard", "summary.json"} <= names  # fmt: skip
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert summary["tokens"] == 20 * 4 * 32
    assert summary["density"] == pytest.approx(0.25, abs=1e-3)
    model = weights(tiny_run)
    projected = [n for n in model if n.endswith("weight") and "norm" not in n]
    assert summary["n_nonzero"] == sum(int((model[n] != 0).sum()) for n in projected)
    kept = sorted(p.name for p in (tiny_run / "checkpoints").iterdir())
    assert kept == ["step_00000010", "step_00000020"]
    logged = {key for row in lines(tiny_run) for key in row}
    assert {"loss/train", "loss/val", "gradient_rms", "learning_rate", "density", "tokens_per_second"} <= logged


def test_tensorboard_has_losses_densities_and_histograms(tiny_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tiny_run / "tensorboard")).Reload()
    tags = board.Tags()
    assert {"loss/train", "loss/val", "density/embed.weight", "dead_rows/blocks.1.mlp.up.weight"} <= set(
        tags["scalars"]
    )
    assert "nonzeros_per_row/blocks.0.attn.qkv.weight" in tags["histograms"]


def test_evaluation_is_the_mean_over_tokens(tiny, tmp_path):
    run = _start(load_config(RunConfig, [*tiny, f"run.out={tmp_path}", "train.eval_batches=3"]))
    whole = evaluate(run)
    run.config = load_config(RunConfig, [*tiny, f"run.out={tmp_path}", "train.eval_batches=12", "train.batch_size=1"])
    assert evaluate(run) == pytest.approx(whole, abs=1e-5)
