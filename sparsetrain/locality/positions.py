"""Where the nodes of a model lie on a sheet: classes of nodes, the matrices that join them, and a place for each node.

Nodes move, weights do not: a layout is a permutation of slots for each class, so the model's function cannot change.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsetrain.config import ModelOptions

PREFIX = "locality."  # of a layout's tensors in a file


class LocalityError(ValueError):
    """A layout, a matrix or a setting that locality cannot use."""


@dataclass(frozen=True)
class NodeClass:
    """Nodes that can take each other's slots.

    Attributes:
        n: how many nodes, and slots.
        block: nodes of a head, which stay together: node i and slot i belong to blocks i // block. 0: no blocks.
        heads: whose heads these are; classes with the same name have their blocks in the same order. "": no heads.
        moves: whether the nodes may be moved.
    """

    n: int
    block: int = 0
    heads: str = ""
    moves: bool = True


@dataclass(frozen=True)
class Matrix:
    """A weight matrix between nodes.

    Attributes:
        name: of the parameter.
        rows: the classes whose nodes the rows are, one after the other, each in whole.
        columns: the same for the columns.
    """

    name: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The node classes of an architecture, the matrices that join them, and the dimension of the sheet.

    Attributes:
        classes: by name.
        matrices: in forward order.
        sheet: 1 (a line) or 2 (a square), with sides of length 1.
    """

    classes: Mapping[str, NodeClass]
    matrices: tuple[Matrix, ...]
    sheet: int = 1

    def __post_init__(self) -> None:
        if self.sheet not in (1, 2):
            raise LocalityError(f"the sheet must have 1 or 2 dimensions, got {self.sheet}")

    def slots(self, name: str) -> np.ndarray:
        """The coordinates (n, sheet) of a class's slots, see `slot_coordinates`."""
        c = self.classes[name]
        return slot_coordinates(c.n, self.sheet, c.block)


def plan_of(options: ModelOptions, vocab_size: int, sheet: int = 1, tokens: bool = True) -> Plan:
    """The plan of a transformer.

    Its classes are `residual` (once for all depths), in block l `blocks.{l}.qk` (a query channel and the key channel it
    is multiplied with are one node), `blocks.{l}.v` and `blocks.{l}.mlp`; `positions`, the channels of concatenated
    positions; and, with `tokens`, `tokens_in`, `tokens_out` and `contexts`, the rows of the embedding, the unembedding
    and the learnt positions.

    Args:
        options: the `model` section of a run's config.
        vocab_size: rows of the embedding.
        sheet: 1 or 2.
        tokens: whether tokens have places; without them their two matrices count for nothing.
    """
    d = options.d_model
    classes = {"residual": NodeClass(d)}
    read: tuple[str, ...] = ("residual",)
    if options.positions == "concat":
        classes["positions"] = NodeClass(options.d_pos)
        read = ("residual", "positions")
    matrices = []
    if tokens:
        classes |= {"tokens_in": NodeClass(vocab_size), "tokens_out": NodeClass(vocab_size)}
        matrices.append(Matrix("embed.weight", ("tokens_in",), ("residual",)))
        if options.positions == "learned":
            classes["contexts"] = NodeClass(options.n_ctx)
            matrices.append(Matrix("positions.weight", ("contexts",), ("residual",)))
    for l in range(options.n_layers):
        at = f"blocks.{l}."
        qk, v, mlp = at + "qk", at + "v", at + "mlp"
        classes[qk] = classes[v] = NodeClass(d, options.d_head, at + "heads")
        classes[mlp] = NodeClass(options.mlp_ratio * d)
        matrices += [
            Matrix(at + "attn.qkv.weight", (qk, qk, v), read),
            Matrix(at + "attn.out.weight", ("residual",), (v,)),
            Matrix(at + "mlp.up.weight", (mlp,), read),
            Matrix(at + "mlp.out.weight", ("residual",), (mlp,)),
        ]
    if tokens:
        matrices.append(Matrix("unembed.weight", ("tokens_out",), ("residual",)))
    return Plan(classes, tuple(matrices), sheet)


