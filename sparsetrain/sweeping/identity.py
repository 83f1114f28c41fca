"""What makes a run what it is: its settings, less those that change none of its numbers."""

from collections.abc import Iterator
from functools import cache
from typing import Any

from sparsetrain.config import known_keys, value_of

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
    for key, default in _defaults(type(config)).items():
        if (value := value_of(config, key)) != default:
            yield key, value


@cache
def _defaults(kind: type) -> dict[str, Any]:
    return {key: value_of(kind(), key) for key, _ in known_keys(kind)}
