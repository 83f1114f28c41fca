"""Interventions on a dense model at its reads: moved along directions towards the counterfactual prompt, and ablated.

Source: Gao et al. 2025, A.4. Differs: where several reads are steered at once, what earlier ones have already moved
along a later one's directions is not moved twice: the component along them is set to that of the unsteered model plus
the change. At a single read this is the addition that they describe.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.bridging.directions import Direction
from sparsetrain.bridging.residuals import Residuals
from sparsetrain.model import Edit
from sparsetrain.pruning.evaluate import right_and_wrong
from sparsetrain.tasks import TaskData

CHUNK = 32  # prompts that are run at once
NEGLIGIBLE = 1e-5  # of the greatest singular value


@dataclass(frozen=True)
class Prompts:
    """Pairs of prompts, and the dense model's reads on them.

    Attributes:
        data: rows 2i and 2i + 1 are a pair, each the other's counterfactual.
        reads: (N, T, D) by name.
        changes: (N, T, D) by name: what each prompt's read lacks to be its counterfactual's.
    """

    data: TaskData
    reads: dict[str, Tensor]
    changes: dict[str, Tensor]


@dataclass(frozen=True)
class Push:
    """What is done at a read: `change` (N, T, D) at strength 1, and the orthonormal rows (R, D) that it lies along."""

    change: Tensor
    span: Tensor


Pushes = dict[str, Push]


def changes(values: Tensor, data: TaskData) -> Tensor:
    """What values (N, T, C) of each prompt lack to be its counterfactual's; 0 where the two are not compared.

    The prompts of a pair are compared from their last tokens back to where they first differ: before that nothing
    changes. Where they are not equally long, the tokens that the longer one has more are not compared.
    """
    at = torch.arange(values.shape[1], device=values.device)
    partner = torch.arange(len(data), device=values.device) ^ 1
    in_partner = at + (data.last[partner] - data.last)[:, None]
    n_alike = (data.tokens == data.tokens[partner]).long().cumprod(1).sum(1, keepdim=True)
    after = torch.minimum(at, in_partner) >= n_alike
    there = (at <= data.last[:, None]) & (after | (at == data.last[:, None]))
    index = in_partner.clamp(0, values.shape[1] - 1)[..., None].expand_as(values)
    return (values[partner].gather(1, index) - values) * there[..., None]


@torch.no_grad()
def read_prompts(dense: Residuals, data: TaskData, names: Sequence[str]) -> Prompts:
    """The dense model's reads on prompts, and what they lack to be their counterfactuals'."""
    reads = _read(dense, data.tokens, names)
    return Prompts(data, reads, {name: changes(x, data) for name, x in reads.items()})


@torch.no_grad()
def node_changes(sparse: Residuals, found: Sequence[Direction], prompts: Prompts) -> dict[str, Tensor]:
    """By node, the change (N, T) of its activation from each prompt to its counterfactual."""
    reads = _read(sparse, prompts.data.tokens, sorted({d.read for d in found}))
    moved = {name: changes(x, prompts.data) for name, x in reads.items()}
    return {d.node: moved[d.read][..., d.channel] for d in found}


def _read(model: Residuals, tokens: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    parts = [model.run(part, names)[0] for part in tokens.split(CHUNK)]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def along(found: Sequence[Direction], moved: Mapping[str, Tensor]) -> Pushes:
    """Move along directions by the changes of their nodes."""
    return {read: _push(moved, here, *_basis(here)) for read, here in by_read(found).items()}


def turned(found: Sequence[Direction], generator: torch.Generator) -> list[Direction]:
    """Random directions, whose lengths and angles, at and between reads, are those of the given ones.

    One rotation turns all of them: drawn anew at each read, what they do would cancel out between reads.
    """
    coordinates, rows = _basis(found)
    vectors = coordinates @ _random_rows(rows, generator)
    return [replace(direction, vector=vector) for direction, vector in zip(found, vectors, strict=True)]


def steepest(dense: Residuals, prompts: Prompts, moved: Mapping[str, Tensor], direction: Direction) -> Direction:
    """The direction as long as the given one that raises the other answer most, to first order, on these prompts.

    What its node changes and where is as given, so that this is what could be reached with it.
    """
    vector = torch.zeros_like(direction.vector, requires_grad=True)
    for rows in _chunks(prompts.data):
        edit = _adding(moved[direction.node][rows, :, None] * vector)
        _answers(dense, prompts.data.take(rows), {direction.dense_read: edit})[:, 1].sum().backward()
    return replace(direction, vector=F.normalize(vector.grad, dim=0) * direction.vector.norm())


def along_own_random(direction: Direction, moved: Mapping[str, Tensor], generator: torch.Generator) -> Pushes:
    """Move along random directions of a direction's length, one for each pair of prompts."""
    change = moved[direction.node]
    drawn = torch.randn(len(change) // 2, len(direction.vector), generator=generator).to(direction.vector)
    vectors = (F.normalize(drawn, dim=1) * direction.vector.norm()).repeat_interleave(2, 0)
    return {direction.dense_read: Push(change[..., None] * vectors[:, None], drawn[:0])}


def along_probe(pushes: Pushes, prompts: Prompts, found: Mapping[str, Tensor]) -> Pushes:
    """The same along probes (D,) by read: as far at each token as the given pushes, towards the other side."""
    side = _side(prompts.data)[:, None, None]
    return {
        name: Push(side * push.change.norm(dim=-1, keepdim=True) * found[name], found[name][None])
        for name, push in pushes.items()
    }


def probes(pushes: Pushes, prompts: Prompts) -> dict[str, Tensor]:
    """By read the direction (D,) from positive to negative prompts in the dense model's own reads.

    It is the difference of the two sides' means over the tokens that the given pushes move, weighted by how far, of
    length 1 (0 where the sides do not differ there).
    """
    side = _side(prompts.data)
    weights = {name: side[:, None] * push.change.norm(dim=-1) for name, push in pushes.items()}
    sums = {name: torch.einsum("nt,ntd->d", weight, prompts.changes[name]) for name, weight in weights.items()}
    return {name: F.normalize(total, dim=0) for name, total in sums.items()}


def patch(prompts: Prompts, names: Sequence[str]) -> Pushes:
    """The counterfactual's own reads in place of the prompt's: the most that can be done at these reads."""
    return {n: Push(prompts.changes[n], torch.eye(len(x[0, 0])).to(x)) for n, x in prompts.reads.items() if n in names}


def steer(dense: Residuals, prompts: Prompts, pushes: Pushes, strength: float) -> Tensor:
    """Answers (N, 3) of the dense model on prompts while its reads are pushed by a share of their change; see
    `answers`."""

    def edit(name: str, rows: slice) -> Edit:
        change, clean, span = strength * pushes[name].change[rows], prompts.reads[name][rows], pushes[name].span

        def edited(x: Tensor) -> Tensor:
            moved = (x.reshape(clean.shape) - clean) @ span.T @ span
            return x + (change - moved).reshape(x.shape)

        return edited

    return _in_chunks(dense, prompts.data, lambda rows: {name: edit(name, rows) for name in pushes})


def ablate(dense: Residuals, data: TaskData, spans: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> Tensor:
    """Answers (N, 3) with the component of reads along orthonormal rows (R, D) replaced by that of their means (D,)."""
    return _in_chunks(dense, data, lambda rows: ablations(spans, means))


def plain(dense: Residuals, data: TaskData) -> Tensor:
    """Answers (N, 3) of the dense model as it is."""
    return _in_chunks(dense, data, lambda rows: {})


def counterfactuals(data: TaskData) -> TaskData:
    """Each prompt's counterfactual in its place, asked for the answers of the prompt."""
    partner = torch.arange(len(data), device=data.tokens.device) ^ 1
    prompts = tuple(data.prompts[i] for i in partner.tolist())
    return replace(data, tokens=data.tokens[partner], last=data.last[partner], prompts=prompts)


def ablations(spans: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> dict[str, Edit]:
    """Edits that put the mean (D,) in place of each read's component along orthonormal rows (R, D)."""

    def edit(span: Tensor, mean: Tensor) -> Edit:
        return lambda x: x + (mean - x) @ span.T @ span

    return {name: edit(span, means[name]) for name, span in spans.items()}


def spans(found: Sequence[Direction]) -> dict[str, Tensor]:
    """By read, orthonormal rows (R, D) that the directions there lie along."""
    return {read: _basis(here)[1] for read, here in by_read(found).items()}


def random_spans(of: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """As many random orthonormal rows at each read."""
    return {read: _random_rows(rows, generator) for read, rows in of.items()}


def by_read(found: Sequence[Direction]) -> dict[str, list[Direction]]:
    """Directions by the dense model's read."""
    reads: dict[str, list[Direction]] = {}
    for direction in found:
        reads.setdefault(direction.dense_read, []).append(direction)
    return reads


def answers(logits: Tensor, data: TaskData) -> Tensor:
    """(N, 3) of logits (N, V): probabilities of a prompt's own and of the other answer, and the logit difference."""
    own, other = right_and_wrong(logits, data)
    total = logits.logsumexp(-1)
    return torch.stack([(own - total).exp(), (other - total).exp(), own - other], 1)


@torch.no_grad()
def _in_chunks(dense: Residuals, data: TaskData, edits: Callable[[slice], dict[str, Edit]]) -> Tensor:
    return torch.cat([_answers(dense, data.take(rows), edits(rows)) for rows in _chunks(data)])


def _answers(dense: Residuals, data: TaskData, edits: Mapping[str, Edit]) -> Tensor:
    logits = dense.steer(data.tokens, edits)
    return answers(logits[torch.arange(len(data), device=logits.device), data.last], data)


def _chunks(data: TaskData) -> list[slice]:
    return [slice(first, first + CHUNK) for first in range(0, len(data), CHUNK)]


def _adding(change: Tensor) -> Edit:
    return lambda x: x + change.reshape(x.shape)


def _push(moved: Mapping[str, Tensor], here: Sequence[Direction], coordinates: Tensor, rows: Tensor) -> Push:
    return Push(torch.stack([moved[d.node] for d in here], -1) @ coordinates @ rows, rows)


def _basis(here: Sequence[Direction]) -> tuple[Tensor, Tensor]:
    """Vectors (K, D) as coordinates (K, R) along orthonormal rows (R, D)."""
    u, s, rows = torch.linalg.svd(torch.stack([d.vector for d in here]), full_matrices=False)
    kept = s > NEGLIGIBLE * s[0]
    return (u * s)[:, kept], rows[kept]


def _random_rows(rows: Tensor, generator: torch.Generator) -> Tensor:
    """As many random orthonormal rows (R, D)."""
    drawn = torch.randn(rows.shape, generator=generator).to(rows)
    return torch.linalg.qr(drawn.T)[0].T


def _side(data: TaskData) -> Tensor:
    """(N,): 1 for positive prompts, -1 for negative ones."""
    return 1 - 2 * (torch.arange(len(data), device=data.tokens.device) % 2).float()
