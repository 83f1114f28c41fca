"""The CPU path: exact AbsTopK and projection by bisection, in C that is compiled on first use.

Without a C compiler the same functions run on numpy's quickselect, several times slower.
"""

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

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
SOURCE = Path(__file__).with_name("topk.c")


def abs_topk(x: Tensor, k: int) -> Tensor:
    """`reference.abs_topk` without its gradient, for float32 and bfloat16 on the CPU."""
    x = x.contiguous()
    library = _library()
    if library is None:
        return _abs_topk_numpy(x, k)
    out = torch.empty_like(x)
    width = x.shape[-1]
    if x.numel():
        function = getattr(library, f"abs_topk_{NAMES[x.dtype]}")
        function(x.data_ptr(), out.data_ptr(), x.numel() // width, width, k)
    return out


def abs_topk_backward(grad: Tensor, out: Tensor) -> Tensor:
    """The gradient of `abs_topk` at its input, from its output."""
    library = _library()
    if library is None:
        return grad * (out != 0)
    grad = grad.contiguous()
    in_grad = torch.empty_like(grad)
    function = getattr(library, f"abs_topk_backward_{NAMES[grad.dtype]}")
    function(grad.data_ptr(), out.data_ptr(), in_grad.data_ptr(), grad.numel())
    return in_grad


def project(weight: Tensor, k: int, min_per_row: int = 0, min_per_column: int = 0) -> Tensor:
    """`reference.project` for float32 on the CPU."""
    if not min_per_row and not min_per_column:
        return abs_topk(weight.flatten(), k).view_as(weight)
    kept = torch.zeros_like(weight)
    if min_per_row:
        kept = abs_topk(weight, min_per_row)
    if min_per_column:
        by_column = abs_topk(weight.t(), min_per_column).t()
        kept = torch.where(by_column != 0, by_column, kept)
    n_kept = int(kept.count_nonzero())
    if n_kept >= k:
        return abs_topk(kept.flatten(), k).view_as(weight)
    rest = torch.where(kept != 0, 0, weight)
    return kept + abs_topk(rest.flatten(), k - n_kept).view_as(weight)


def _abs_topk_numpy(x: Tensor, k: int) -> Tensor:
    magnitude = x.abs().nan_to_num(nan=torch.inf)
    if k == 0:
        return torch.zeros_like(x)
    rows = magnitude.float().numpy()
    kth = rows.shape[-1] - k
    threshold = torch.from_numpy(np.partition(rows, kth, axis=-1)[..., kth : kth + 1]).to(x.dtype)
    above = magnitude > threshold
    tied = magnitude == threshold
    room = k - above.sum(-1, keepdim=True)
    return torch.where(above | (tied & (tied.cumsum(-1) <= room)), x, 0)


@cache
def _library() -> ctypes.CDLL | None:
    """Compile topk.c for this processor, once for each version of it, and load it."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        log.warning("no C compiler (cc, gcc, clang) found: AbsTopK runs on numpy, several times slower")
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        log.warning("could not compile or load %s: AbsTopK runs on numpy, several times slower: %s", SOURCE, detail)
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for name in NAMES.values():
        getattr(library, f"abs_topk_{name}").argtypes = [pointer, pointer, size, size, size]
        getattr(library, f"abs_topk_backward_{name}").argtypes = [pointer, pointer, pointer, size]
    return library


def _compiled(compiler: str) -> Path:
    """The compiled library; written whole, since several processes may compile at once."""
    binary = _cache_folder() / f"topk-{_fingerprint(compiler)}.so"
    if not binary.exists():
        binary.parent.mkdir(parents=True, exist_ok=True)
        unfinished = tempfile.mktemp(suffix=".so", dir=binary.parent)
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(SOURCE), "-o", unfinished]
        subprocess.run(command, capture_output=True, text=True, check=True)
        os.replace(unfinished, binary)
    return binary


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparsetrain"


def _fingerprint(compiler: str) -> str:
    """Of the source and the processor: a home folder may be shared by machines of several kinds."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = (
        next((s for s in cpuinfo.read_text().splitlines() if s.startswith(("flags", "Features"))), "")
        if cpuinfo.exists()
        else platform.processor()
    )
    return hashlib.sha256(SOURCE.read_bytes() + flags.encode() + compiler.encode()).hexdigest()[:16]
