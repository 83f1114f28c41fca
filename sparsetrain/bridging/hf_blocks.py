"""Where a Hugging Face model keeps its residual stream, found by running it on a few tokens: no table of names.

A block whose attention and MLP read the stream one after the other (x + a, then x + a + m) is told from one where both
read it at once (x + a + m) by silencing each of its modules in turn. What is silenced in the first kind is the module
whose output is added last before the second read: with zero in its place the MLP reads just what entered the block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.bridging.residuals import BridgeError, hooked

TOLERANCE = 1e-5  # of the largest value: what float32 loses when sums are taken in another order


@dataclass(frozen=True)
class Sublayers:
    """What is inside a block, by the names of its modules.

    Attributes:
        write: the module whose output alone stands between what enters the block and what its MLP reads; None where
            attention and MLP read the stream at once.
        mid: the first module that reads the stream after `write`.
        attn_norm: the norm that attention reads through, and the MLP too if there is no `mlp_norm`.
        mlp_norm: the norm that the MLP reads through.
    """

    write: str | None = None
    mid: str | None = None
    attn_norm: str | None = None
    mlp_norm: str | None = None


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks of a causal language model: its one list of as many modules as it has layers.

    Raises:
        BridgeError: it is an encoder with a decoder, or no such list, or more than one, is found.
    """
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise BridgeError(f"the dense model must be a decoder alone, got {type(model).__name__} with an encoder")
    n_layers = getattr(config, "num_hidden_layers", None)
    lists = {
        name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and n_layers and len(m) == n_layers
    }
    outer = {name: m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if len(outer) != 1:
        raise BridgeError(
            f"{type(model).__name__} must have one list of {n_layers} blocks (num_hidden_layers) for residual sites, "
            f"got {', '.join(outer) or 'none'}"
        )
    return next(iter(outer.values()))


def stream(args: tuple, kwargs: dict) -> Tensor:
    """The residual stream among what a module is called with: its first argument."""
    return args[0] if args else next(iter(kwargs.values()))


def with_stream(args: tuple, kwargs: dict, x: Tensor) -> tuple[tuple, dict]:
    """What a module is called with, with another residual stream."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})


def written(out: Any) -> Any:
    """The tensor among what a module gives back: its first part."""
    return out[0] if isinstance(out, (tuple, list)) and out else out


def with_written(out: Any, x: Tensor) -> Any:
    """What a module gives back, with another tensor in it."""
    return type(out)((x, *out[1:])) if isinstance(out, (tuple, list)) else x


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal but for rounding."""
    scale = max(a.abs().max().item(), b.abs().max().item(), 1e-30)
    return (a - b).abs().max().item() <= TOLERANCE * scale


def is_norm(module: nn.Module) -> bool:
    """Whether a module can be a norm: it has no matrix."""
    return all(p.dim() < 2 for p in module.parameters())


def find_sublayers(block: nn.Module, args: tuple, kwargs: dict, guess: Sublayers) -> Sublayers:
    """The parts of a block.

    Args:
        block: a module that adds to the residual stream.
        args, kwargs: what it is called with in some forward pass.
        guess: those of another block of the model, which are tried first.
    """
    x = stream(args, kwargs)
    plain = Trace(block, args, kwargs)
    norms = [name for name in plain.called if plain.is_norm_of(name, x)]
    write, mid = _find_mid(block, args, kwargs, plain, guess)
    if mid is not None:
        return Sublayers(write, mid, next(iter(norms), None), mid if is_norm(block.get_submodule(mid)) else None)
    return Sublayers(None, None, *(norms + [None, None])[:2])


class Trace:
    """What the modules inside a block read and wrote in one call of it, in order.

    Args:
        block, args, kwargs: what is called.
        silenced: a module whose output is set to zero.
    """

    def __init__(self, block: nn.Module, args: tuple, kwargs: dict, silenced: str | None = None):
        self.block = block
        self.called: dict[str, Tensor] = {}
        self.finished: dict[str, Tensor] = {}
        self.before: dict[str, list[str]] = {}  # for a module, those that had finished when it was called
        self.shape = stream(args, kwargs).shape
        hooks = []
        for name, module in block.named_modules():
            if name:
                hooks += [(module, "in", self._on_call(name)), (module, "out", self._on_finish(name, silenced))]
        with hooked(hooks):
            self.out = written(block.forward(*args, **kwargs))

    def is_norm_of(self, name: str, x: Tensor) -> bool:
        """Whether a module is a norm that reads x."""
        reads, out = self.called[name], self.finished.get(name)
        return is_norm(self.block.get_submodule(name)) and close(reads, x) and out is not None and not close(out, x)

    def _on_call(self, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = stream(args, kwargs) if args or kwargs else None
            if self._is_stream(x):
                self.called[name], self.before[name] = x.reshape(self.shape), list(self.finished)

        return hook

    def _on_finish(self, name: str, silenced: str | None):
        def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
            x = written(out)
            if not self._is_stream(x):
                return None
            self.finished[name] = x.reshape(self.shape)
            return with_written(out, torch.zeros_like(x)) if name == silenced else None

        return hook

    def _is_stream(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.shape[-1:] == self.shape[-1:] and x.numel() == self.shape.numel()


def _find_mid(
    block: nn.Module, args: tuple, kwargs: dict, plain: Trace, guess: Sublayers
) -> tuple[str, str] | tuple[None, None]:
    """`write` and `mid` of a block, or None twice."""
    x = stream(args, kwargs)
    silent: dict[str, Trace] = {}
    for write, mid in _pairs(plain, x, guess):
        trace = silent.setdefault(write, None) or Trace(block, args, kwargs, write)
        silent[write] = trace
        if mid in trace.called and close(trace.called[mid], x) and _splits(block, args, kwargs, plain, write, mid):
            return write, mid
    return None, None


def _pairs(plain: Trace, x: Tensor, guess: Sublayers) -> Iterator[tuple[str, str]]:
    """What may be write and mid: those of another block, then modules by when they are called, and finish last."""
    if guess.mid in plain.called and guess.write in plain.finished:
        yield guess.write, guess.mid
    for mid, reads in plain.called.items():
        if not close(reads, x):
            yield from ((write, mid) for write in reversed(plain.before[mid]))


def _splits(block: nn.Module, args: tuple, kwargs: dict, plain: Trace, write: str, mid: str) -> bool:
    """Whether what a block gives back follows from what its MLP reads: entering there with `write` silent repeats it."""
    entered = Trace(block, *with_stream(args, kwargs, plain.called[mid]), write)
    return close(entered.called[mid], plain.called[mid]) and close(entered.out, plain.out)
