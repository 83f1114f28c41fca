"""Where a Hugging Face model keeps its residual stream, found by running it on a few tokens: no table of names.

A block whose attention and MLP read the stream one after the other (x + a, then x + a + m) is told from one where both
read it at once (x + a + m) by silencing each of its modules in turn. What is silenced in the first kind is the module
whose output is added last before the second read: with zero in its place the MLP reads just what entered the block.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsetrain.bridging.hf_hooks import Block, stream, with_stream, with_written, written
from sparsetrain.bridging.residuals import BridgeError, hooked

TOLERANCE = 1e-5  # of the largest value: what float32 loses when sums are taken in another order


class Names(NamedTuple):
    """Of a block's modules; see `hf_hooks.Block`."""

    write: str | None = None
    mid: str | None = None
    attn_norm: str | None = None
    mlp_norm: str | None = None


def find_list(model: nn.Module) -> nn.ModuleList:
    """The blocks of a causal language model: its one list of as many modules as it has layers.

    Raises:
        BridgeError: it is an encoder with a decoder, or no such list, or more than one, is found.
    """
    if model.config.is_encoder_decoder:
        raise BridgeError(f"the dense model must be a decoder alone, got {type(model).__name__} with an encoder")
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers > 0}
    outer = {name: m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if len(outer) != 1:
        raise BridgeError(
            f"{type(model).__name__} must have one list of {n_layers} blocks (num_hidden_layers) for residual sites, "
            f"got {', '.join(outer) or 'none'}"
        )
    return next(iter(outer.values()))


def find_blocks(blocks: nn.ModuleList, run: Callable[[], Any]) -> list[Block]:
    """What is inside each block.

    Args:
        blocks: see `find_list`.
        run: runs the model on a few tokens.
    """
    found: list[Names] = []

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        before = found[-1] if found and _alike(module, blocks[len(found) - 1]) else None
        found.append(_find_names(module, args, kwargs, before))

    with hooked([(block, "in", look) for block in blocks]):
        run()
    return [
        Block(l, block, *(name and block.get_submodule(name) for name in names))
        for l, (block, names) in enumerate(zip(blocks, found, strict=True))
    ]


def find_final_norm(model: nn.Module, blocks: nn.ModuleList, run: Callable[[], Any]) -> nn.Module | None:
    """The norm that reads what the last block gives; None where there is none, as in models that norm in each block.

    Args:
        model: all of it.
        blocks, run: see `find_blocks`.
    """
    last: list[Tensor] = []
    norms: list[nn.Module] = []

    def at_end(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        last.append(written(out))

    def look(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        if last and stream(args, kwargs) is last[0] and out.shape == last[0].shape:
            norms.append(module)

    inside = set(blocks.modules())
    outside = [m for m in model.modules() if m not in inside and _is_norm(m)]
    with hooked([(blocks[-1], "out", at_end), *((m, "out", look) for m in outside)]):
        run()
    return norms[0] if norms else None


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal but for rounding."""
    scale = max(a.abs().max().item(), b.abs().max().item(), 1e-30)
    return (a - b).abs().max().item() <= TOLERANCE * scale


class Trace:
    """What the modules inside a block read and wrote of the residual stream's shape in one call of it, in order.

    Args:
        block: it is called past its own hooks.
        args, kwargs: with these.
        silenced: a module whose output is set to zero.
    """

    def __init__(self, block: nn.Module, args: tuple, kwargs: dict, silenced: str | None = None):
        self.block = block
        self.shape = stream(args, kwargs).shape
        self.called: dict[str, Tensor] = {}
        self.finished: dict[str, Tensor] = {}
        self.before: dict[str, list[str]] = {}  # for a module, those that had finished when it was called
        hooks = []
        for name, module in block.named_modules():
            if name:
                hooks += [(module, "in", self._on_call(name)), (module, "out", self._on_finish(name, silenced))]
        with hooked(hooks):
            self.out = written(block.forward(*args, **kwargs))

    def norms_of(self, x: Tensor) -> list[str]:
        """The norms that read x."""
        readers = [name for name, reads in self.called.items() if name in self.finished and close(reads, x)]
        norms = [name for name in readers if _is_norm(self.block.get_submodule(name))]
        return [name for name in norms if not close(self.finished[name], x)]

    def _on_call(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._is_stream(x := stream(args, kwargs)):
                self.called[name], self.before[name] = x.reshape(self.shape), list(self.finished)

        return hook

    def _on_finish(self, name: str, silenced: str | None) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
            if not self._is_stream(x := written(out)):
                return None
            self.finished[name] = x.reshape(self.shape)
            return with_written(out, torch.zeros_like(x)) if name == silenced else None

        return hook

    def _is_stream(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.shape[-1:] == self.shape[-1:] and x.numel() == self.shape.numel()


def _is_norm(module: nn.Module) -> bool:
    """Whether a module can be a norm: it has no matrix."""
    return all(p.dim() < 2 for p in module.parameters())


def _alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two blocks have the same modules."""
    return [(n, type(m)) for n, m in a.named_modules()] == [(n, type(m)) for n, m in b.named_modules()]


def _find_names(block: nn.Module, args: tuple, kwargs: dict, before: Names | None) -> Names:
    """The parts of a block that is called with these; those of one like it hold for it too."""
    plain = Trace(block, args, kwargs)
    norms = [*plain.norms_of(stream(args, kwargs)), None, None]
    pairs = _pairs(plain, stream(args, kwargs)) if not before else [(before.write, before.mid)] if before.mid else []
    for write, mid in pairs:
        if _splits(block, args, kwargs, plain, write, mid):
            return Names(write, mid, norms[0], mid if _is_norm(block.get_submodule(mid)) else None)
    return Names(None, None, *norms[:2])


def _pairs(plain: Trace, x: Tensor) -> Iterator[tuple[str, str]]:
    """What may be write and mid: modules by when they are called, and finish last."""
    for mid, reads in plain.called.items():
        if not close(reads, x):
            yield from ((write, mid) for write in reversed(plain.before[mid]))


def _splits(block: nn.Module, args: tuple, kwargs: dict, plain: Trace, write: str, mid: str) -> bool:
    """Whether a block is two halves at these: with `write` silent, what enters the block is what `mid` reads, and what
    the block gives back follows from it."""
    if mid not in plain.called:
        return False
    entered = Trace(block, *with_stream(args, kwargs, plain.called[mid]), write)
    return mid in entered.called and close(entered.called[mid], plain.called[mid]) and close(entered.out, plain.out)
