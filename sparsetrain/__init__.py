"""Train weight-sparse transformers from scratch and read their circuits."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsetrain.checkpoint import load
    from sparsetrain.config import RunConfig, load_config
    from sparsetrain.prune_config import PruneConfig
    from sparsetrain.pruning.circuit import load_circuit
    from sparsetrain.pruning.prune import prune
    from sparsetrain.train import train

_PUBLIC = {
    "load": ("sparsetrain.checkpoint", "load"),
    "load_config": ("sparsetrain.config", "load_config"),
    "RunConfig": ("sparsetrain.config", "RunConfig"),
    "PruneConfig": ("sparsetrain.prune_config", "PruneConfig"),
    "train": ("sparsetrain.train", "train"),
    "prune": ("sparsetrain.pruning.prune", "prune"),
    "load_circuit": ("sparsetrain.pruning.circuit", "load_circuit"),
}
__all__ = ["PruneConfig", "RunConfig", "load", "load_circuit", "load_config", "prune", "train"]


def __getattr__(name: str):
    """Import on first use: `import sparsetrain` alone costs nothing."""
    import importlib

    if name not in _PUBLIC:
        raise AttributeError(f"module 'sparsetrain' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    """What a notebook completes; without it the names that are imported late are not offered."""
    return sorted({*globals(), *__all__})


def _keep_bits_of_mkl() -> None:
    """Have MKL's products give the same bits whatever the number of threads; it reads this at its first product.

    Other makers' processors do not need it here, and may be slowed.

    Source: Intel oneMKL developer guide, conditional numerical reproducibility.
    """
    import os
    from pathlib import Path

    processors = Path("/proc/cpuinfo")
    if processors.exists() and "GenuineIntel" in processors.read_text():
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


_keep_bits_of_mkl()
