"""The C part: what it moves, and machines whose compiler fails or knows no OpenMP."""

import functools
import os
import shutil

import pytest
import torch

from sparsetrain.kernels import cpu, native


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 16, 16), (3, 33, 17), (1, 5, 40), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_transpose_is_one(shape, dtype):
    x = torch.randn(shape).to(dtype)
    assert torch.equal(cpu.transposed(x), x.mT)
    assert cpu.transposed(x).is_contiguous()


def test_a_compiler_that_fails_is_said_once_and_not_fatal(monkeypatch, caplog, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such target >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert native.library.__wrapped__() is None
    assert "no such target" in caplog.text


def test_a_compiler_of_another_openmp_is_said_once_and_builds_without_threads(monkeypatch, caplog, tmp_path):
    real = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if real is None:
        pytest.skip("needs a C compiler")
    other = tmp_path / "bin" / "cc"
    other.parent.mkdir()
    other.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) echo other runtime >&2; exit 1;; esac\nexec {real} "$@"\n')
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{other.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = functools.cache(native.library.__wrapped__)
    assert library() is library() is not None
    (message,) = caplog.messages
    assert "run on one thread" in message and "other runtime" in message
