"""Compiles the C files beside this one for this processor, on first use, and loads them."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from torch import Tensor

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = ("topk.c", "tiles.c", "attention.c", "sparse_linear.c", "dense_gradient.c", "sparsify.c")
# OpenMP's calls are left open and find the runtime that torch has loaded: one pool of threads for both. Where the
# compiler speaks to another runtime (clang), loading fails and the same code is built without threads.
FLAG_SETS = (["-fopenmp"], [])


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be compiled or loaded; one warning then or without threads."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    slower = "training runs on numpy and torch, several times slower"
    if compiler is None:
        log.warning("no C compiler (cc, gcc, clang) found: %s", slower)
        return None
    for flags in FLAG_SETS:
        try:
            loaded = ctypes.CDLL(str(_compiled(compiler, flags)))
        except (OSError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", None) or error
            continue
        if not flags:
            log.warning("the C kernels run on one thread: %s has not the OpenMP that torch has: %s", compiler, detail)
        return loaded
    log.warning("could not compile or load the C kernels: %s: %s", slower, detail)
    return None


def call(name: str, *arguments: Tensor | int | float | None, threads: int | None = None) -> int:
    """Call a C function on contiguous tensors; an int is passed as int64, a float as double, threads as int32.

    Returns:
        What the function does, an int32; of one that returns nothing, anything.
    """
    passed = [_passed(a) for a in arguments]
    return getattr(library(), name)(*passed, *(() if threads is None else (ctypes.c_int32(threads),)))


def _passed(argument: Tensor | int | float | None):
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return None
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def _compiled(compiler: str, flags: list[str]) -> Path:
    """The compiled library; written whole, since several processes may compile at once."""
    binary = _cache_folder() / f"kernels-{_fingerprint(compiler, flags)}.so"
    if not binary.exists():
        binary.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=binary.parent) as folder:
            objects = [str(Path(folder) / f"{source}.o") for source in SOURCES]
            for source, made in zip(SOURCES, objects, strict=True):
                _call(compiler, "-O3", "-march=native", "-fPIC", *flags, "-c", str(FOLDER / source), "-o", made)
            whole = str(Path(folder) / "whole.so")
            _call(compiler, "-shared", *objects, "-lm", "-o", whole)
            os.replace(whole, binary)
    return binary


def _call(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparsetrain"


def _fingerprint(compiler: str, flags: list[str]) -> str:
    """Of the sources and the processor: a home folder may be shared by machines of several kinds."""
    cpuinfo = Path("/proc/cpuinfo")
    features = (
        next((s for s in cpuinfo.read_text().splitlines() if s.startswith(("flags", "Features"))), "")
        if cpuinfo.exists()
        else platform.processor()
    )
    sources = b"".join((FOLDER / source).read_bytes() for source in SOURCES)
    return hashlib.sha256(sources + repr((features, compiler, flags)).encode()).hexdigest()[:16]
