"""How activations lie in memory: token-major as torch has them, channel-major, and blocks of the latter."""

import torch
from torch import Tensor

from sparsetrain.kernels import cpu, reference

BLOCK = {"cpu": 128, "cuda": 1024}  # tokens of a block that token-major activations are converted to


def channel_major(x: Tensor) -> Tensor:
    """x (..., T, K) with its tokens contiguous, differentiable; a copy unless it is so already."""
    if reference.is_channel_major(x):
        return x
    return swapped(x.reshape(-1, *x.shape[-2:])).mT.view(x.shape)


def block_tokens(x: Tensor) -> int:
    """T, the tokens of a block: those of a sequence of what is channel-major, else as many as suit the device."""
    if reference.is_channel_major(x):
        return x.shape[-2]
    n = x.numel() // x.shape[-1]
    whole = BLOCK.get(x.device.type, n)
    return whole if n % max(1, whole) == 0 else n


def to_blocks(x: Tensor) -> Tensor:
    """(..., K) to channel-major blocks (B, K, T): a view of what is channel-major, a transposed copy of the rest."""
    if reference.is_channel_major(x):
        return x.mT.reshape(-1, x.shape[-1], x.shape[-2])
    return swapped(x.reshape(-1, block_tokens(x), x.shape[-1]))


def swapped(x: Tensor) -> Tensor:
    """x.mT, contiguous, for x (B, R, C)."""
    if x.device.type == "cpu" and x.dtype in cpu.NAMES:
        return _transposed(x.contiguous())
    return x.mT.contiguous()


@torch.library.custom_op("sparsetrain::transposed", mutates_args=())
def _transposed(x: Tensor) -> Tensor:
    return cpu.transposed(x)


@_transposed.register_fake
def _(x):
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1])


_transposed.register_autograd(lambda ctx, grad: swapped(grad))


def empty_laid_out_as(x: Tensor) -> Tensor:
    """An empty tensor in the layout of x, channel-major or else token-major."""
    if reference.is_channel_major(x):
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)
