"""The residual stream that every head and MLP reads for itself: what was written to it, through gates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Places:
    """The positions of a batch that gates change anything at: tensors of these alone have the shape (..., 1, P, D).

    Args:
        tokens: (B, T).
        shared: (B, T) where nothing changes; None: nowhere, and tensors keep their (..., B, T, D), as they do where it
            is everywhere.
    """

    def __init__(self, tokens: Tensor, shared: Tensor | None):
        self.shape = tokens.shape
        self.everywhere = shared is None or not shared.any() or bool(shared.all())
        if not self.everywhere:
            self.changed, self.same = (~shared).flatten().nonzero()[:, 0], shared.flatten().nonzero()[:, 0]

    def pick(self, x: Tensor) -> Tensor:
        """Of x, which broadcasts over (..., B, T, D), what is at the places."""
        return x if self.everywhere else self._at(x, self.changed).unsqueeze(-3)

    def positions(self, p: Tensor | None) -> Tensor | None:
        """Of position vectors (T, d_pos) one for each place."""
        return p if p is None or self.everywhere else p[self.changed % self.shape[1]]

    def fill(
        self, parts: Sequence[Tensor], others: Callable[..., Sequence[Tensor]], x: Tensor, p: Tensor | None
    ) -> Sequence[Tensor]:
        """Each of `parts`, (1, P, D), as (B, T, D).

        Args:
            parts: what is at the places.
            others: gives what is elsewhere, (1, P', D) for each part, of x and p there.
            x: (B, T, D).
            p: position vectors (T, d_pos), or None.
        """
        if self.everywhere:
            return parts
        elsewhere = others(self._at(x, self.same)[None], None if p is None else p[self.same % self.shape[1]])
        order = torch.cat([self.changed, self.same]).argsort()
        pairs = zip(parts, elsewhere, strict=True)
        return [torch.cat(pair, dim=1)[0, order].unflatten(0, self.shape) for pair in pairs]

    def _at(self, x: Tensor, places: Tensor) -> Tensor:
        return x.expand(*x.shape[:-3], *self.shape, x.shape[-1]).flatten(-3, -2)[..., places, :]


class Stream:
    """The residual stream as the sum of what was written to it, which each target reads through gates of its own."""

    def __init__(self, places: Places, n_sources: int, like: Tensor):
        self.places, self.shape = places, like.shape[1:]  # (B, T, D), or (1, P, D) of some places
        self.changes = _Changes(like.new_empty(n_sources, self.shape.numel()))
        self.n = 0  # sources that have written
        self.fixed = like.new_zeros(*places.shape, like.shape[-1])  # what is read when all gates are shut: (B, T, D)
        self.order = like.new_zeros(())  # tells autograd which reads came after which writes

    def write(self, x: Tensor, replacement: Tensor) -> None:
        """Add what n sources wrote, (n, *shape); the replacement broadcasts over (n, B, T, D)."""
        self.fixed = self.fixed + replacement.sum(0)
        rows = slice(self.n, self.n + len(x))
        self.n = rows.stop
        self.order = _Write.apply(self.order, x, self.places.pick(replacement), self.changes, rows)

    def add(self, x: Tensor) -> None:
        """Add what belongs to no source."""
        self.fixed = self.fixed + x

    def read(self, *gates: Tensor) -> tuple[Tensor, ...]:
        """What targets with these gates (R, n_sources) read: (R, *shape) for each group of targets."""
        rows = (torch.cat(gates) if len(gates) > 1 else gates[0]).to(self.changes.values.dtype)
        out = _Read.apply(rows, self.places.pick(self.fixed).reshape(-1), self.order, self.changes)
        return out.unflatten(1, self.shape).split([len(g) for g in gates])


@dataclass
class _Changes:
    """How far each source is from its replacement, (n_sources, M), and the gradient of that, which all reads add to.

    One matrix, so that a read is one product, and its gradient another that adds in place.
    """

    values: Tensor
    gradient: Tensor | None = None


class _Write(torch.autograd.Function):
    """Put x - replacement into rows of the changes; its gradient is there once all later reads have added theirs."""

    @staticmethod
    def forward(ctx: Any, order: Tensor, x: Tensor, replacement: Tensor, changes: _Changes, rows: slice) -> Tensor:
        ctx.changes, ctx.rows, ctx.shape = changes, rows, x.shape
        torch.sub(x, replacement, out=changes.values[rows].view(x.shape))
        return order.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None, None
        rows = ctx.changes.gradient[ctx.rows]
        for_x = rows.clone().view(ctx.shape)
        rows.zero_()  # for another backward pass
        return grad, for_x, None, None, None


class _Read(torch.autograd.Function):
    """fixed + gates @ changes: gates (R, n), fixed (M,), the first n rows of the changes -> (R, M)."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, fixed: Tensor, order: Tensor, changes: _Changes) -> Tensor:
        ctx.save_for_backward(gates)
        ctx.changes = changes
        return torch.addmm(fixed, gates, changes.values[: gates.shape[1]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gates,), changes = ctx.saved_tensors, ctx.changes
        n = gates.shape[1]
        for_gates = grad @ changes.values[:n].T if ctx.needs_input_grad[0] else None
        for_fixed = grad.sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[2]:
            return for_gates, for_fixed, None, None
        if changes.gradient is None:
            changes.gradient = torch.zeros_like(changes.values)
        changes.gradient[:n].addmm_(gates.T, grad)
        return for_gates, for_fixed, grad.new_zeros(()), None
