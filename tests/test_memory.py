"""Freed memory is kept, and so costs no page faults."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from sparsetrain import memory
if sys.argv[1] == "keep":
    assert memory.keep_freed()
def faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(megabytes << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(128)
print(faults(64))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_a_large_tensor_in_the_place_of_a_freed_one_faults_no_pages_in():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "give back")
    }
    assert faults["keep"] < 100 < faults["give back"]


def test_another_c_library_is_left_alone(monkeypatch):
    from sparsetrain import memory

    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("nothing may be called"))
    assert not memory.keep_freed()
