"""Graphs whose best layout is known: edges mostly within modules, nodes in no order."""

from dataclasses import replace
from functools import cache

import numpy as np

from sparsetrain.config import ModelOptions
from sparsetrain.locality.edges import Edges, Piece
from sparsetrain.locality.positions import Matrix, NodeClass, Plan, plan_of

OPTIONS = ModelOptions(n_layers=2, d_model=256, d_head=16)
VOCAB = 1024


def small_plan(sheet: int = 1, n: int = 13) -> Plan:
    """A line of three classes, the middle one of heads, and one that attaches to the first by rows."""
    classes = {
        "a": NodeClass(n),
        "heads": NodeClass(12, 4, "h"),
        "more": NodeClass(6, 2, "h"),
        "fixed": NodeClass(5, moves=False),
    }
    matrices = (Matrix("one", ("heads", "heads", "more"), ("a", "fixed")), Matrix("two", ("a",), ("heads",)))
    return Plan(classes, matrices, sheet)


def random_edges(plan: Plan, seed: int, density: float = 0.3) -> Edges:
    """Edges drawn at random, with weights of mean 1 in each piece; some pieces may be empty."""
    rng = np.random.default_rng(seed)
    found = []
    for m in plan.matrices:
        for part, row_class in enumerate(m.rows):
            for column_class in m.columns:
                kept = rng.random((plan.classes[row_class].n, plan.classes[column_class].n)) < density
                weights = rng.exponential(size=int(kept.sum()))
                scale = weights.mean() if len(weights) else 1.0
                found.append(Piece(m.name, part, row_class, column_class, *kept.nonzero(), weights / scale))
    return found


@cache
def planted(inside: float, n_edges: int = 60_000, n_modules: int = 8, seed: int = 0) -> tuple[Plan, Edges]:
    """A transformer's graph in which a share `inside` of the edges joins nodes of the same module."""
    plan = plan_of(OPTIONS, VOCAB)
    rng = np.random.default_rng(seed)
    modules, heads = {}, {}
    for name, c in plan.classes.items():
        n = c.n // (c.block or 1)
        drawn = rng.permutation(np.arange(n) % n_modules)
        modules[name] = np.repeat(heads.setdefault(c.heads, drawn) if c.block else drawn, c.block or 1)
    empty = random_edges(plan, seed, density=0)
    sizes = np.array([float(plan.classes[p.row_class].n * plan.classes[p.column_class].n) for p in empty])
    counts = (n_edges * sizes / sizes.sum()).round().astype(int)
    edges = [_drawn(p, modules, inside, n, rng) for p, n in zip(empty, counts, strict=True)]
    return plan, edges


def _drawn(piece: Piece, modules: dict[str, np.ndarray], inside: float, n: int, rng: np.random.Generator) -> Piece:
    rows_of, columns_of = modules[piece.row_class], modules[piece.column_class]
    same = rows_of[:, None] == columns_of
    p = np.where(same, inside / same.sum(), (1 - inside) / (~same).sum())
    at = np.sort(rng.choice(p.size, n, replace=False, p=p.ravel()))
    weights = np.abs(rng.standard_normal(n))
    return replace(piece, rows=at // p.shape[1], columns=at % p.shape[1], weights=weights / weights.mean())
