"""The machine code that a GPU would run, compiled without one: no spilled registers, wide loads, few instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
ARCHITECTURES = {80, 90}
BITS_LOADED = {"token-major": 128, "float32 channel-major": 64, "bfloat16 channel-major": 32}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> list[dict]:
    """What `compile_kernels.py` prints; in its own process, since this one may interpret kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def bits(opcode: str) -> int:
    """The width of a load or store, from its opcode: LDG.E.EF.128, LDG.E.U16, LDG.E."""
    return next((int(part.lstrip("US")) for part in opcode.split(".") if part.lstrip("US").isdigit()), 32)


def test_every_kernel_compiles_for_each_architecture(kernels):
    for architecture in ARCHITECTURES:
        assert {k["kernel"] for k in kernels if k["architecture"] == architecture} >= {
            "_abs_topk", "_abs_topk_backward", "_add_floor", "_count_digits", "_keep_greatest", "_matmul",
            "_sampled_matmul", "_pack_slots",
        }  # fmt: skip


def test_no_kernel_spills_registers(kernels):
    """Spills need a stack."""
    assert not [(k["launch"], k["kernel"], k["architecture"]) for k in kernels if k["stack"]]


@pytest.mark.parametrize("layout", BITS_LOADED)
def test_abs_topk_reads_and_writes_in_words_as_wide_as_its_tile(kernels, layout):
    of_layout = [k for k in read(kernels) if k["launch"].startswith("abs_topk ") and k["launch"].endswith(layout)]
    assert of_layout
    for kernel in of_layout:
        found = {bits(opcode) for opcode in kernel["opcodes"] if opcode.startswith(("LDG", "STG"))}
        assert found == {BITS_LOADED[layout]}, kernel


def test_abs_topk_counts_with_two_additions_an_entry(kernels):
    """The compiler must see that the clamp to [0, 1] is an FADD.SAT; compares would run at half the rate."""
    for kernel in read(kernels):
        if kernel["kernel"] == "_abs_topk" and "unaligned" not in kernel["launch"]:
            assert kernel["opcodes"]["FADD.SAT"] >= 64, kernel
            assert "FMNMX" not in kernel["opcodes"], kernel


def test_nothing_is_added_atomically_in_the_products_and_the_projection(kernels):
    """Sums in no fixed order would differ from run to run."""
    of_both = [k for k in kernels if not k["launch"].startswith("abs_topk")]
    assert of_both and not [k for k in of_both if k["atomics"]]


def read(kernels: list[dict]) -> list[dict]:
    """Those whose opcodes were counted."""
    found = [k for k in kernels if "opcodes" in k]
    assert found
    return found


def of(kernels: list[dict], launch: str, name: str) -> list[dict]:
    found = [k for k in kernels if k["launch"].startswith(launch) and k["kernel"] == name]
    assert found
    return found


def test_sparse_products_gather_sixteen_bytes_at_a_time(kernels):
    """One load of 16 bytes a nonzero and thread, and multiply-adds that are fused."""
    for launch in ("rows bfloat16", "rows float16", "rows float32", "slabs"):
        for name in ("_matmul", "_sampled_matmul"):
            for kernel in of(read(kernels), launch, name):
                assert any(opcode.startswith("LDG.E") and bits(opcode) == 128 for opcode in kernel["opcodes"]), kernel
                assert kernel["opcodes"]["FFMA"] >= 4, kernel


def test_the_products_alone_use_no_shared_memory_and_no_asynchronous_copies(kernels):
    """Copies to shared memory (LDGSTS) would pass by the L1 cache, where slabs must stay."""
    for launch in ("rows", "slabs"):
        for kernel in of(kernels, launch, "_matmul"):
            assert kernel["shared"] == 0, kernel
            assert not any(opcode.startswith(("LDGSTS", "LDS", "STS")) for opcode in kernel.get("opcodes", ())), kernel


def test_a_slab_has_a_multiprocessor_to_itself(kernels):
    """With 32 warps of over 32 registers no second program fits beside it, which would halve its cache."""
    for kernel in of(kernels, "slabs", "_matmul"):
        assert kernel["warps"] == 32 and kernel["registers"] > 32, kernel
