"""Two real processes in one group that call what a test names: functions of the test's own file."""

import importlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

N = 2


@contextmanager
def group() -> Iterator[Callable[..., list[Any]]]:
    """A function that has both processes call a function, and gives back what each returned."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    pipes, processes = [], []
    for rank in range(N):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(rank, port, theirs), daemon=True))
        processes[-1].start()
        pipes.append(ours)

    def call(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in pipes:
            pipe.send((function.__module__, function.__name__, arguments))
        answers = [pipe.recv() for pipe in pipes]
        assert not any(error for _, error in answers), "\n".join(str(error) for _, error in answers)
        return [value for value, _ in answers]

    yield call
    for process in processes:
        process.kill()
        process.join()


def environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells each process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": N, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in numbers.items()}}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(rank: int, port: int, pipe) -> None:
    os.environ.update(environment(rank, port))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((getattr(importlib.import_module(module), name)(*arguments), None))
        except Exception:  # whatever it was is told to the test, which fails with it
            pipe.send((None, f"rank {rank}: {traceback.format_exc()}"))
