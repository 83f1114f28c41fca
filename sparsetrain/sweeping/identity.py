"""What makes a run what it is: its settings, less those that change none of its numbers."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

# Keys that change where and how a point is computed, but neither its model nor a number of its row.
FREE = (
    "run.name", "run.out", "run.device", "run.threads", "run.compile", "run.sharded", "data.cache",
    "train.accumulate", "train.checkpoint_activations", "train.log_every", "train.histogram_every",
    "train.checkpoint_every", "train.keep_checkpoints",
)  # fmt: skip


def identity(config: Any) -> dict[str, Any]:
    """The leaves of a config that are not at their defaults, but for those in FREE, as plain values."""
    return {key: value for key, value in not_default(config) if key not in FREE}


def not_default(config: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of a config that differ from their defaults: keys that a later version adds change nothing."""
    yield from _differing(config, _default(type(config)), "")


def _differing(config: Any, default: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name in (f.name for f in fields(default)):
        ours, theirs = getattr(config, name), getattr(default, name)
        if ours != theirs and is_dataclass(theirs):
            yield from _differing(ours, theirs, f"{prefix}{name}.")
        elif ours != theirs:
            yield f"{prefix}{name}", ours


@cache
def _default(kind: type) -> Any:
    return kind()
