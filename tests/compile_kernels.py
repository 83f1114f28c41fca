"""Compile the Triton kernels as their launchers would for a GPU, without one, and describe the machine code as JSON.

    python -m tests.compile_kernels [word in a launch's name]

One line a kernel and architecture, from a pool of two processes. Launchers are called on CPU tensors whose memory is
never touched: a stub stands in for the driver, and a launch stops once its kernel is compiled. `TRITON_INTERPRET` must
not be set.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sparsetrain.bench import designs
from sparsetrain.bench.kernels import sparse_matrix
from sparsetrain.kernels import slabs, sparse_linear
from sparsetrain.kernels.abs_topk import abs_topk, abs_topk_backward
from sparsetrain.kernels.project import project
from sparsetrain.kernels.sparse_weight import SparseWeight

ARCHITECTURES = (80, 90)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
N_TOKENS = 65536
LINES = 2100  # of sparse products: several slices of every height (Triton makes an integer 1 a constant)
# Both save much of the time: launches whose opcodes are counted, for the last architecture; those for every one.
COUNTED = re.compile("abs_topk (2048|8192|float16|unaligned)|rows|slabs")
EVERYWHERE = re.compile("abs_topk 2048|abs_topk_backward|project float32|rows bfloat16|slabs 2048")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def activations(width: int, dtype: torch.dtype, layout: str, n_tokens: int = N_TOKENS) -> torch.Tensor:
    if layout == "token-major":
        return torch.empty(n_tokens, width, dtype=dtype)
    return torch.empty(width, n_tokens, dtype=dtype).mT


WIDTHS = {"token-major": (2048, 16384, 32768), "channel-major": (2048, 8192, 16384)}  # a few shapes of tile, the widest
LAUNCHES: dict[str, Callable[[], object]] = {
    f"abs_topk {width} {str(dtype).removeprefix('torch.')} {layout}": (
        lambda width=width, dtype=dtype, layout=layout: abs_topk(activations(width, dtype, layout), width // 4)
    )
    for layout, widths in WIDTHS.items()
    for width in widths
    for dtype in (torch.float32, torch.bfloat16)
} | {
    "abs_topk unaligned": lambda: abs_topk(activations(1000, torch.bfloat16, "channel-major", n_tokens=77), 250),
    "abs_topk float16": lambda: abs_topk(activations(512, torch.float16, "token-major"), 128),
    "abs_topk_backward": lambda: abs_topk_backward(
        activations(2048, torch.bfloat16, "token-major"), activations(2048, torch.bfloat16, "token-major")
    ),
    "project float32": lambda: project(torch.empty(2048, 2048), 40_000),
    "project float32 floors": lambda: project(torch.empty(8192, 8192), 40_000, 4, 4),
    "project bfloat16": lambda: project(torch.empty(2048, 512, dtype=torch.bfloat16), 10_000),
}


def products(design: ModuleType, channels: int, dtype: torch.dtype, tokens: int, bias: bool = True) -> None:
    """Both sparse products of a weight (LINES, channels) with two blocks of tokens."""
    dense = torch.zeros(LINES, channels)
    dense[:, :: channels // 7] = 1.0
    weight = SparseWeight.from_dense(dense)
    x, y = (torch.empty(2, n, tokens, dtype=dtype) for n in (channels, LINES))
    design.matmul(x, weight.values, weight.rows, torch.zeros(LINES) if bias else None)
    design.sampled_matmul(y, x, weight.rows)


LAUNCHES |= {
    f"rows {str(dtype).removeprefix('torch.')}": (lambda dtype=dtype: products(sparse_linear, 2048, dtype, 1024))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}
LAUNCHES |= {
    "rows unaligned": lambda: products(sparse_linear, 2048, torch.bfloat16, 1001, bias=False),
    "rows few tokens": lambda: products(sparse_linear, 2048, torch.bfloat16, 64),
}
LAUNCHES |= {
    f"slabs {channels}": (lambda channels=channels: products(slabs, channels, torch.bfloat16, 1024, channels != 2048))
    for channels in (1024, 2048, 4096, 8192)
}


def design(variant: str) -> None:
    """One of the variants that the benchmark of designs times."""
    weight = sparse_matrix(1024, 0.005, torch.Generator().manual_seed(0))
    designs.products(weight, torch.empty(2, 1024, designs.BLOCK, dtype=torch.bfloat16))[variant]()


LAUNCHES |= {
    f"design, {variant}": (lambda variant=variant: design(variant))
    for variant in designs.products(SparseWeight.from_dense(torch.eye(1)), torch.empty(1, 1, designs.BLOCK))
}


class StubDriver:
    """What Triton asks of a driver before it loads a kernel; each architecture is a device of its own."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def compiled(launch: Callable[[], object], architecture: int) -> list:
    """The kernels that a launcher launches, compiled and not run."""
    driver.set_active(StubDriver(architecture))
    kernels, run = [], JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        kernels.append(run(self, *args, warmup=True, **kwargs))
        return kernels[-1]

    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    assert kernels, "the launcher launched nothing"
    return kernels


def describe(kernel) -> dict:
    """Registers, bytes of stack and of shared memory, and whether anything is added atomically in global memory."""
    usage = _read(kernel.asm["cubin"], "cuobjdump", "-res-usage")
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return {
        "registers": registers, "stack": stack, "shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps,
        "atomics": bool(re.search(r"\b(red|atom)\.[\w.]*global", kernel.asm["ptx"])),
    }  # fmt: skip


def opcodes(kernel) -> dict[str, int]:
    """How often each opcode occurs in a compiled kernel."""
    return dict(Counter(INSTRUCTION.findall(_read(kernel.asm["cubin"], "nvdisasm", "-c"))).most_common())


@cache  # launches share kernels, and to disassemble one takes half a second
def _read(binary: bytes, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout


def describe_launch(name: str, architecture: int) -> list[dict]:
    found = []
    for kernel in compiled(LAUNCHES[name], architecture):
        found.append({"launch": name, "kernel": kernel.metadata.name, "architecture": architecture, **describe(kernel)})
        if architecture == ARCHITECTURES[-1] and COUNTED.match(name):
            found[-1]["opcodes"] = opcodes(kernel)
    return found


def describe_all(word: str = "") -> Iterator[dict]:
    chosen = [
        (name, architecture)
        for name in LAUNCHES if word in name
        for architecture in ARCHITECTURES[0 if EVERYWHERE.match(name) else -1 :]
    ]  # fmt: skip
    with ProcessPoolExecutor(2) as pool:
        for found in pool.map(describe_launch, *zip(*chosen, strict=True), chunksize=4):
            yield from found


if __name__ == "__main__":
    for line in describe_all(*sys.argv[1:]):
        print(json.dumps(line), flush=True)
