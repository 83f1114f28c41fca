"""The peak of memory: of a stretch of work, without what came before."""

import subprocess
import sys
import textwrap

import pytest


def test_a_peak_before_the_reset_does_not_count_and_one_after_it_does():
    """In a process of its own: one that has trained keeps freed memory."""
    program = """
        import torch
        from sparsetrain.machine import peak_bytes, reset_peak
        cpu = torch.device("cpu")
        x = torch.ones(64 << 20)  # 256 MiB
        print(peak_bytes(cpu))
        del x
        print(int(reset_peak(cpu)), peak_bytes(cpu))
        x = torch.ones(64 << 20)
        print(peak_bytes(cpu))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    before, reset, low, high = map(int, done.stdout.split())
    if not reset:
        pytest.skip("this system does not let a process reset its peak")
    assert low < before - (200 << 20)
    assert high > before - (50 << 20)
