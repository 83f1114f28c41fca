"""The experiments of brain-inspired modular training: their data, networks and hyperparameters, as published."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from sparsetrain.bench.kernels import BenchError


@dataclass(frozen=True)
class Examples:
    """What one seed's networks learn from, and are tested on.

    Attributes:
        train_x, test_x: (N, d) inputs, or (N, n_folds) int64 tokens where there is an embedding.
        train_y, test_y: (N, n_outputs) targets, or (N,) int64 classes where the loss is the cross entropy.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Experiment:
    """One experiment with the hyperparameters of its released notebook.

    Attributes:
        widths: neurons of each layer, inputs first.
        draw: a seed's examples.
        loss: mean squared error, or cross entropy.
        classes: whether the outputs are classes, so that a share of wrong answers can be given.
        steps, lr: of AdamW without decay.
        relayout_every: steps between moves of nodes.
        gap: vertical distance of two layers.
        factor: of horizontal distances; last_factor: the same in the last matrix.
        reduce: whether a matrix counts with the sum or the mean of its wires.
        phases: strength of the cost from a share of the steps on.
        biases_from: the share of the steps from which biases are charged.
        vocab: tokens of an embedding, whose channels are the inputs; 0: none.
        n_folds: embeddings side by side, which share their coordinates.
        sheet: dimensions of a layer's sheet.
        inputs_move: whether input nodes may be moved.
        batch: examples of a step; 0: all.
        dtype: of weights and data.
        published: test error in the publication's figure, where it is known.
    """

    widths: tuple[int, ...]
    draw: Callable[[Generator], Examples]
    loss: Literal["mse", "ce"] = "mse"
    classes: bool = False
    steps: int = 20000
    lr: float = 2e-3
    relayout_every: int = 200
    gap: float = 0.1
    factor: float = 1.0
    last_factor: float = 1.0
    reduce: Literal["sum", "mean"] = "sum"
    phases: tuple[tuple[float, float], ...] = ((0.0, 1e-3), (0.25, 1e-2), (0.75, 1e-3))
    biases_from: float = 0.75
    vocab: int = 0
    n_folds: int = 1
    sheet: int = 1
    inputs_move: bool = True
    batch: int = 0
    dtype: torch.dtype = torch.float32
    published: float | None = None


def experiments() -> dict[str, Experiment]:
    """All experiments by name.

    Source: Liu et al. 2023 (BIMT), sections 3.1 to 3.3 and 3.5, with the settings of the released notebooks.
    Differs: `digits` has the 1797 images of 8 x 8 pixels that come with scikit-learn in the place of MNIST, of which
        four fifths are trained on, and its outputs lie in rows on the sheet, not on a ring.
    """
    s4 = list(itertools.permutations(range(4)))
    composed = torch.tensor([[s4.index(tuple(b[i] for i in a)) for b in s4] for a in s4])
    added = torch.arange(59)[:, None].add(torch.arange(59)) % 59
    group = {
        "loss": "ce", "classes": True, "gap": 0.5, "reduce": "mean", "biases_from": 0.0, "n_folds": 2,
        "dtype": torch.float64,
    }  # fmt: skip
    return {
        "independence": Experiment((4, 20, 20, 2), _formula(4, independence), published=7.4e-3),
        "feature_sharing": Experiment((3, 20, 20, 3), _formula(3, lambda x: x.square().cumsum(1)), published=8.5e-5),
        "compositionality": Experiment(
            (4, 20, 20, 20, 20, 1), _formula(4, compositionality), phases=((0.0, 1e-3), (0.25, 3e-3)), published=1.3e-3
        ),
        "two_moons": Experiment(
            (2, 20, 20, 2), lambda g: Examples(*two_moons(200, g), *two_moons(200, g)), "ce", True, steps=10001,
            gap=0.2, phases=((0.0, 1e-3), (0.5, 1e-2)), biases_from=0.0,
        ),
        "modular_addition": Experiment(
            (64, 50, 50, 59), lambda g: table(added, g), lr=1e-3, factor=2.0, last_factor=2.0, vocab=59,
            phases=((0.0, 0.1), (0.25, 1.0), (0.75, 0.1)), **group,
        ),
        "s4": Experiment((64, 50, 50, 24), lambda g: table(composed, g), vocab=24, phases=((0.0, 1.0),), **group),
        "digits": Experiment(
            (64, 100, 100, 10), digits, classes=True, steps=40000, lr=1e-3, relayout_every=500, gap=0.5, factor=2.0,
            last_factor=0.0, reduce="mean", phases=((0.0, 1e-2), (0.25, 0.1), (0.5, 1.0)), biases_from=0.0, sheet=2,
            inputs_move=False, batch=100,
        ),
    }  # fmt: skip


def independence(x: Tensor) -> Tensor:
    """((x1 + x3)^3, x2^2 + sin(pi x4)) of (N, 4): (N, 2)."""
    return torch.stack([(x[:, 0] + x[:, 2]) ** 3, x[:, 1] ** 2 + torch.sin(math.pi * x[:, 3])], 1)


def compositionality(x: Tensor) -> Tensor:
    """sqrt((x1 - x2)^2 + (x3 - x4)^2) of (N, 4): (N, 1)."""
    return torch.stack([x[:, 0] - x[:, 1], x[:, 2] - x[:, 3]], 1).norm(dim=1, keepdim=True)


def two_moons(n: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """Points (n, 2) on two half circles that reach into each other, with noise of 0.1, and which each is on (n,)."""
    angle = torch.linspace(0, math.pi, n // 2)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    points = torch.cat([upper, torch.tensor([1, 0.5]) - upper])
    return points + 0.1 * torch.randn(points.shape, generator=rng), torch.arange(2).repeat_interleave(n // 2)


def table(results: Tensor, rng: Generator) -> Examples:
    """The pairs of a group's elements with their result, (p, p) int64; four fifths of them to train on."""
    pairs = torch.cartesian_prod(torch.arange(len(results)), torch.arange(len(results)))
    return split(pairs, results.flatten(), rng)


def digits(rng: Generator) -> Examples:
    """Images of handwritten digits (N, 64), with grey in [0, 1] and a one for the right class in (N, 10).

    Raises:
        BenchError: scikit-learn, which holds them, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as missing:
        raise BenchError(
            "the experiment digits needs the images that come with scikit-learn; pip install scikit-learn, or name "
            "other --experiments"
        ) from missing
    images, classes = load_digits(return_X_y=True)
    return split(torch.from_numpy(images).float() / 16, torch.eye(10)[torch.from_numpy(classes)], rng)


def split(x: Tensor, y: Tensor, rng: Generator) -> Examples:
    """Four fifths of some examples to train on, drawn at random, and the others to test on."""
    order, n = torch.randperm(len(x), generator=rng), int(0.8 * len(x))
    return Examples(x[order[:n]], y[order[:n]], x[order[n:]], y[order[n:]])


def _formula(n_inputs: int, formula: Callable[[Tensor], Tensor]) -> Callable[[Generator], Examples]:
    """100 points to train on and 100 to test on, uniform in [-1, 1]."""

    def draw(rng: Generator) -> Examples:
        x, test_x = (2 * torch.rand(100, n_inputs, generator=rng) - 1 for _ in range(2))
        return Examples(x, formula(x), test_x, formula(test_x))

    return draw
