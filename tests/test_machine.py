"""The peak of memory: of a stretch of work, without what came before."""

import pytest
import torch

from sparsetrain.machine import peak_bytes, reset_peak

CPU = torch.device("cpu")


def test_a_peak_before_the_reset_does_not_count_and_one_after_it_does():
    del_me = torch.ones(64 << 20)  # 256 MiB
    before = peak_bytes(CPU)
    del del_me
    if not reset_peak(CPU):
        pytest.skip("this system does not let a process reset its peak")
    assert peak_bytes(CPU) < before - (200 << 20)
    again = torch.ones(64 << 20)
    assert peak_bytes(CPU) > before - (50 << 20)
    del again
