"""How long a product takes on each backend: what `backend="auto"` compares. Fitted from `sparsetrain bench`.

A product's time is modelled as a sum of non-negative terms, one for each thing that takes time. Coefficients are
seconds per unit, by kind of device, type of activation, pass and backend, in costs.json beside this file.
"""

import json
import math
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

FILE = Path(__file__).with_name("costs.json")
DENSE = "reference"


class Size(NamedTuple):
    """Of y = x W^T: rows and columns of W, tokens, nonzeros, and whether x is token-major."""

    m: int
    k: int
    n: int
    nnz: int
    token_major: bool


def terms(backend: str, size: Size) -> dict[str, int]:
    """How much there is of each thing that takes time in y = x W^T.

    Args:
        backend: one of `ops`. The reference writes out and multiplies every entry of W; the others multiply its
            nonzeros, and convert token-major activations.
        size: of the product.
    """
    m, k, n, nnz, token_major = size
    dense = backend == DENSE
    return {
        "call": 1, "multiply": (m * k if dense else nnz) * n, "activation": (m + k) * n, "nonzero": nnz,
        "entry": m * k if dense else 0, "convert": 0 if dense or not token_major else (m + k) * n,
    }  # fmt: skip


def predict(backend: str, device: str, dtype: torch.dtype, size: Size, training: bool) -> float:
    """Seconds that a product takes; `training` adds both gradients.

    Infinite where the benchmark gave up on a backend: bf16 products on a CPU without bf16 units.
    """
    name = "float32" if dtype == torch.float32 else "bfloat16"  # float16 moves as many bytes
    coefficients = table()[device][name]["training" if training else "forward"].get(backend)
    if coefficients is None:
        return math.inf
    return total(coefficients, terms(backend, size))


def dense_at_hand(device: str, dtype: torch.dtype, size: Size) -> float:
    """Seconds of a dense product, without gradients, whose weight need not be written out from its nonzeros."""
    name = "float32" if dtype == torch.float32 else "bfloat16"
    coefficients = table()[device][name]["forward"].get(DENSE)
    if coefficients is None:
        return math.inf
    return total(coefficients, {**terms(DENSE, size), "nonzero": 0, "entry": 0})


def total(coefficients: dict[str, float], amounts: dict[str, int]) -> float:
    """Seconds, from the seconds of each unit."""
    return sum(coefficients[term] * amount for term, amount in amounts.items())


def origin(device: str) -> str:
    """Where the coefficients of a kind of device come from, in words."""
    return table()[device]["from"]


@cache
def table() -> dict:
    """All coefficients."""
    return json.loads(FILE.read_text())


def fit(backend: str, rows: list[tuple[Size, float]]) -> dict[str, float]:
    """The non-negative coefficients with the least squared relative error over measured sizes and seconds.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError(f"fitting the cost of {backend!r} needs at least one measurement, got none")
    names = list(terms(backend, rows[0][0]))
    amounts = np.array([list(terms(backend, size).values()) for size, _ in rows], dtype=float)
    relative = amounts / np.array([[seconds] for _, seconds in rows])
    there = [i for i in range(len(names)) if amounts[:, i].any()]
    best, least = {}, np.inf
    for n_terms in range(1, len(there) + 1):  # few terms: every subset is tried, and negative solutions are left out
        for chosen in map(list, combinations(there, n_terms)):
            solution, *_ = np.linalg.lstsq(relative[:, chosen], np.ones(len(rows)), rcond=None)
            error = float(((relative[:, chosen] @ solution - 1) ** 2).sum())
            if (solution >= 0).all() and error < least:
                least, best = error, {names[i]: float(s) for i, s in zip(chosen, solution, strict=True)}
    return {name: best.get(name, 0.0) for name in names}
