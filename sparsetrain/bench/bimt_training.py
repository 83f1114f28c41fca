"""Trains networks by brain-inspired modular training, and by each part of it alone, side by side.

Source: Liu et al. 2023 (BIMT).
Differs: nodes move, not weights, so that no network changes and the optimiser's moments stay with their weights; all
nodes may move, not those of greatest weight alone; they move by the cost that is trained on; and the networks of all
arms and seeds are trained at once, each with gradients of its own.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sparsetrain.bench.bimt_tasks import Examples, Experiment
from sparsetrain.locality.edges import Edges, edges_of_tensors
from sparsetrain.locality.positions import Matrix, NodeClass, Plan, identity
from sparsetrain.locality.pressure import distances, published_cost, scale_of
from sparsetrain.locality.relayout import relayout


@dataclass(frozen=True)
class Arm:
    """A way to train: whether wires cost anything, whether long ones cost more, and whether nodes move."""

    charged: bool
    local: bool
    moves: bool


ARMS = {
    "none": Arm(False, False, False),
    "L1": Arm(True, False, False),
    "L1 + local": Arm(True, True, False),
    "L1 + swap": Arm(True, False, True),
    "all (BIMT)": Arm(True, True, True),
}


class Networks(nn.Module):
    """Multilayer perceptrons of one shape side by side: R = arms x seeds of them, the seeds of the first arm first.

    Every arm begins with the same weights.

    Args:
        experiment: whose widths they have.
        rngs: of each seed.
    """

    def __init__(self, experiment: Experiment, rngs: Sequence[Generator]):
        super().__init__()
        shapes, dtype = list(zip(experiment.widths[1:], experiment.widths[:-1], strict=True)), experiment.dtype
        drawn = [[_uniform((m, k), k, rng) for m, k in shapes] for rng in rngs]
        drawn_biases = [[_uniform((m,), k, rng) for m, k in shapes] for rng in rngs]
        self.weights = nn.ParameterList(_for_all_arms(same, dtype) for same in zip(*drawn, strict=True))
        self.biases = nn.ParameterList(_for_all_arms(same, dtype) for same in zip(*drawn_biases, strict=True))
        self.embedding = None
        if experiment.vocab:
            shape = (experiment.vocab, experiment.widths[0] // experiment.n_folds)
            self.embedding = nn.Parameter(_for_all_arms([torch.randn(shape, generator=rng) for rng in rngs], dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (R, N, n_outputs) of inputs (R, N, d), or of tokens (R, N, n_folds) int64."""
        if self.embedding is not None:
            n, vocab, _ = self.embedding.shape
            x = x + vocab * torch.arange(n)[:, None, None]
            x = F.embedding(x, self.embedding.flatten(0, 1)).flatten(-2)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias[:, None], F.silu(x) if i else x, weight.mT)
        return x


def _uniform(shape: tuple[int, ...], n_inputs: int, rng: Generator) -> Tensor:
    """Weights or biases as torch's nn.Linear draws them."""
    return (2 * torch.rand(shape, generator=rng) - 1) / n_inputs**0.5


