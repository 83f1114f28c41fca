"""Keeps memory that torch frees, for the next tensor."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST = 1 << 30  # bytes of a tensor whose memory is still kept


def keep_freed() -> bool:
    """Have this process keep the memory of freed tensors of up to a GiB; only glibc is told.

    By default glibc gives the memory of tensors above 32 MB, and the free end of its heap, back to the system; a
    training step frees all it took, so the next one has every page mapped and zeroed anew (docs/log.md, 2026-11-21).
    The peak of the process stays about the same: what it keeps is what the next step takes. It holds until the process
    ends, also for what runs after training.

    Returns:
        Whether it was done: not with another C library, nor where glibc refuses.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1))