def slot_coordinates(n: int, sheet: int, block: int = 0) -> np.ndarray:
    """Where n slots lie, in the order in which they are numbered.

    On a line slot i is at (i + 1/2) / n. On a square the slots are numbered row by row; there are about sqrt(n) rows,
    whose lengths differ by one where n is no product. Slots of heads are numbered head by head: the heads are laid out
    so, and within the cell of each its channels.

    Args:
        n: slots.
        sheet: 1 or 2.
        block: slots of a head, which divides n; 0: no heads.

    Returns:
        (n, sheet) float64, all in (0, 1).

    Source: Liu et al. 2023 (BIMT), the coordinates of their neurons.
    Differs: squares whose n is no square number.
    """
    if sheet == 1:
        return ((np.arange(n) + 0.5) / n)[:, None]
    if not block:
        return _square(n)[0]
    (centres, sizes), (within, _) = _square(n // block), _square(block)
    return (centres[:, None] + (within - 0.5)[None] * sizes[:, None]).reshape(n, 2)


def row_lengths(n: int) -> np.ndarray:
    """How many of n slots each row of a square holds."""
    n_rows = max(1, round(n**0.5))
    return np.full(n_rows, n // n_rows) + (np.arange(n_rows) < n % n_rows)


def _square(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres (n, 2) and sizes (n, 2) of n cells that fill the unit square, in rows."""
    lengths = row_lengths(n)
    row = np.repeat(np.arange(len(lengths)), lengths)
    column = np.arange(n) - np.repeat(lengths.cumsum() - lengths, lengths)
    sizes = np.stack([1 / lengths[row], np.full(n, 1 / len(lengths))], 1)
    return np.stack([column + 0.5, row + 0.5], 1) * sizes, sizes


@dataclass(frozen=True)
class Layout:
    """A slot for every node of a plan.

    Attributes:
        plan: what the nodes are.
        slots: for each class (n,) int64, the slot of each node; a permutation.
    """

    plan: Plan
    slots: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        if wrong := _problems(self.plan, self.slots):
            raise LocalityError("the layout does not fit the architecture:\n  " + "\n  ".join(wrong))

    def coordinates(self, name: str) -> np.ndarray:
        """Where the nodes of a class lie: (n, sheet) float64."""
        return self.plan.slots(name)[self.slots[name]]

    def matrix_coordinates(self, matrix: str) -> tuple[Tensor, Tensor]:
        """Where the rows (M, sheet) and the columns (K, sheet) of a matrix lie, float64, on the CPU.

        Raises:
            LocalityError: it is no matrix of the plan.
        """
        by_name = {m.name: m for m in self.plan.matrices}
        if matrix not in by_name:
            raise LocalityError(f"the matrix must be one of {', '.join(by_name)}, got {matrix}")
        m = by_name[matrix]
        rows, columns = (np.concatenate([self.coordinates(c) for c in side]) for side in (m.rows, m.columns))
        return torch.from_numpy(rows), torch.from_numpy(columns)

    def order(self, name: str) -> np.ndarray:
        """The nodes (n,) int64 of a class in the order of their slots."""
        return np.argsort(self.slots[name])

    def replace(self, slots: Mapping[str, np.ndarray]) -> "Layout":
        """The same layout with other slots for some classes."""
        return Layout(self.plan, {**self.slots, **slots})

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it: `locality.<class>`, int64."""
        return {PREFIX + name: torch.from_numpy(slots.copy()) for name, slots in self.slots.items()}


def identity(plan: Plan) -> Layout:
    """Every node at the slot of its own index."""
    return Layout(plan, {name: np.arange(c.n) for name, c in plan.classes.items()})


def random_layout(plan: Plan, seed: int) -> Layout:
    """Every node that may move at a random slot; heads stay whole, and in one order for all their channels."""
    rng = np.random.default_rng(seed)
    slots, heads = {}, {}
    for name, c in plan.classes.items():
        if not c.moves:
            slots[name] = np.arange(c.n)
        elif not c.block:
            slots[name] = rng.permutation(c.n)
        else:
            if c.heads not in heads:
                heads[c.heads] = rng.permutation(c.n // c.block)
            within = rng.permuted(np.tile(np.arange(c.block), (c.n // c.block, 1)), axis=1)
            slots[name] = (heads[c.heads][:, None] * c.block + within).ravel()
    return Layout(plan, slots)


def from_tensors(plan: Plan, tensors: Mapping[str, Tensor]) -> Layout:
    """The layout whose `tensors` these are; names without the prefix `locality.` are passed over.

    Raises:
        LocalityError: they do not fit the plan; every difference is listed.
    """
    slots = {k.removeprefix(PREFIX): t.cpu().numpy() for k, t in tensors.items() if k.startswith(PREFIX)}
    return Layout(plan, slots)


def _problems(plan: Plan, slots: Mapping[str, np.ndarray]) -> list[str]:
    wrong = [f"{name} is missing there" for name in plan.classes if name not in slots]
    wrong += [f"{name} is unknown here" for name in slots if name not in plan.classes]
    orders: dict[str, np.ndarray] = {}
    for name, c in plan.classes.items():
        s = slots.get(name)
        if s is None:
            continue
        if s.shape != (c.n,) or s.dtype != np.int64 or not _is_permutation(s):
            wrong.append(f"{name} must be a permutation of {c.n} slots in int64, got {s.dtype} of shape {s.shape}")
        elif c.block:
            order = s.reshape(-1, c.block) // c.block
            if (order != order[:, :1]).any():
                wrong.append(f"{name} must keep the {c.block} channels of each head in one block, got heads mixed")
            elif not np.array_equal(orders.setdefault(c.heads, order[:, 0]), order[:, 0]):
                wrong.append(f"{name} must have its heads in the order of {c.heads}' other channels, got another")
    return wrong


def _is_permutation(s: np.ndarray) -> bool:
    return not len(s) or bool(s.min() == 0 and s.max() == len(s) - 1 and np.bincount(s).max() == 1)