def _for_all_arms(of_seeds: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(R, ...) of each seed's."""
    return torch.cat([torch.stack(list(of_seeds))] * len(ARMS)).to(dtype)


def plan_of(experiment: Experiment) -> Plan:
    """The node classes `layer.0`, inputs, to `layer.L`, outputs; channels of embeddings side by side are one node."""
    widths = (experiment.widths[0] // experiment.n_folds, *experiment.widths[1:])
    classes = {f"layer.{i}": NodeClass(n, moves=i > 0 or experiment.inputs_move) for i, n in enumerate(widths)}
    folds = [experiment.n_folds] + [1] * len(widths)
    matrices = [Matrix(f"weights.{i}", (f"layer.{i + 1}",), (f"layer.{i}",) * folds[i]) for i in range(len(widths) - 1)]
    return Plan(classes, tuple(matrices), experiment.sheet)


def factors_of(experiment: Experiment) -> list[float]:
    """What horizontal distances are multiplied with in each matrix."""
    return [experiment.factor] * (len(experiment.widths) - 2) + [experiment.last_factor]


def wires_of(networks: Networks, i: int, plan: Plan) -> Edges:
    """The wires of network i, each with |w|."""
    weights = {f"weights.{l}": w[i].detach().double() for l, w in enumerate(networks.weights)}
    return [
        replace(piece, weights=piece.weights * float(scale_of(weights[piece.matrix])))
        for piece in edges_of_tensors(weights, plan)
    ]


def charged_wires(edges: Edges, experiment: Experiment) -> Edges:
    """The same wires, each with what a unit of its length costs, up to a factor that all have in common."""
    shares = {}
    for i, (factor, m, k) in enumerate(
        zip(factors_of(experiment), experiment.widths[1:], experiment.widths[:-1], strict=True)
    ):
        shares[f"weights.{i}"] = factor / (m * k if experiment.reduce == "mean" else 1)
    charged = [replace(piece, weights=piece.weights * shares[piece.matrix]) for piece in edges]
    mean = np.concatenate([piece.weights for piece in charged]).mean()
    return [replace(piece, weights=piece.weights / mean) for piece in charged]


def strength(experiment: Experiment, step: int) -> float:
    """What the cost is multiplied with in a step, the first of which is step 0."""
    return next(much for share, much in reversed(experiment.phases) if step >= int(share * experiment.steps))


class Run:
    """Networks in training, with the places of their nodes.

    Args:
        experiment: what to train.
        seeds: of data and weights.

    Attributes:
        networks: of all arms and seeds.
        layouts: where the nodes of each network are.
        relayout_seconds: of CPU time, for each network.
    """

    def __init__(self, experiment: Experiment, seeds: Sequence[int]):
        self.experiment, self.seeds = experiment, list(seeds)
        self.rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.examples = [_typed(experiment.draw(rng), experiment.dtype) for rng in self.rngs]
        self.networks = Networks(experiment, self.rngs)
        self.plan = plan_of(experiment)
        self.arms = [arm for arm in ARMS.values() for _ in seeds]
        self.layouts = [identity(self.plan)] * len(self.arms)
        self.lengths = [torch.zeros_like(weight) for weight in self.networks.weights]
        self.relayout_seconds = [0.0] * len(self.arms)
        for i, arm in enumerate(self.arms):
            if arm.local:
                self._set_lengths(i)

    def train(self) -> None:
        """All steps of all networks."""
        e = self.experiment
        optimizer = torch.optim.AdamW(self.networks.parameters(), e.lr, weight_decay=0.0, fused=True)
        whole = self.examples_of("train")
        for step in range(e.steps):
            x, y = self._some(*whole) if e.batch else whole
            loss = self.losses(self.networks(x), y).sum() + strength(e, step) * self.cost(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (step + 1) % e.relayout_every == 0:
                self.move_(step + 1)

    def cost(self, step: int) -> Tensor:
        """The sum of the connection costs of all networks that are charged, 0-d."""
        e, first = self.experiment, next(i for i, arm in enumerate(self.arms) if arm.charged)
        with_biases = step >= int(e.biases_from * e.steps)
        layers = [
            (weight[first:], bias[first:] if with_biases else None, length[first:])
            for weight, bias, length in zip(self.networks.weights, self.networks.biases, self.lengths, strict=True)
        ]
        embedding = None if self.networks.embedding is None else self.networks.embedding[first:]
        cost = published_cost(layers, e.gap, 1.0, e.reduce, embedding)
        return cost * (len(self.arms) - first) if e.reduce == "mean" else cost

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of each network: (R,)."""
        if self.experiment.loss == "mse":
            return (outputs - targets).square().mean((1, 2))
        return F.cross_entropy(outputs.mT, targets, reduction="none").mean(1)

    def move_(self, step: int) -> None:
        """Put the nodes of networks whose arm moves them where their wires cost less."""
        for i, arm in enumerate(self.arms):
            if arm.moves:
                start = time.process_time()
                edges = charged_wires(wires_of(self.networks, i, self.plan), self.experiment)
                self.layouts[i] = relayout(edges, self.layouts[i], self.seeds[i % len(self.seeds)] + step)
                self.relayout_seconds[i] += time.process_time() - start
                if arm.local:
                    self._set_lengths(i)

    def examples_of(self, part: str) -> tuple[Tensor, Tensor]:
        """Inputs and targets of all networks, `train` or `test`: (R, N, ...) each."""
        return tuple(
            torch.stack([getattr(examples, f"{part}_{what}") for examples in self.examples] * len(ARMS))
            for what in "xy"
        )

    def _some(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A step's examples, the same for all arms."""
        at = torch.stack([torch.randint(x.shape[1], (self.experiment.batch,), generator=rng) for rng in self.rngs])
        networks, at = torch.arange(len(x))[:, None], at.repeat(len(ARMS), 1)
        return x[networks, at], y[networks, at]

    def _set_lengths(self, i: int) -> None:
        for matrix, factor, length in zip(self.plan.matrices, factors_of(self.experiment), self.lengths, strict=True):
            length[i] = factor * distances(*self.layouts[i].matrix_coordinates(matrix.name))


def _typed(examples: Examples, dtype: torch.dtype) -> Examples:
    return Examples(*(t.to(dtype) if t.is_floating_point() else t for t in vars(examples).values()))
