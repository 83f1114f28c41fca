"""Locality while a model is trained: where its nodes are, what long wires cost in a step, when nodes move.

Source: Liu et al. 2023 (BIMT): the connection cost in three phases, and swaps every so many steps.
Differs: nodes move and weights do not, so that the function and the optimiser's state stay as they are; the cost of a
matrix does not depend on its scale; a proximal step and the choice of nonzeros are other ways to charge it.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from sparsetrain.config import ConfigError, LocalityOptions, SparsityOptions
from sparsetrain.linear import Linear
from sparsetrain.locality.edges import Edges, edges_of_tensors, row_parts
from sparsetrain.locality.measures import mean_length
from sparsetrain.locality.positions import Layout, Plan, from_tensors, plan_of, random_layout
from sparsetrain.locality.pressure import At, distance_factor, distances, shrink_, wire_gradient
from sparsetrain.locality.relayout import relayout
from sparsetrain.model import Transformer
from sparsetrain.sparsity import Projected

STRENGTHS = {"none": 0.0, "loss": 1e-4, "proximal": 3.0, "selection": 4.0}
DENSEST = 0.25  # a model with a greater share of nonzeros is not laid out: any places are as good, and it takes long


class Wiring:
    """Places of a model's nodes, and the pressure on its wires.

    Args:
        options: the `locality` section of a run's config, whose pressure is not none.
        model: the model in training.
        tensors: its projected tensors.
        seed: of the places that nodes begin at, and of swaps.

    Attributes:
        layout: where nodes are.
        mean_length: J of the model when nodes were last moved; NaN before.
    """

    def __init__(self, options: LocalityOptions, model: Transformer, tensors: list[Projected], seed: int):
        self.options, self.seed = options, seed
        self.strength = STRENGTHS[options.pressure] if options.strength is None else options.strength
        self.plan: Plan = plan_of(model.options, model.vocab_size, options.sheet, options.tokens)
        by_name = {t.name: t for t in tensors}
        self.matrices = {m.name: by_name[m.name] for m in self.plan.matrices if m.name in by_name}
        self.biases = [p for name, p in model.named_parameters() if name.endswith("bias") and "norm" not in name]
        self.parts = {m.name: row_parts(self.plan, m) for m in self.plan.matrices}
        self.mean_length = math.nan
        self.move_to(random_layout(self.plan, seed))

    def move_to(self, layout: Layout) -> None:
        """Put the nodes where a layout says."""
        self.layout = layout
        self.coordinates = {
            name: tuple(x.to(t.parameter.device, torch.float32) for x in layout.matrix_coordinates(name))
            for name, t in self.matrices.items()
        }

    def phase(self, progress: float) -> float:
        """The strength at `progress` in [0, 1]: weak, whole, weak again."""
        o = self.options
        return self.strength * (1.0 if o.ramp <= progress < o.rest else o.weak)

    @torch.no_grad()
    def add_gradients_(self, progress: float) -> None:
        """Add the gradient of the wires' cost to those of the weights, where the pressure is a term of the loss."""
        strength = self.phase(progress)
        if self.options.pressure != "loss" or strength == 0:
            return
        for weight, gradient, length in self._parts(gradients=True):
            gradient.add_(wire_gradient(weight, length), alpha=strength)
        if self.options.biases:
            for bias in self.biases:
                bias.grad.add_(bias.sign(), alpha=strength * self.options.gap)

    @torch.no_grad()
    def shrink_(self, lr: float, progress: float) -> None:
        """Shorten weights by lr x strength x mean magnitude x length, where the pressure is a proximal step."""
        amount = lr * self.phase(progress)
        if self.options.pressure != "proximal" or amount == 0:
            return
        for weight, _, length in self._parts():
            shrink_(weight, length, amount)

    def factor(self, name: str, progress: float) -> Tensor | None:
        """What magnitudes are multiplied with before the projection: shaped as what is held; None: by magnitude."""
        strength = self.phase(progress)
        if self.options.pressure != "selection" or strength == 0 or name not in self.matrices:
            return None
        at = _held_at(self.matrices[name].linear)
        return distance_factor(*self.coordinates[name], strength, at)

    def move_(self, step: int) -> None:
        """After step number `step`: new places for all nodes, if it is time and the model is sparse enough."""
        is_time = self.options.relayout_every and step % self.options.relayout_every == 0
        if not is_time or self._n_nonzero() > DENSEST * self._size():
            return
        edges = self.edges()
        starts = [relayout(edges, self.layout, self.seed + step)]
        if math.isnan(self.mean_length):  # the first time the Fiedler order may be the better beginning
            starts.append(relayout(edges, self.layout, self.seed + step, fresh=True))
        lengths = [mean_length(edges, layout) for layout in starts]
        self.mean_length = min(lengths)
        self.move_to(starts[lengths.index(self.mean_length)])

    def refuse_if_dense(self, options: SparsityOptions) -> None:
        """Make sure that nodes which are to move will.

        Args:
            options: how sparse the model becomes.

        Raises:
            ConfigError: it ends with more nonzeros than what is laid out.
        """
        share = sum(t.l0(options, 1.0) for t in self.matrices.values()) / self._size()
        if self.options.relayout_every and share > DENSEST:
            raise ConfigError(
                f"locality must have a model of which at most {DENSEST:.0%} of the weights are left for its nodes to "
                f"move, got {share:.0%}; lower sparsity.density or sparsity.embedding_density, take "
                "locality.tokens=false, or set locality.relayout_every=0"
            )

    def _size(self) -> int:
        return sum(t.size for t in self.matrices.values())

    def _n_nonzero(self) -> int:
        held = (t.linear.held() if t.linear else t.parameter for t in self.matrices.values())
        return sum(int(torch.count_nonzero(h if isinstance(h, Tensor) else h.values)) for h in held)

    def edges(self) -> Edges:
        """The model's wires as they are."""
        weights = {name: t.linear.held() if t.linear else t.parameter for name, t in self.matrices.items()}
        plan = Plan(self.plan.classes, tuple(m for m in self.plan.matrices if m.name in weights), self.plan.sheet)
        return edges_of_tensors(weights, plan)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {**self.layout.tensors(), "mean_length": torch.tensor(self.mean_length, dtype=torch.float64)}

    def load_(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave.

        Raises:
            LocalityError: the places are of another architecture.
        """
        self.move_to(from_tensors(self.plan, tensors))
        self.mean_length = tensors["mean_length"].item()

    def _parts(self, gradients: bool = False) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Each part of a matrix with a scale of its own (q, k and v): its weights, their gradients, wires' lengths."""
        for name, t in self.matrices.items():
            rows, columns = self.coordinates[name]
            at = _held_at(t.linear)
            weight, gradient = t.parameter.data, t.parameter.grad if gradients else None
            for _, top, bottom in self.parts[name]:
                if at is None:
                    span, length = slice(top, bottom), partial(self._length, rows[top:bottom], columns)
                else:
                    span = slice(*torch.searchsorted(at[0], torch.tensor([top, bottom], device=at[0].device)).tolist())
                    length = partial(self._length, rows, columns, (at[0][span], at[1][span]))
                yield weight[span], None if gradient is None else gradient[span], length()

    def _length(self, rows: Tensor, columns: Tensor, at: At | None = None) -> Tensor:
        """How long wires are, the gap included; all alike under `length=mean`."""
        if self.options.length == "mean":
            shape = (len(rows), len(columns)) if at is None else (len(at[0]),)
            return torch.full(shape, self.options.sheet / 3 + self.options.gap, device=rows.device)
        return distances(rows, columns, at).add_(self.options.gap)


def _held_at(linear: Linear | None) -> At | None:
    """Row and column of each candidate of a matrix; None where it is held whole."""
    if linear is None or linear.candidates is None:
        return None
    return linear.candidates.row_of_each(), linear.candidates.rows.indices.long()
