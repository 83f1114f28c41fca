"""Times whole training steps side by side: ours, the paper's recipe as it was released, and dense transformers."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sparsetrain import machine, memory
from sparsetrain.bench.timing import copy_seconds, multiply_adds_per_second
from sparsetrain.config import (
    AbsTopKOptions,
    DataOptions,
    ModelOptions,
    OptimOptions,
    RunConfig,
    RunOptions,
    SparsityOptions,
    TrainOptions,
)
from sparsetrain.data import Corpus, batch, prepare
from sparsetrain.kernels import ops, reference
from sparsetrain.step import Training, build, train_step

OURS, CANDIDATES, TWIN = "ours, dense gradient", "ours, candidates", "ours, another start by 1e-6"
RECIPE = "dense-masked"
FEW = 10  # steps of the arms whose losses nobody compares
DENSE = AbsTopKOptions(*[1.0] * 8)
GiB = 2**30


def base(width: int, layers: int, density: float, batch_size: int, steps: int, dtype: str = "float32") -> RunConfig:
    """A run at its final density from the first step on: only that step, and those that choose candidates, differ."""
    return RunConfig(
        run=RunOptions(dtype=dtype),
        data=DataOptions(vocab_size=2048),
        model=ModelOptions(n_layers=layers, d_model=width, n_ctx=256),
        sparsity=SparsityOptions(density=density, anneal_start=0.0, anneal_stop=0.0),
        optim=OptimOptions(lr=0.02),
        train=TrainOptions(steps=steps, batch_size=batch_size),
    )


def configs(device: torch.device, quick: bool) -> list[RunConfig]:
    """The sizes that are measured: those the project set itself targets for."""
    if quick:
        return [base(128, 2, 1 / 16, 4, FEW)]
    if device.type == "cuda":
        return [
            base(4096, 8, 1 / 1024, 64, 52, "bfloat16"),  # so that candidates are chosen once after the start
            base(2048, 8, 1 / 256, 64, 52, "bfloat16"),
        ]
    return [base(512, 4, 1 / 64, 8, 200)]


def arms(config: RunConfig) -> dict[str, RunConfig]:
    """What is compared, by name: the same model and numerics three times, and two dense transformers."""
    plain = replace(config, model=replace(config.model, abs_topk=DENSE), sparsity=replace(config.sparsity, density=1.0))
    d = _dense_width(config)
    return {
        RECIPE: replace(config, run=replace(config.run, kernels="reference")),
        OURS: config,
        CANDIDATES: replace(config, sparsity=replace(config.sparsity, gradient="candidates")),
        "dense, equal width": plain,
        "dense, equal nonzeros": replace(plain, model=replace(plain.model, d_model=d, d_head=min(16, d))),
        TWIN: config,
    }


def _dense_width(config: RunConfig) -> int:
    """The width of a dense transformer whose blocks have about as many weights as this one has nonzeros."""
    exact = config.model.d_model * config.sparsity.density**0.5
    return max(8, round(exact / 16) * 16)


def measure(config: RunConfig, device: torch.device, say: Callable[[str], None]) -> list[dict]:
    """Step every arm on the same batches, and note seconds and losses.

    On a CPU one step of each in turn, so that a busy machine slows all of them alike; on CUDA one arm after the other,
    for their weights and moments would not fit together.

    Args:
        config: see `base`. Ours and the recipe take all its steps, the dense transformers the first FEW.
        device: where.
        say: told what is being done.

    Returns:
        A row for each arm: size, arm, seconds (of each step but the first), losses (of each step), tokens (of a step),
        parameters (held after the last), nonzeros, refill_every (of candidates), peak_bytes, floor (seconds; of ours)
        and profile: {what: seconds} of one step.
    """
    if device.type == "cpu":
        memory.keep_freed()
    corpus, names = prepare(config.data), list(arms(config))
    together = [names] if device.type == "cpu" else [[name] for name in names]
    return [row for group in together for row in _measure_together(group, config, corpus, device, say)]


def _measure_together(
    names: list[str], config: RunConfig, corpus: Corpus, device: torch.device, say: Callable[[str], None]
) -> list[dict]:
    runs = {name: build(arms(config)[name], corpus, device) for name in names}
    if TWIN in runs:
        _perturb_(runs[TWIN])
    rows = [_row(name, run, _size(config)) for name, run in runs.items()]
    for i in range(config.train.steps):
        for row in rows:
            if i < FEW or not row["arm"].startswith("dense,"):
                loss, seconds = _step(runs[row["arm"]], corpus)
                row["losses"].append(loss)
                row["seconds"] += [seconds] if i else []
        if i % 20 == 1:
            took = ", ".join(f"{row['arm']} {1e3 * row['seconds'][-1]:.0f} ms" for row in rows)
            say(f"step {i + 1} of {config.train.steps}: {took}")
    for row in rows:
        say(f"profile and peak memory: {row['arm']}")
        row["profile"] = _profile(runs[row["arm"]], corpus)
        row["peak_bytes"] = _peak_bytes(row["arm"], config, device, runs[row["arm"]], corpus)
        row["parameters"] = sum(p.numel() for p in runs[row["arm"]].model.parameters())
        row["floor"] = floor(config, device, row["parameters"]) if row["arm"] in (OURS, CANDIDATES) else None
    return rows


def _row(name: str, run: Training, size: str) -> dict:
    c = run.config
    return {
        "size": size, "arm": name, "seconds": [], "losses": [], "tokens": c.train.batch_size * c.model.n_ctx,
        "refill_every": c.sparsity.refill_every if c.sparsity.gradient == "candidates" else None,
        "nonzeros": sum(t.l0(c.sparsity, 1.0) for t in run.tensors),
    }  # fmt: skip


def _size(config: RunConfig) -> str:
    m = config.model
    return (
        f"d = {m.d_model}, {m.n_layers} layers, density 1/{1 / config.sparsity.density:.0f}, "
        f"{config.train.batch_size} x {m.n_ctx} tokens, {config.run.dtype}"
    )


@torch.no_grad()
def _perturb_(run: Training) -> None:
    """Another start, so near that only rounding tells them apart: losses may differ by as much and mean nothing."""
    generator = torch.Generator().manual_seed(1)
    for p in run.model.parameters():
        p.mul_(1 + 1e-6 * torch.randn(p.shape, generator=generator).to(p.device))


def _step(run: Training, corpus: Corpus) -> tuple[float, float]:
    """One training step: its loss, and its seconds."""
    c = run.config
    x, y = batch(corpus.tokens("train"), c.run.seed, run.step, 0, c.train.batch_size, c.model.n_ctx)
    x, y = x.to(run.device), y.to(run.device)
    _wait(run.device)
    start = time.perf_counter()
    with ops.using(c.run.kernels), _as_released():
        loss, _ = train_step(run, run.model.loss, x, y)
    _wait(run.device)
    return loss.item(), time.perf_counter() - start


@contextmanager
def _as_released() -> Iterator[None]:
    """Have the plain kernels select by torch.topk, as the released script does, and norm by torch's own function.

    A selection by a stable sort, as the reference does, takes several times as long, and differs in ties alone.
    """
    with (
        mock.patch.object(reference, "norm_abs_topk", _norm_topk_and_scatter),
        mock.patch.object(reference, "abs_topk", _topk_and_scatter),
        mock.patch.object(reference, "project", _project_by_topk),
    ):
        yield


def _norm_topk_and_scatter(x: Tensor, gain: Tensor, eps: float, k: int) -> Tensor:
    y = F.rms_norm(x, gain.shape, gain, eps)
    return y if k == x.shape[-1] else _topk_and_scatter(y, k)


def _topk_and_scatter(x: Tensor, k: int) -> Tensor:
    at = x.detach().abs().topk(k, dim=-1, sorted=False).indices
    kept = x.gather(-1, at)
    return torch.zeros_like(x).scatter(-1, at, kept * (kept != 0))  # as ours: no gradient to what is kept at zero


def _project_by_topk(weight: Tensor, k: int, min_per_row: int, min_per_column: int) -> Tensor:
    score = weight.abs()
    for floor, dim in ((min_per_row, 1), (min_per_column, 0)):
        if floor:
            score.scatter_(dim, score.topk(floor, dim=dim).indices, 1e10)
    at = score.flatten().topk(k, sorted=False).indices
    return weight * torch.zeros_like(weight).view(-1).index_fill_(0, at, 1).view_as(weight)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _profile(run: Training, corpus: Corpus) -> dict[str, float]:
    """Seconds of the ops of one step that take the most of it, on the device; the rest as `other`."""
    on = ProfilerActivity.CUDA if run.device.type == "cuda" else ProfilerActivity.CPU
    run.step = min(run.step, run.config.train.steps - 1)  # the schedule ends there
    with profile(activities=[on]) as seen:
        _, seconds = _step(run, corpus)
    own = [(e.key, e.self_device_time_total if on == ProfilerActivity.CUDA else e.self_cpu_time_total)
           for e in seen.key_averages()]  # fmt: skip
    most = sorted(own, key=lambda pair: -pair[1])[:12]
    named = {name: microseconds / 1e6 for name, microseconds in most}
    return {**named, "other": max(0.0, seconds - sum(named.values()))}


def _peak_bytes(arm: str, config: RunConfig, device: torch.device, run: Training, corpus: Corpus) -> int:
    """The most memory: on CUDA of one more step, as torch counts it; on a CPU of a process of its own that takes the
    first two steps, code included, the first of which is dense for every arm."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        _step(run, corpus)
        return torch.cuda.max_memory_allocated(device)
    sizes = (config.model.d_model, config.model.n_layers, config.sparsity.density, config.train.batch_size)
    done = subprocess.run(
        [sys.executable, "-m", "sparsetrain.bench.step", arm, *map(str, sizes), str(torch.get_num_threads())],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(json.loads(done.stdout.splitlines()[-1]))


def floor(config: RunConfig, device: torch.device, n_held: int) -> float:
    """The least seconds of a step: each op's bytes at the speed of a copy, or its multiply-adds if they take longer.

    Counted are, with their gradients, the sparse products at the nonzeros, AbsTopK, norms and activations, attention
    (on a CPU with the kept share of k and v, on CUDA by its bytes alone, for its products run on matrix units), the
    loss, and Adam on the `n_held` weights; the dense gradient's own product is not. Multiply-adds are those of fp32.
    """
    m, c = config.model, config.train
    n, d, v = c.batch_size * m.n_ctx, m.d_model, config.data.vocab_size
    size = 2 if config.run.dtype == "bfloat16" else 4
    bytes_per_second = 2 * GiB / 8 / _best(copy_seconds(2 * GiB // 8, device), device)
    rate = multiply_adds_per_second(device)

    def seconds(n_bytes: float, multiply_adds: float) -> float:
        return max(n_bytes / bytes_per_second, multiply_adds / rate)

    maps = [(3 * d, d), (d, d), (m.mlp_ratio * d, d), (d, m.mlp_ratio * d)] * m.n_layers + [(v, d)]
    products = sum(
        3 * seconds((rows + columns) * n * size, config.sparsity.density * rows * columns * n) for rows, columns in maps
    )
    channels = (2 + 3 + 1 + m.mlp_ratio + 1) * d  # of the eight places, two of them norms and one an activation
    selections = m.n_layers * seconds(5 * channels * n * size, 0)
    share = m.abs_topk.k if device.type == "cpu" else 0
    attention = m.n_layers * seconds(11 * d * n * size, share * 3.5 * 2 * n * m.n_ctx / 2 * d)
    loss = seconds(4 * v * n * size, 0)
    return products + selections + attention + loss + seconds(7 * 4 * n_held, 0)


def _best(case: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        case()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _main(arm: str, width: str, layers: str, density: str, batch_size: str, threads: str) -> None:
    """Two steps of one arm in this process; prints the most memory that was resident, in bytes."""
    torch.set_num_threads(int(threads))
    memory.keep_freed()
    config = arms(base(int(width), int(layers), float(density), int(batch_size), 10))[arm]
    corpus = prepare(config.data)
    run = build(config, corpus, torch.device("cpu"))
    for _ in range(2):
        _step(run, corpus)
    print(machine.peak_bytes(torch.device("cpu")))


if __name__ == "__main__":
    _main(*sys.argv[1:])
