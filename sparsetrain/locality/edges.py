"""The nonzero weights of a model as edges between nodes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn

from sparsetrain.kernels.sparse_weight import SparseWeight
from sparsetrain.linear import Linear
from sparsetrain.locality.positions import Layout, LocalityError, Matrix, Plan


@dataclass(frozen=True)
class Piece:
    """The nonzeros between two classes in one matrix (of q, k and v each for itself).

    Attributes:
        matrix: the parameter's name.
        part: which of the matrix' row classes the rows are: of q, k, v 0, 1 and 2.
        row_class, column_class: names of the classes.
        rows, columns: (E,) int64, the node at either end of each edge.
        weights: (E,) float64, |w| divided by its mean over the matrix (over q, k or v).
    """

    matrix: str
    part: int
    row_class: str
    column_class: str
    rows: np.ndarray
    columns: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self, layout: Layout) -> np.ndarray:
        """How long each edge is: (E,) float64, the distance along the axes of the sheet, without a vertical part."""
        ends = layout.coordinates(self.row_class)[self.rows], layout.coordinates(self.column_class)[self.columns]
        return np.abs(ends[0] - ends[1]).sum(1)

    def counted(self) -> "Piece":
        """The same edges, each of weight 1."""
        return replace(self, weights=np.ones(len(self)))


Edges = list[Piece]


def edges_of(model: nn.Module, plan: Plan, share: float = 1.0) -> Edges:
    """The edges of a model, whose weights may be dense or held at candidates.

    Args:
        model: with the plan's matrices among its parameters.
        plan: of this architecture.
        share: of a matrix' entries, that are taken at most: the greatest magnitudes. While a model is still dense, the
            density it shall reach says which edges it is likely to keep, and saves the memory of all the others.

    Raises:
        LocalityError: a matrix has no nonzeros, or has not the shape of its classes.
    """
    held = {f"{name}.weight": m.held() for name, m in model.named_modules() if isinstance(m, Linear)}
    return edges_of_tensors({**dict(model.named_parameters()), **held}, plan, share)


def edges_of_tensors(weights: Mapping[str, Tensor | SparseWeight], plan: Plan, share: float = 1.0) -> Edges:
    """The edges of weights by parameter name; the others are passed over. See `edges_of`."""
    if not 0 < share <= 1:
        raise LocalityError(f"the share of entries that become edges must be in (0, 1], got {share}")
    return [piece for m in plan.matrices for piece in _pieces(plan, m, weights[m.name], share)]


def numbered(edges: Edges, plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """All edges with the nodes numbered through, class by class: both ends (E,), weights (E,), and how many nodes."""
    starts = np.cumsum([0, *(c.n for c in plan.classes.values())]).tolist()
    first = dict(zip(plan.classes, starts, strict=False))
    a = np.concatenate([p.rows + first[p.row_class] for p in edges])
    b = np.concatenate([p.columns + first[p.column_class] for p in edges])
    return a, b, np.concatenate([p.weights for p in edges]), starts[-1]


def row_parts(plan: Plan, m: Matrix) -> list[tuple[str, int, int]]:
    """The parts of a matrix whose weights have a scale of their own: class, first row, row after the last.

    Queries and keys, say: twice the one and half the other is the same function.
    """
    return _spans(plan, m.rows)


def _pieces(plan: Plan, m: Matrix, weight: Tensor | SparseWeight, share: float) -> Edges:
    rows_of, columns_of = _spans(plan, m.rows), _spans(plan, m.columns)
    expected = (rows_of[-1][2], columns_of[-1][2])
    if tuple(weight.shape) != expected:
        raise LocalityError(
            f"{m.name} must have shape {expected}, got {tuple(weight.shape)}; the layout is of another architecture"
        )
    rows, columns, values = _nonzeros(weight, max(1, int(share * expected[0] * expected[1])))
    if not len(values):
        raise LocalityError(f"{m.name} must have nonzero weights to be laid out, got none; train without locality")
    found = []
    for i, (row_class, top, bottom) in enumerate(rows_of):
        part = (rows >= top) & (rows < bottom)
        scale = values[part].mean() if part.any() else 1.0
        for column_class, left, right in columns_of:
            at = part & (columns >= left) & (columns < right)
            ends = rows[at] - top, columns[at] - left
            found.append(Piece(m.name, i, row_class, column_class, *ends, values[at] / scale))
    return found


def _spans(plan: Plan, classes: tuple[str, ...]) -> list[tuple[str, int, int]]:
    ends = np.cumsum([plan.classes[c].n for c in classes]).tolist()
    return list(zip(classes, [0, *ends[:-1]], ends, strict=True))


def _nonzeros(weight: Tensor | SparseWeight, at_most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and magnitude of what is not zero, row by row; of more than `at_most` the greatest."""
    if isinstance(weight, SparseWeight):
        at, values = weight.row_of_each() * weight.shape[1] + weight.rows.indices, weight.values.detach()
        kept = _greatest(values, at_most)
        at, values = at[kept], values[kept]
    else:
        values = weight.detach().flatten()
        at = _greatest(values, at_most)
        values = values[at]
    rows, columns = (x.cpu().numpy() for x in (at // weight.shape[1], at % weight.shape[1]))
    return rows, columns, values.abs().double().cpu().numpy()


def _greatest(values: Tensor, at_most: int) -> Tensor:
    """The indices, ascending, of the nonzeros among these values, or of those that are greatest in magnitude."""
    if int(values.count_nonzero()) > at_most:
        return values.abs().topk(at_most, sorted=False).indices.sort().values
    return values.nonzero().flatten()
