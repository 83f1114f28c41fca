"""Several processes that train one model, as torchrun starts them: each takes its rows of every batch.

Each holds the whole model and takes the same step by gradients that are averaged over all; or, with `run.sharded`, each
holds some rows of every weight and its moments (FSDP). In a process on its own all of this comes to nothing.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsetrain.config import ConfigError, RunConfig

T = TypeVar("T")
log = logging.getLogger(__name__)

NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # besides WORLD_SIZE, from whoever starts the processes


class ParallelError(RuntimeError):
    """Processes that cannot go on together; the last good checkpoint is kept."""


def n_launched() -> int:
    """How many processes were started together, as torchrun tells them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """The number of this process among those, from 0."""
    return int(os.environ["RANK"]) if n_launched() > 1 else 0


def n_ranks() -> int:
    """How many processes train together; 1 outside `joined`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0; only process 0 writes files."""
    return dist.get_rank() if n_ranks() > 1 else 0


@contextmanager
def joined(config: RunConfig, device: torch.device) -> Iterator[None]:
    """Train together with the other processes that were started with this one, if there are any.

    Raises:
        ConfigError: they cannot train this config together, or not on this machine; all reasons are listed.
        ParallelError: another process is gone.
    """
    if n_launched() == 1:
        if config.run.sharded:
            log.warning("run.sharded has no effect in one process; start several with torchrun")
        yield
        return
    _refuse(config, device)
    begins = not dist.is_initialized()
    if begins:
        _join(device)
    if rank():
        logging.getLogger("sparsetrain").setLevel(logging.ERROR)  # the first says it all
    log.info("%d processes train together", n_ranks())
    with _others():
        yield
    if begins:  # not after an error: the others may be gone, or wait for ever
        dist.destroy_process_group()


def _refuse(config: RunConfig, device: torch.device) -> None:
    n, problems = n_launched(), []
    if missing := [name for name in NEEDED if name not in os.environ]:
        problems.append(f"WORLD_SIZE={n} must come with {', '.join(missing)}, got none; start with torchrun")
    parts = n * config.train.accumulate
    if config.train.batch_size % parts:
        problems.append(
            f"train.batch_size must be a multiple of processes x train.accumulate = {n} x {config.train.accumulate}, "
            f"so that each takes as many sequences, got {config.train.batch_size}"
        )
    backends = ("gloo", "nccl") if device.type == "cuda" else ("gloo",)
    there = dist.is_available() and {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    if without := [name for name in backends if not (there and there[name])]:
        problems.append(f"torch must have been built with {' and '.join(without)} to train in {n} processes, got none")
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE", n))
    if device.type == "cuda" and n_here > torch.cuda.device_count():
        problems.append(
            f"there must be a CUDA device for each of the {n_here} processes of this machine, got "
            f"{torch.cuda.device_count()}; start as many with --nproc-per-node, or set run.device=cpu"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _join(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with _others("could not be reached"):
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


@contextmanager
def _others(what: str = "are gone") -> Iterator[None]:
    """Say in our words what a collective raises: ours, FSDP's, or that of the projection."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        said = str(error).splitlines()[0]
        raise ParallelError(
            f"the other processes {what} ({said}); the same command goes on from the last checkpoint"
        ) from error


def first_then_others(prepare: Callable[[], T]) -> T:
    """Call a function in process 0, and then in the others, which find what it has left on the disk."""
    if n_ranks() == 1:
        return prepare()
    found = prepare() if rank() == 0 else None
    anyone(False)  # waits for all
    return found if rank() == 0 else prepare()


def mine(rows: Tensor) -> Tensor:
    """This process' rows of a batch: every n-th, so that it has its share of any first part of it as well."""
    return rows[rank() :: n_ranks()]


def n_mine(n_rows: int) -> int:
    """How many of the first `n_rows` of a batch are this process'."""
    return len(range(rank(), n_rows, n_ranks()))


def sum_(x: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place; x itself."""
    if n_ranks() > 1:
        dist.all_reduce(x)
    return x


def sums(*numbers: float) -> list[float]:
    """Numbers, each added up over all processes, in float64."""
    return list(numbers) if n_ranks() == 1 else sum_(torch.tensor(numbers, dtype=torch.float64)).tolist()


def anyone(flag: bool) -> bool:
    """Whether a flag is set in any process: what all of them then do."""
    return flag if n_ranks() == 1 else sums(flag)[0] > 0


def average_(tensors: Iterable[Tensor]) -> None:
    """Replace tensors, which have one shape and type in all processes, by their means over them: all in one message."""
    if n_ranks() == 1:
        return
    tensors = list(tensors)
    means = sum_(torch.cat([x.flatten() for x in tensors])).div_(n_ranks())
    for x, mean in zip(tensors, means.split([x.numel() for x in tensors]), strict=True):
        x.copy_(mean.view_as(x))


def shard_(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Leave this process its rows of every parameter, on the device; a pass gathers a block's when it comes to it.

    The host has to hold the whole model once for each of its processes, at the start and when a run is resumed.

    Args:
        model: whose `loss` is called, beside `forward`.
        blocks: its parts that are gathered one by one; what is in none is gathered for the whole of a pass.

    Source: `torch.distributed.fsdp.fully_shard`.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = dist.init_device_mesh(device.type, (n_ranks(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # else a pass without gradients would leave it whole
    register_fsdp_forward_method(model, "loss")


def is_sharded(x: Tensor) -> bool:
    """Whether a tensor's rows lie on several processes."""
    return hasattr(x, "placements")


def local(x: Tensor) -> Tensor:
    """This process' rows of a sharded tensor, detached, in the same memory; another tensor is given back."""
    return x.detach().to_local() if is_sharded(x) else x


def whole(x: Tensor) -> Tensor:
    """A sharded tensor's rows from all processes, which must all call this; another tensor is given back."""
    return x.full_tensor() if is_sharded(x) else x


def collected(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors whole, one at a time, on the CPU of process 0; the others get nothing. All must call this."""
    found = {}
    for name, x in tensors.items():
        full = whole(x)
        if rank() == 0:
            found[name] = full.cpu() if is_sharded(x) else full
    return found


def like(laid_out: Tensor, x: Tensor) -> Tensor:
    """A whole tensor laid out as another: this process' rows of it where that one is sharded, else itself."""
    if not is_sharded(laid_out):
        return x
    made = torch.empty_like(laid_out)
    local(made).copy_([*x.chunk(n_ranks()), *[x[:0]] * n_ranks()][rank()])
    return made


def refuse_drift(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Make sure that all processes hold the same weights, bit for bit, where each holds them whole.

    Raises:
        ParallelError: they do not, as on machines whose processors compute differently.
    """
    if n_ranks() == 1:
        return
    held = {name: p.detach() for name, p in parameters if not is_sharded(p)}
    if not held:
        return
    bits = torch.stack([p.contiguous().view(torch.int32).sum() for p in held.values()]).cpu()
    least, most = bits.clone(), bits.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if drifted := [name for name, same in zip(held, least == most, strict=True) if not same]:
        raise ParallelError(
            f"all processes must hold the same weights, got others of {', '.join(drifted)}; run them on one kind of "
            "machine"
        )
