"""Two processes that train one model, against one process: in float64, where the order of sums changes no choice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch

from sparsetrain import checkpoint, parallel
from sparsetrain.config import ConfigError, RunConfig, load_config
from sparsetrain.train import RunSteps, _start, train

SHORT = [
    "train.steps=14",
    "train.eval_every=7",
    "train.checkpoint_every=99",
    "train.log_every=1",
    "train.eval_batches=3",
]
SHARDED = "run.sharded=true"


@pytest.fixture(scope="module")
def both():
    with ranks.group() as call:
        yield call


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory):
    """A function that trains with these arguments in this process, once."""
    folder, done = tmp_path_factory.mktemp("one"), {}

    def run(*arguments: str) -> Path:
        if arguments not in done:
            done[arguments] = train_run([*tiny, *SHORT, *arguments, f"run.out={folder}", f"run.name=r{len(done)}"])
        return Path(done[arguments])

    return run


class _Stopped(Exception):
    pass


class StopsEarly(RunSteps):
    """A run that ends, in all processes, with its first checkpoint."""

    def save(self):
        super().save()
        raise _Stopped


def train_run(arguments, stops=False):
    torch.set_default_dtype(torch.float64)
    try:
        return str(train(load_config(RunConfig, arguments), StopsEarly if stops else RunSteps))
    except _Stopped:
        return None
    finally:
        torch.set_default_dtype(torch.float32)


def recorded(run):
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    keys = "loss/train", "loss/val", "gradient_rms"
    return [(row["step"], key, row[key]) for row in rows for key in keys if key in row]


def assert_same(run, other):
    ours, theirs = recorded(run), recorded(other)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    assert [row[2] for row in ours] == pytest.approx([row[2] for row in theirs], abs=1e-9)
    a, b = (checkpoint.load_sparse(Path(r) / "model" / "model.safetensors") for r in (run, other))
    for name in b:
        assert torch.equal(a[name] != 0, b[name] != 0), f"another mask: {name}"
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sparsity.gradient=candidates", "sparsity.candidates=2", "sparsity.refill_every=3", "sparsity.density=0.15"],
        ["locality.pressure=selection", "locality.relayout_every=4", "train.accumulate=2"],
        [SHARDED, "train.accumulate=2", "train.checkpoint_activations=true", "sparsity.biases=sparse",
         "model.positions=learned"],
    ],
    ids=["whole", "candidates", "locality", "sharded"],
)  # fmt: skip
def test_invariant_47_losses_and_masks_are_those_of_one_process(both, one, tiny, tmp_path, arguments):
    alone = one(*(item for item in arguments if item != SHARDED))
    assert_same(both(train_run, [*tiny, *SHORT, *arguments, f"run.out={tmp_path}"])[0], alone)


def test_a_run_goes_on_with_another_number_of_processes_sharded_or_not(both, one, tiny, tmp_path):
    """From each way to train to each other one: every second step another."""
    given = [*tiny, *SHORT, "train.checkpoint_every=2", f"run.out={tmp_path}"]
    ways = "alone", "whole", "alone", "sharded", "whole", "sharded", "alone"
    for i, way in enumerate(ways):
        arguments = [*given, *([SHARDED] if way == "sharded" else [])], i + 1 < len(ways)
        found = train_run(*arguments) if way == "alone" else both(train_run, *arguments)[0]
    assert_same(found, one())


def bytes_held(arguments):
    """Bytes of weights, gradients and moments of this process after a step, and of all of them."""
    config = load_config(RunConfig, arguments)
    with parallel.joined(config, torch.device("cpu")):
        steps = RunSteps(_start(config))
        held = []
        steps.run.optimizer.zero_grad = lambda: held.extend(p.grad for p in steps.run.model.parameters())
        steps.advance()
        held += steps.run.model.parameters()
        held += (state[key] for state in steps.run.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
        return sum(parallel.local(x).nbytes for x in held), sum(x.numel() * x.itemsize for x in held)


def test_sharded_each_process_holds_half_of_weights_gradients_and_moments(both, tiny, tmp_path):
    for mine, whole in both(bytes_held, [*tiny, SHARDED, f"run.out={tmp_path}"]):
        assert mine == pytest.approx(whole / 2, rel=0.01)


def drift(arguments):
    """Change a weight in one process and save; what it says."""
    config = load_config(RunConfig, arguments)
    with parallel.joined(config, torch.device("cpu")):
        steps = RunSteps(_start(config))
        steps.run.model.embed.weight.data[0, 0] += 1e-3 * parallel.rank()
        try:
            steps.save()
        except parallel.ParallelError as error:
            return str(error)


def test_processes_whose_weights_drift_apart_are_stopped_before_they_are_saved(both, tiny, tmp_path):
    for said in both(drift, [*tiny, f"run.out={tmp_path}"]):
        assert "must hold the same weights, got others of embed.weight" in said


def start(command, arguments, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, *command, "-m", "sparsetrain", "train", *arguments]
    return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE)


def wait_for(file: Path):
    deadline = time.time() + 120
    while not (file.exists() and (file.is_dir() or file.read_text())):
        assert time.time() < deadline
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_sigterm_to_one_process_saves_and_stops_all(tiny, tmp_path):
    arguments = [
        *tiny,
        f"run.out={tmp_path}",
        "train.steps=3000",
        "train.checkpoint_every=9999",
        "train.eval_every=9999",
    ]
    port = ranks.free_port()
    processes = [start([], arguments, **ranks.environment(rank, port)) for rank in range(ranks.N)]
    wait_for(tmp_path / "run" / "metrics.jsonl")
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        assert "the same command goes on from there" in process.communicate(timeout=120)[1]
        assert process.returncode == 130
    step = checkpoint.read_state(checkpoint.latest_checkpoint(tmp_path / "run"))["step"]
    assert 0 < step < 3000 and _start(load_config(RunConfig, arguments)).step == step
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["processes"] == 2


def test_a_killed_process_ends_the_job_and_leaves_whole_checkpoints(tiny, tmp_path):
    arguments = [
        *tiny,
        f"run.out={tmp_path}",
        "train.steps=3000",
        "train.checkpoint_every=1",
        "train.keep_checkpoints=9999",
    ]
    process = start(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], arguments)
    wait_for(tmp_path / "run" / "checkpoints" / "step_00000003")
    first, second = children(process.pid)[:2]
    os.kill(second, signal.SIGKILL)
    assert "SIGKILL" in process.communicate(timeout=120)[1] and process.returncode != 0
    assert not Path(f"/proc/{first}").exists()
    found = checkpoint.checkpoints(tmp_path / "run")
    assert len(found) >= 3 and [checkpoint.read_state(f)["step"] for f in found] == list(range(1, len(found) + 1))


def test_a_process_whose_others_are_gone_says_so_and_how_to_go_on(tiny, tmp_path):
    arguments = [*tiny, SHARDED, f"run.out={tmp_path}", "train.steps=3000", "train.checkpoint_every=9999"]
    port = ranks.free_port()
    first, second = (start([], arguments, **ranks.environment(rank, port)) for rank in range(ranks.N))
    wait_for(tmp_path / "run" / "metrics.jsonl")
    second.kill()
    said = first.communicate(timeout=120)[1]
    assert "the other processes are gone (" in said and "the same command goes on from the last checkpoint" in said
    assert "Traceback" not in said and first.returncode == 1
    second.communicate()


@pytest.mark.parametrize(
    "arguments, environment, device, message",
    [
        (["train.batch_size=6", "train.accumulate=2"], {}, "cpu",
         "train.batch_size must be a multiple of processes x train.accumulate = 2 x 2, .*got 6"),
        (["train.batch_size=1"], {}, "cpu", "train.batch_size must be a multiple of .* 2 x 1, .*got 1"),
        ([], {"MASTER_ADDR": None}, "cpu", "WORLD_SIZE=2 must come with MASTER_ADDR, got none; start with torchrun"),
        ([], {"LOCAL_WORLD_SIZE": "99"}, "cuda", "there must be a CUDA device for each of the 99 processes of"),
    ],
)  # fmt: skip
def test_what_cannot_train_together_is_refused_before_it_starts(
    tiny_config, monkeypatch, arguments, environment, device, message
):
    for key, value in {**ranks.environment(1, 1), **environment}.items():
        monkeypatch.setenv(key, value) if value else monkeypatch.delenv(key, raising=False)
    config = load_config(RunConfig, [*(f"train.{k}={v}" for k, v in vars(tiny_config.train).items()), *arguments])
    with pytest.raises(ConfigError, match=message), parallel.joined(config, torch.device(device)):
        pass


@pytest.mark.parametrize("key", ["sparsity.gradient=candidates", "locality.pressure=loss"])
def test_what_sharded_weights_cannot_do_is_refused(key):
    with pytest.raises(ConfigError, match=f"{key.split('=')[0]} must be .* where run.sharded is true, got"):
        load_config(RunConfig, [SHARDED, key])


def test_a_bridge_under_torchrun_is_refused(monkeypatch):
    from sparsetrain.bridge_config import BridgeConfig
    from sparsetrain.bridging.train import bridge

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a bridge must be trained by one process, got 2"):
        bridge(load_config(BridgeConfig, ["bridge.dense=somewhere"]))


def test_one_process_shares_nothing_out():
    rows = torch.arange(5)
    assert parallel.mine(rows) is not None and torch.equal(parallel.mine(rows), rows)
    assert (parallel.n_ranks(), parallel.rank(), parallel.n_mine(5), parallel.sums(1.5), parallel.anyone(True)) == (
        1, 0, 5, [1.5], True,
    )  # fmt: skip
