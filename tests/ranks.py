"""Two real processes in one group, which run what a test sends them; and what tests send."""

import contextlib
import multiprocessing
import os
import socket
import traceback

N = 2


def environment(rank: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(N), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def group():
    """A function that has all ranks call a function of this file, and gives back what each returned."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    pipes, processes = [], []
    for rank in range(N):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(rank, port, theirs), daemon=True))
        processes[-1].start()
        pipes.append(ours)

    def call(function, *arguments):
        for pipe in pipes:
            pipe.send((function.__name__, arguments))
        answers = [pipe.recv() for pipe in pipes]
        assert not any(error for _, error in answers), "\n".join(str(error) for _, error in answers)
        return [value for value, _ in answers]

    yield call
    for process in processes:
        process.kill()
        process.join()


def _serve(rank: int, port: int, pipe) -> None:
    os.environ.update(environment(rank, port))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((globals()[name](*arguments), None))
        except Exception:
            pipe.send((None, f"rank {rank}: {traceback.format_exc()}"))


def project(weights, budgets):
    """Project this rank's rows of weights, as they are split between ranks; what is left of them."""
    import torch.distributed as dist

    from sparsetrain.kernels import sharded

    shards = [(*w.chunk(N), *[w[:0]] * N)[dist.get_rank()].clone() for w in weights]
    sharded.project_(shards, budgets)
    return shards


def train_run(arguments, float64=True):
    """A whole run: its losses and weights are on the disk."""
    import torch

    from sparsetrain.config import RunConfig, load_config
    from sparsetrain.train import train

    torch.set_default_dtype(torch.float64 if float64 else torch.float32)
    try:
        return str(train(load_config(RunConfig, arguments)))
    finally:
        torch.set_default_dtype(torch.float32)
