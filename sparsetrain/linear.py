"""A linear map whose weight can be dense, multiplied as a sparse one, or held at some candidates alone."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from sparsetrain.kernels.ops import dense_gradient, linear, sparse_linear
from sparsetrain.kernels.sparse_weight import SparseWeight


class Linear(nn.Linear):
    """y = x W^T + b, in the layout of x (token-major or channel-major).

    Attributes:
        weight: (M, K); where there are candidates (E,), the weight at each, and zero at every other entry.
        candidates: where the weight may be other than zero; its values are `weight`. None: everywhere.
        active: the nonzeros of the weight as they were last read, which products take; None: dense products.
        explore: called in the backward pass of the next forward pass, and of no other, with the gradient of the dense
            weight (M, K) over its first `explore_blocks` sequences; None: not computed.
    """

    def __init__(self, n_in: int, n_out: int, bias: bool = True):
        super().__init__(n_in, n_out, bias=bias)
        self.candidates: SparseWeight | None = None
        self.active: SparseWeight | None = None
        self.explore: Callable[[Tensor], None] | None = None
        self.explore_blocks = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K)."""
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """y (..., M) of x (..., K)."""
        if self.active is None:
            return linear(x, self.weight, self.bias)
        return self._sparse(x)

    def _sparse(self, x: Tensor) -> Tensor:
        y = sparse_linear(x, self.active, self.bias, gradient_to=self.candidates or self.weight)
        if self.explore is not None and y.requires_grad:
            read, explore, self.explore = x.detach()[: self.explore_blocks].clone(), self.explore, None
            y.register_hook(lambda grad: explore(dense_gradient(grad[: len(read)], read)))
        return y

    def held(self) -> Tensor | SparseWeight:
        """What is held of the weight, detached: the whole of it, or its candidates."""
        return self.weight.data if self.candidates is None else self.candidates.with_values(self.weight.data)

    @torch.no_grad()
    def read_(self, sparse: bool) -> None:
        """Set `active` to the nonzeros of the weight as they are now, or to None for dense products.

        Raises:
            ValueError: nonzeros that products shall take are not finite.
        """
        if self.candidates is not None:
            if not bool(self.weight.isfinite().all()):  # as `from_dense` looks for itself
                raise ValueError("values must be finite, got infinite or NaN candidates")
            self.active = self.held().without_zeros()[0]
        else:
            self.active = SparseWeight.from_dense(self.weight.data) if sparse else None

    @torch.no_grad()
    def hold_(self, at: Tensor) -> Tensor:
        """Hold the weight at these entries alone, and give back where each of them was held before.

        Args:
            at: (E,) int64, flat row-major indices into (M, K), ascending. Every nonzero must be among them.

        Returns:
            (E,) int64: the place of each entry in the former `weight`, flattened; -1 where it was not held.
        """
        if self.candidates is None:
            former = at
        else:
            held = self.indices()
            former = torch.searchsorted(held, at).clamp_(max=held.numel() - 1)
            former = torch.where(held[former] == at, former, -1)
        values = torch.where(former >= 0, self.weight.flatten()[former], 0)
        row, column = at // self.in_features, at % self.in_features
        offsets = torch.zeros(self.out_features + 1, dtype=torch.int64, device=at.device)
        offsets[1:] = torch.bincount(row, minlength=self.out_features).cumsum(0)
        self.weight.data = values
        self.candidates = SparseWeight.from_rows(self.shape, self.weight, column, offsets)
        return former

    def indices(self) -> Tensor:
        """(E,) int64: the candidates as flat row-major indices into (M, K)."""
        assert self.candidates is not None
        return self.candidates.row_of_each() * self.in_features + self.candidates.rows.indices

    def dense_weight(self) -> Tensor:
        """The weight (M, K), detached, written out where it is held at candidates."""
        held = self.held()
        return held if isinstance(held, Tensor) else held.to_dense()


@cache
def leave_sparse_products_out_of_graphs() -> None:
    """Have torch.compile not trace sparse products, from now on: a graph would be made for nonzeros, which change."""
    Linear._sparse = torch.compiler.disable(Linear._sparse)  # not above: it imports the whole compiler, two seconds
