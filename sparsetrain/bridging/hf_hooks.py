"""What is hooked to the blocks of a Hugging Face model: rows that enter, edits, and reading the residual stream."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.bridging.residuals import Edit, Entrance, hooked

Hook = tuple[nn.Module, str, Callable]


@dataclass(frozen=True)
class Block:
    """A block and what matters inside it.

    Attributes:
        index: l.
        module: the block.
        write: the module whose output alone stands between what enters the block and what its MLP reads; None where
            attention and MLP read the stream at once.
        mid: the first module that reads the stream after `write`.
        attn_norm: the norm that attention reads through, and the MLP too if there is no `mlp_norm`.
        mlp_norm: the norm that the MLP reads through.
    """

    index: int
    module: nn.Module
    write: nn.Module | None
    mid: nn.Module | None
    attn_norm: nn.Module | None
    mlp_norm: nn.Module | None

    @property
    def resid_pre(self) -> str:
        return f"blocks.{self.index}.resid_pre"

    @property
    def resid_mid(self) -> str:
        return f"blocks.{self.index}.resid_mid"


def stream(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The residual stream among what a module is called with: its first argument; None if it has none."""
    return args[0] if args else next(iter(kwargs.values()), None)


def with_stream(args: tuple, kwargs: dict, x: Tensor) -> tuple[tuple, dict]:
    """What a module is called with, with another residual stream."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})


def written(out: Any) -> Any:
    """The tensor among what a module gives back: its first part."""
    return out[0] if isinstance(out, (tuple, list)) and out else out


def with_written(out: Any, x: Tensor) -> Any:
    """What a module gives back, with another tensor in it."""
    return type(out)((x, *out[1:])) if isinstance(out, (tuple, list)) else x


def keep(seen: dict[str, Tensor], name: str, module: nn.Module, at: str) -> Hook:
    """Keeps the residual stream at the `in` or `out` of a module."""

    def hook(module: nn.Module, args: tuple, kwargs: dict, *out: Any) -> None:
        seen[name] = written(out[0]) if out else stream(args, kwargs)

    return module, at, hook


def change(module: nn.Module, edit: Edit) -> Hook:
    """Edits what a module gives back."""
    return module, "out", lambda module, args, kwargs, out: with_written(out, edit(written(out)))


def enter_block(block: Block, batch: Entrance) -> list[Hook]:
    """Rows enter where a block begins; those that enter between attention and MLP too, with attention silent.

    With zero for what attention writes the MLP reads just what entered, to the bit, whatever stands between the two.
    """
    size = 0

    def at_start(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        nonlocal size
        x = batch.put(block.resid_mid, batch.put(block.resid_pre, stream(args, kwargs)))
        size = len(x)
        return with_stream(args, kwargs, x)

    def silence(x: Tensor) -> Tensor:
        rows = batch.rows_at(block.resid_mid, size)
        return x.reshape(size, -1).index_fill(0, rows, 0).reshape(x.shape)  # some modules merge rows and tokens

    hooks: list[Hook] = []
    if {block.resid_pre, block.resid_mid} & batch.entering.keys():
        hooks.append((block.module, "in", at_start))
    if block.resid_mid in batch.entering:
        hooks.append(change(block.write, silence))
    return hooks


def steer_block(block: Block, edits: Mapping[str, Edit]) -> list[Hook]:
    """Edits of the residual where a block begins, and between its attention and its MLP.

    For the latter the block runs up to there first; then what the edit gives enters it with attention silent.
    """
    pre, mid = edits.get(block.resid_pre), edits.get(block.resid_mid)
    silent = False

    def at_start(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        nonlocal silent
        silent = False
        if pre:
            args, kwargs = with_stream(args, kwargs, pre(stream(args, kwargs)))
        if mid:
            reached = _reach_mid(block, args, kwargs).reshape(stream(args, kwargs).shape)
            args, kwargs = with_stream(args, kwargs, mid(reached))
            silent = True
        return args, kwargs

    hooks: list[Hook] = [(block.module, "in", at_start)] if pre or mid else []
    return hooks + ([change(block.write, lambda x: torch.zeros_like(x) if silent else x)] if mid else [])


class _Reached(Exception):
    """A block was run as far as it had to be."""

    def __init__(self, x: Tensor):
        self.x = x


def _reach_mid(block: Block, args: tuple, kwargs: dict) -> Tensor:
    """The residual between a block's attention and its MLP, run up to there."""

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        raise _Reached(stream(args, kwargs))

    try:
        with hooked([(block.mid, "in", stop)]):
            block.module.forward(*args, **kwargs)
    except _Reached as reached:
        return reached.x
    raise AssertionError("a block must reach its MLP")
