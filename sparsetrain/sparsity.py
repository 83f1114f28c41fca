"""Weight sparsity: which matrices are projected, how many nonzeros each may have at a step, and counts."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from sparsetrain.config import SparsityOptions
from sparsetrain.kernels.ops import project_
from sparsetrain.model import Transformer


@dataclass(frozen=True)
class Projected:
    """One tensor under the projection, and the floor it is held to."""

    name: str
    weight: nn.Parameter
    kind: Literal["block", "embedding", "bias"]
    min_per_row: int = 0
    min_per_column: int = 0

    def l0(self, options: SparsityOptions, progress: float) -> int:
        """How many nonzeros it may have after the step at `progress` (step / steps)."""
        share = density(options, progress) if self.kind == "block" else embedding_density(options, progress)
        return max(1, int(share * self.weight.numel()))


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
        Projected("unembed.weight", model.unembed.weight, "embedding"),
    ]
    if model.options.positions == "learned":
        found.append(Projected("positions.weight", model.positions.weight, "block"))
    for l, block in enumerate(model.blocks):
        for part, maps in (("attn", ("qkv", "out")), ("mlp", ("up", "out"))):
            for name in maps:
                linear, rows = getattr(getattr(block, part), name), name != "out"
                where = f"blocks.{l}.{part}.{name}"
                found.append(Projected(f"{where}.weight", linear.weight, "block", j if rows else 0, 0 if rows else j))
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


def project_all_(tensors: list[Projected], options: SparsityOptions, progress: float) -> None:
    """Hold every tensor to its budget, in place (invariant 1: nonzeros <= L0 after every step)."""
    for t in tensors:
        project_(t.weight.data, t.l0(options, progress), t.min_per_row, t.min_per_column)


def count(tensors: list[Projected]) -> dict[str, dict[str, float]]:
    """For each tensor by name: nonzeros, density, and rows and columns without any nonzero."""
    found = {}
    for t in tensors:
        alive = t.weight.detach() != 0
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
