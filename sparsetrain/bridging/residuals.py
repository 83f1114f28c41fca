"""What a bridge needs of a model, sparse or dense: its residual stream, readable and replaceable at named sites.

Sites are `blocks.{l}.resid_pre`, `blocks.{l}.resid_mid` (between attention and MLP; absent where both add to the stream
at once) and `final_resid`, each before the norm that reads it. Reads are what comes out of those norms:
`blocks.{l}.attn_in`, `blocks.{l}.mlp_in` and `final_in`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from sparsetrain.kernels.reference import is_channel_major

Edit = Callable[[Tensor], Tensor]
Entering = Mapping[str, tuple[Tensor, Tensor]]


class BridgeError(RuntimeError):
    """Models that cannot be bridged."""


class Residuals(Protocol):
    """A causal language model with its residual stream laid open.

    Attributes:
        sites: where the residual stream can be read and replaced, in forward order.
        reads: norm outputs that can be read and edited, in forward order. A block that reads the stream once for
            attention and MLP alike has `attn_in` alone.
        width: D, of the residual stream.
        vocab_size: V, of the logits; a tokenizer may have fewer tokens.
        n_ctx: the most tokens a sequence may have; None where the model sets no bound.
        tokenizer: that of its tokens.
    """

    sites: tuple[str, ...]
    reads: tuple[str, ...]
    width: int
    vocab_size: int
    n_ctx: int | None
    tokenizer: Tokenizer

    def run(self, tokens: Tensor, read: Collection[str] = ()) -> tuple[dict[str, Tensor], Tensor]:
        """Run the whole model.

        Args:
            tokens: (B, T).
            read: some of `reads`.

        Returns:
            The residual (B, T, D) at every site and the values read, by name; and the logits (B, T, V).
        """

    def enter(self, tokens: Tensor, entering: Entering) -> Tensor:
        """Run sequences that enter the model halfway.

        Args:
            tokens: (B, T).
            entering: for a site, which rows (n,) of `tokens` enter there, and their residual (n, T, D) at that site.
                Each row runs from its site onward. Every row enters exactly once over all sites.

        Returns:
            Logits (B, T, V), rows in the order of `tokens`; differentiable with respect to what enters.

        Raises:
            ValueError: a site is unknown, a shape does not fit, or a row does not enter exactly once (on another device
                than the CPU only their number is looked at).
        """

    def steer(self, tokens: Tensor, edits: Mapping[str, Edit]) -> Tensor:
        """Logits (B, T, V) with the values at some sites or reads replaced by functions of them.

        Raises:
            ValueError: a name is neither a site nor a read of this model.
        """

    def normed(self, read: str, resid: Tensor) -> Tensor:
        """What the norm before a read makes of a residual (..., D), before any AbsTopK."""


def check_names(model: Residuals, names: Collection[str]) -> None:
    """Refuse names that are neither a site nor a read of a model.

    Raises:
        ValueError: which they are, and what there is.
    """
    known = (*model.sites, *model.reads)
    if unknown := sorted({*names} - {*known}):
        shared = [n for n in unknown if n.endswith("mlp_in") and n.replace("mlp_in", "attn_in") in known]
        why = f"; {shared[0].removesuffix('.mlp_in')} reads once for attention and MLP, as attn_in" if shared else ""
        raise ValueError(f"sites and reads must be among {', '.join(known)}; got {', '.join(unknown)}{why}")


class Entrance:
    """The batch of a hybrid pass, whose rows enter at different sites.

    A batch that grows holds a row only from its site onward, so that nothing is computed that nobody reads: it starts
    from any one row, which the first rows to enter replace. One that does not grow holds all rows from the start.

    Args:
        model: what they enter.
        tokens: (B, T).
        entering: see `Residuals.enter`.
        grows: whether the batch grows.

    Raises:
        ValueError: a site is unknown, a shape does not fit, or a row does not enter exactly once.
    """

    def __init__(self, model: Residuals, tokens: Tensor, entering: Entering, grows: bool):
        _check_entering(model, tokens, entering)
        self.entering = {s: entering[s] for s in model.sites if s in entering and len(entering[s][0])}
        self.grows = grows
        self.tokens = tokens[:1] if grows else tokens
        self.first = next(iter(self.entering))
        self.places = torch.argsort(torch.cat([rows for rows, _ in self.entering.values()])) if grows else None

    def put(self, site: str, x: Tensor) -> Tensor:
        """The residual (b, T, D) of the batch at a site with the rows that enter there, in the layout of x."""
        if site not in self.entering:
            return x
        rows, new = self.entering[site]
        if not self.grows:
            return x.index_copy(0, rows, new.to(x.dtype))
        if is_channel_major(x):
            return torch.cat([new.mT] if site == self.first else [x.mT, new.mT]).mT
        return new if site == self.first else torch.cat([x, new])

    def rows_at(self, site: str, n: int) -> Tensor:
        """Which rows of the batch, n of them once those have entered, are those that entered at a site."""
        rows, _ = self.entering[site]
        return torch.arange(n - len(rows), n, device=rows.device) if self.grows else rows

    def in_order(self, x: Tensor) -> Tensor:
        """The whole batch (B, T, D) in the order of `tokens`, in the layout of x."""
        if self.places is None:
            return x
        return x.mT.index_select(0, self.places).mT if is_channel_major(x) else x.index_select(0, self.places)


def _check_entering(model: Residuals, tokens: Tensor, entering: Entering) -> None:
    if unknown := sorted({*entering} - {*model.sites}):
        raise ValueError(f"sites must be among {', '.join(model.sites)}; got {', '.join(unknown)}")
    for site, (rows, new) in entering.items():
        if new.shape != (expected := (len(rows), tokens.shape[1], model.width)):
            raise ValueError(f"what enters at {site} must have shape {expected}, got {tuple(new.shape)}")
    if tokens.device.type != "cpu" and sum(len(rows) for rows, _ in entering.values()) == len(tokens):
        return  # to look at which rows they are would wait for the device, at each step
    rows = torch.cat([rows for rows, _ in entering.values()]).tolist() if entering else []
    if sorted(rows) != list(range(len(tokens))):
        raise ValueError(f"each of {len(tokens)} rows must enter exactly once over all sites, got rows {sorted(rows)}")


@contextmanager
def hooked(hooks: Sequence[tuple[nn.Module, str, Callable]]) -> Iterator[None]:
    """Call functions at modules' inputs and outputs while the body runs.

    Args:
        hooks: modules with `in` or `out` and torch's function of (module, args, kwargs), for `out` with the output
            behind; what it gives back, if not None, replaces (args, kwargs) or the output.
    """
    handles = []
    try:
        for module, at, function in hooks:
            register = module.register_forward_pre_hook if at == "in" else module.register_forward_hook
            handles.append(register(function, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
