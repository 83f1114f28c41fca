"""How long a product takes, sparse or dense: what `backend="auto"` compares. Fitted from `sparsetrain bench`.

A product's time is modelled as a sum of non-negative terms, one for each thing that takes time. Coefficients are
seconds per unit, by kind of device and type of activation, in costs.json beside this file.
"""

import json
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).with_name("costs.json")
TERMS = {
    "sparse": {
        "call": lambda m, k, n, nnz: 1,
        "multiply": lambda m, k, n, nnz: nnz * n,
        "activation": lambda m, k, n, nnz: (m + k) * n,
    },
    "dense": {
        "call": lambda m, k, n, nnz: 1,
        "multiply": lambda m, k, n, nnz: m * k * n,
        "activation": lambda m, k, n, nnz: (m + k) * n,
        "weight": lambda m, k, n, nnz: m * k,
    },
}


def predict(kind: str, device: str, dtype: torch.dtype, m: int, k: int, n: int, nnz: int, training: bool) -> float:
    """Seconds that y = x W^T takes, `training` adds both gradients.

    Args:
        kind: "sparse" or "dense".
        device: "cpu" or "cuda".
        dtype: of the activations.
        m, k, n, nnz: rows and columns of W, tokens, nonzeros.
    """
    name = "float32" if dtype == torch.float32 else "bfloat16"  # float16 moves as many bytes
    coefficients = table()[device][name]["training" if training else "forward"][kind]
    return sum(coefficients[term] * size(m, k, n, nnz) for term, size in TERMS[kind].items())


@cache
def table() -> dict:
    """The coefficients, with where each was measured."""
    return json.loads(FILE.read_text())


def origin(device: str) -> str:
    """Where the coefficients of a kind of device come from, in words."""
    return table()[device]["from"]


def fit(kind: str, rows: list[tuple[int, int, int, int, float]]) -> dict[str, float]:
    """The non-negative coefficients with the least squared relative error over measured (m, k, n, nnz, seconds).

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError(f"fitting the cost of {kind} products needs at least one measurement, got none")
    terms = list(TERMS[kind])
    seconds = np.array([row[-1] for row in rows])
    sizes = np.array([[TERMS[kind][term](*row[:-1]) for term in terms] for row in rows]) / seconds[:, None]
    best, least = {}, np.inf
    for n_terms in range(1, len(terms) + 1):  # few terms: every subset is tried, and negative solutions are left out
        for chosen in combinations(range(len(terms)), n_terms):
            solution, *_ = np.linalg.lstsq(sizes[:, chosen], np.ones(len(rows)), rcond=None)
            error = float(((sizes[:, chosen] @ solution - 1) ** 2).sum())
            if (solution >= 0).all() and error < least:
                least, best = error, dict(zip((terms[i] for i in chosen), map(float, solution), strict=True))
    return {term: best.get(term, 0.0) for term in terms}
