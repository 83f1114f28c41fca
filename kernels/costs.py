"""How long a product takes on each backend: what `backend="auto"` compares. Fitted from `sparsetrain bench`.

A product's time is modelled as a sum of non-negative terms, one for each thing that takes time. Coefficients are
seconds per unit, by kind of device, type of activation, pass and backend, in costs.json beside this file.
"""

import json
import math
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).with_name("costs.json")
DENSE = "reference"


def terms(backend: str, m: int, k: int, n: int, nnz: int) -> dict[str, int]:
    """How much there is of each thing that takes time in y = x W^T.

    Args:
        backend: one of `ops`; the reference multiplies every entry of W, the others its nonzeros.
        m, k, n, nnz: rows and columns of W, tokens, nonzeros.
    """
    entries = m * k if backend == DENSE else nnz
    return {"call": 1, "multiply": entries * n, "activation": (m + k) * n, "weight": entries}


def predict(backend: str, device: str, dtype: torch.dtype, size: tuple[int, int, int, int], training: bool) -> float:
    """Seconds that a product takes; `training` adds both gradients. `size` is (m, k, n, nnz) as in `terms`.

    Infinite where the benchmark gave up on a backend: bf16 products on a CPU without bf16 units.
    """
    name = "float32" if dtype == torch.float32 else "bfloat16"  # float16 moves as many bytes
    coefficients = table()[device][name]["training" if training else "forward"].get(backend)
    if coefficients is None:
        return math.inf
    return sum(coefficients[term] * amount for term, amount in terms(backend, *size).items())


def origin(device: str) -> str:
    """Where the coefficients of a kind of device come from, in words."""
    return table()[device]["from"]


@cache
def table() -> dict:
    """All coefficients."""
    return json.loads(FILE.read_text())


def fit(backend: str, rows: list[tuple[int, int, int, int, float]]) -> dict[str, float]:
    """The non-negative coefficients with the least squared relative error over measured (m, k, n, nnz, seconds).

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError(f"fitting the cost of {backend!r} needs at least one measurement, got none")
    names = list(terms(backend, *rows[0][:-1]))
    amounts = np.array([list(terms(backend, *row[:-1]).values()) for row in rows], dtype=float)
    relative = amounts / np.array([[row[-1]] for row in rows])
    best, least = {}, np.inf
    for n_terms in range(1, len(names) + 1):  # few terms: every subset is tried, and negative solutions are left out
        for chosen in map(list, combinations(range(len(names)), n_terms)):
            solution, *_ = np.linalg.lstsq(relative[:, chosen], np.ones(len(rows)), rcond=None)
            error = float(((relative[:, chosen] @ solution - 1) ** 2).sum())
            if (solution >= 0).all() and error < least:
                least, best = error, {names[i]: float(s) for i, s in zip(chosen, solution, strict=True)}
    return {name: best.get(name, 0.0) for name in names}
