"""Weight sparsity: which tensors are projected, how many nonzeros each may have at a step, and counts."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparsetrain import parallel
from sparsetrain.config import SparsityOptions
from sparsetrain.kernels import sharded
from sparsetrain.kernels.ops import project_, sparse_pays
from sparsetrain.linear import Linear
from sparsetrain.model import Transformer

log = logging.getLogger(__name__)

# How many times faster a product by nonzeros must be, without gradients of weights, so that a whole pass with masks
# between products is faster: at 3 it takes up to 1.4 times as long, at 4 to 9 it takes 0.4 to 0.9 of it (docs/log.md).
WORTHWHILE = 4


@dataclass(frozen=True)
class Projected:
    """One tensor under the projection, and the floor it is held to.

    Attributes:
        parameter: the tensor itself; of a linear map that is held at candidates, their values.
        linear: the linear map whose weight it is, if it is one.
    """

    name: str
    parameter: nn.Parameter
    kind: Literal["block", "embedding", "bias"]
    min_per_row: int = 0
    min_per_column: int = 0
    linear: Linear | None = None

    @property
    def size(self) -> int:
        """Entries, zero or not, held or not."""
        return self.linear.shape[0] * self.linear.shape[1] if self.linear else self.parameter.numel()

    def l0(self, options: SparsityOptions, progress: float) -> int:
        """How many nonzeros it may have after the step at `progress` (step / steps)."""
        share = density(options, progress) if self.kind == "block" else embedding_density(options, progress)
        return max(1, int(share * self.size))

    def budget(self, options: SparsityOptions, progress: float) -> tuple[int, int, int]:
        """Its `l0` and its floors, as the projection takes them."""
        return self.l0(options, progress), self.min_per_row, self.min_per_column

    def dense(self) -> Tensor:
        """The whole tensor, detached; where it is sharded, all processes must call this."""
        return parallel.whole(self.linear.dense_weight() if self.linear else self.parameter.detach())


def projected(model: Transformer, options: SparsityOptions) -> list[Projected]:
    """Every tensor of a model that is held sparse.

    The floor keeps `min_alive` incoming weights of each neuron and of each q, k, v channel, and as many outgoing
    weights of each neuron and of each head channel. The bigram table, norms, sinks and concatenated positions are
    never projected.

    Source: Gao et al. 2025, A.2 and footnote 15; one budget for the fused qkv, as in the released train.py.
    """
    j = options.min_alive
    found = [
        Projected("embed.weight", model.embed.weight, "embedding"),
        Projected("unembed.weight", model.unembed.weight, "embedding", linear=model.unembed),
    ]
    if model.options.positions == "learned":
        found.append(Projected("positions.weight", model.positions.weight, "block"))
    for l, block in enumerate(model.blocks):
        for part, maps in (("attn", ("qkv", "out")), ("mlp", ("up", "out"))):
            for name in maps:
                linear, rows = getattr(getattr(block, part), name), name != "out"
                where = f"blocks.{l}.{part}.{name}"
                floors = (j, 0) if rows else (0, j)
                found.append(Projected(f"{where}.weight", linear.weight, "block", *floors, linear))
                if options.biases == "sparse" and linear.bias is not None:
                    found.append(Projected(f"{where}.bias", linear.bias, "bias"))
    return found


def density(options: SparsityOptions, progress: float) -> float:
    """The density of block matrices at `progress` in [0, 1]: 1, then falling to its target, then flat.

    Source: Gao et al. 2025, A.2 (linear over the first half of training).
    """
    return _anneal(options, options.density, progress)


def embedding_density(options: SparsityOptions, progress: float) -> float:
    """The density of embedding, unembedding and sparse biases at `progress`.

    Under `embedding_anneal=late` it stays 1 until the block density has fallen to where the ratio of the two
    targets caps it: what the paper's own runs did (A.2, Fig 21). `own` is the released script's correction.
    """
    target = options.density if options.embedding_density is None else options.embedding_density
    if options.embedding_anneal == "late":
        return min(1.0, target / options.density * density(options, progress))
    return _anneal(options, target, progress)


def project_all_(
    tensors: list[Projected],
    options: SparsityOptions,
    progress: float,
    factor: Callable[[str], Tensor | None] = lambda name: None,
) -> None:
    """Hold every tensor to its budget, in place (invariant 1: nonzeros <= L0 after every step).

    Args:
        tensors, options, progress: what is held, and to what.
        factor: by a tensor's name what magnitudes are multiplied with before the greatest are kept, which leaves the
            budget as it is; None: nothing.
    """
    if parallel.is_sharded(tensors[0].parameter):
        full = [t for t in tensors if t.l0(options, progress) < t.size]
        sharded.project_([parallel.local(t.parameter) for t in full], [t.budget(options, progress) for t in full])
        return
    for t in tensors:
        held = t.parameter.data if t.linear is None else t.linear.held()
        budget = t.budget(options, progress)
        if (favour := factor(t.name)) is None:
            project_(held, *budget)
        elif isinstance(held, Tensor):
            project_(favour.mul_(held), *budget)
            held.masked_fill_(favour == 0, 0)
        else:
            project_(held.with_values(favour.mul_(held.values)), *budget)
            held.values.masked_fill_(favour == 0, 0)


def read_all_(
    tensors: list[Projected], options: SparsityOptions, progress: float, n_tokens: int, dtype: torch.dtype
) -> None:
    """Tell each linear map which nonzeros to multiply, or to take a dense product where that is faster.

    Args:
        tensors: projected, as of now.
        options, progress: as of the projection.
        n_tokens, dtype: of a forward pass.

    Raises:
        ValueError: a weight is not finite.
    """
    linear = [t for t in tensors if t.linear is not None]
    before = sum(t.linear.active is not None for t in linear)
    for t in linear:
        t.linear.read_(sparse_pays(t.linear.shape, n_tokens, t.l0(options, progress), t.parameter.device, dtype))
    now = sum(t.linear.active is not None for t in linear)
    if now != before:
        shares = ", ".join(f"{share:.3f}" for share in sorted({t.l0(options, progress) / t.size for t in linear}))
        log.info("%d of %d matrices are multiplied by their nonzeros now (densities %s)", now, len(linear), shares)


def multiply_nonzeros_(model: nn.Module, n_tokens: int) -> None:
    """Have linear maps multiply their nonzeros where that pays, in a model whose weights stay as they are.

    Args:
        model: of dense weights, most of them zero.
        n_tokens: of a forward pass.

    Raises:
        ValueError: a weight is not finite.
    """
    for linear in (module for module in model.modules() if isinstance(module, Linear)):
        weight, n_nonzero = linear.weight, int(linear.weight.count_nonzero())
        linear.read_(sparse_pays(linear.shape, n_tokens, n_nonzero, weight.device, weight.dtype, WORTHWHILE))


def count(tensors: list[Projected]) -> dict[str, dict[str, float]]:
    """For each tensor by name: nonzeros, density, and rows and columns without any nonzero."""
    found = {}
    for t in tensors:
        alive = t.dense() != 0
        n = int(alive.sum())
        found[t.name] = {"n_nonzero": n, "density": n / alive.numel(), "dead_rows": _dead(alive, -1)}
        if alive.dim() == 2:
            found[t.name]["dead_columns"] = _dead(alive, 0)
    return found


def _dead(alive: Tensor, dim: int) -> int:
    return int((~alive.any(dim)).sum())


def _anneal(options: SparsityOptions, target: float, progress: float) -> float:
    window = options.anneal_stop - options.anneal_start
    done = (progress - options.anneal_start) / window if window else float(progress >= options.anneal_stop)
    done = min(1.0, max(0.0, done))
    return target**done if options.anneal == "exponential" else 1 - done + done * target
