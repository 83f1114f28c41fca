"""Says what a figure was measured on: device, threads, versions, commit, date."""

import platform
import resource
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "numpy", "tokenizers", "datasets", "safetensors")
VECTOR_UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def describe(device: torch.device) -> dict[str, object]:
    """The machine, the versions of the packages that matter, and the commit of the source tree this runs from.

    Returns:
        device (its name), device_type, threads, commit (with a + if the tree was changed; None outside a checkout),
        date (UTC), python, platform, versions (None for a package that is not installed).
    """
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def reset_peak(device: torch.device) -> bool:
    """Have `peak_bytes` begin anew, from what is taken now.

    Returns:
        Whether it was done: on a CPU only where Linux lets a process do so.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5): resets the peak resident set
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """The most memory since `reset_peak`, or so far: of this process, or on CUDA of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says begins with the peak of the process that started this one
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name, and which of the vector units it has that decide about speed."""
    found: dict[str, str] = {}
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        pairs = (line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        found = {key.strip(): value.strip() for key, value in pairs}
    has = found.get("flags", found.get("Features", "")).split()
    name = found.get("model name") or platform.processor() or platform.machine()
    return " ".join([name, *(unit for unit in VECTOR_UNITS if unit in has)])


def _commit() -> str | None:
    """The commit of the source tree this runs from, `+` if it was changed; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        ask = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12", "--match=-"]
        done = subprocess.run(ask, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
