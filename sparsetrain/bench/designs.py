"""Which design of the Triton products, and which constants, suit a GPU: the measurements that decide between them.

`python -m sparsetrain.bench.designs OUT.json`, on a GPU, in some two minutes. Each variant is held to the float64
product of sampled lines, then all of a size are timed side by side. What to read: the gather rate of rows is that of
the L2 cache; slabs beat it where they stay in L1, and fall to it where they do not (K = 4,096 with 64 tokens).
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sparsetrain import machine
from sparsetrain.bench.kernels import hold, sparse_matrix
from sparsetrain.bench.timing import copy_seconds, interleaved
from sparsetrain.kernels import slabs, sparse_linear
from sparsetrain.kernels.sparse_weight import SparseWeight

SIZES = ((1024, 0.005), (2048, 0.001), (2048, 0.005), (2048, 0.01), (4096, 0.001), (4096, 0.005))
TOKENS, BLOCK, ROUNDS = 65536, 1024, 11


def measure(device: torch.device, sizes=SIZES, tokens: int = TOKENS, rounds: int = ROUNDS) -> list[dict]:
    """Time every variant of the forward product and of the sampled product; rows of figures.

    Args:
        device: a CUDA device.
        sizes: (d, density) of the weights.
        tokens: N, in blocks of 1,024.
        rounds: times each is timed.
    """
    return [row for d, density in sizes for row in _size(d, density, tokens, rounds, device)]


def table(rows: list[dict]) -> str:
    """The figures as Markdown."""
    lines = ["| d | density | variant | ms | gathers, TB/s | multiply-adds, T/s |", "|---|---|---|---|---|---|"]
    for row in rows:
        seconds = statistics.median(row["seconds"])
        work = row["nnz"] * row["n"]
        figures = f"{1e3 * seconds:.4g} | {2 * work / seconds / 1e12:.3g} | {work / seconds / 1e12:.3g}"
        lines.append(f"| {row['d']} | {row['density']:.2%} | {row['variant']} | {figures} |")
    return "\n".join(lines)


def products(weight: SparseWeight, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Every variant of the forward product of a weight with x (B, K, T), by name."""
    block = x.shape[2]

    def rows(tile: int) -> Callable[[], Tensor]:
        return lambda: sparse_linear.matmul(x, weight.values, weight.rows, tile=tile)

    def slab(tokens: int, warps: int) -> Callable[[], Tensor]:
        return lambda: slabs.matmul(x, weight.values, weight.rows, slab=tokens, warps=warps)

    tiles = {f"rows of {tile} tokens": rows(tile) for tile in (256, 512, 1024) if tile <= block}
    kept = {f"slabs of {n} tokens, {w} warps": slab(n, w) for n in (64, 32, 16, 8) for w in (32, 8) if n <= block}
    return tiles | kept


def _size(d: int, density: float, tokens: int, rounds: int, device: torch.device) -> list[dict]:
    generator = torch.Generator(device).manual_seed(d)
    weight = sparse_matrix(d, density, generator)
    block = min(BLOCK, tokens)
    x, y = (
        torch.randn(tokens // block, d, block, device=device, generator=generator).to(torch.bfloat16) for _ in range(2)
    )
    exact = weight.to_dense()[:64].double() @ x.double()
    for name, product in products(weight, x).items():
        hold(f"{name} of {weight!r}", product()[:, :64], exact, 1e-2)
    sampled = {
        "sampled, rows": lambda: sparse_linear.sampled_matmul(y, x, weight.rows),
        "sampled, slabs": lambda: slabs.sampled_matmul(y, x, weight.rows),
    }
    row, column = weight.row_of_each()[:64], weight.rows.indices[:64].long()
    exact = (y[:, row].double() * x[:, column].double()).sum((0, 2))
    for name, product in sampled.items():
        hold(f"{name} of {weight!r}", product()[:64], exact, 1e-5)
    cases = (
        products(weight, x)
        | sampled
        | {
            "copy of x to y": copy_seconds(2 * 2 * x.numel(), device),
        }
    )
    taken = interleaved(cases, rounds, device)
    size = {"d": d, "density": density, "n": tokens, "nnz": weight.n_nonzero}
    return [size | {"variant": name, "seconds": seconds} for name, seconds in taken.items()]


if __name__ == "__main__":
    cuda = torch.device("cuda")
    found = measure(cuda)
    Path(sys.argv[1]).write_text(json.dumps({"environment": machine.describe(cuda), "rows": found}, indent=1))
    print(table(found))
