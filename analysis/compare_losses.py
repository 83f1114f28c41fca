"""Held-out losses of two models side by side: token by token, or document by document where their tokens differ."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparsetrain.analysis.snippets import text, texts
from sparsetrain.config import RunConfig
from sparsetrain.data import Corpus, evaluation_batches
from sparsetrain.model import Transformer

N_TOKENS = 65_536  # that are compared, as far as there are so many
BATCH_TOKENS = 4096
N_BINS, WIDEST = 40, 0.995  # of the histogram; the share of differences inside it
N_GROUPS, N_EXAMPLES, CONTEXT = 12, 3, 24  # tokens on each side; of each; tokens shown of a context


class CompareError(ValueError):
    """Runs that cannot be compared."""


class Side(NamedTuple):
    """A run, read."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    config: RunConfig
    corpus: Corpus


def compare_losses(a: Side, b: Side) -> dict[str, Any]:
    """The held-out losses of two runs; differences are B less A, so that below zero B is better.

    Returns:
        `unit`: `token`, where both read the same tokens, else `byte`; n_units, n_groups, mean losses `a` and `b`, their
        `difference` with its standard error `se`, and what is in `on_tokens` or `on_documents`.

    Raises:
        CompareError: the held-out texts differ.
    """
    same_tokenizer = a.corpus.manifest["tokenizer_sha256"] == b.corpus.manifest["tokenizer_sha256"]
    same_tokens = same_tokenizer and np.array_equal(a.corpus.tokens("val"), b.corpus.tokens("val"))
    return on_tokens(a, b) if same_tokens else on_documents(a, b)


def on_tokens(a: Side, b: Side) -> dict[str, Any]:
    """Losses of the same tokens in the same windows, as long as the shorter context.

    Returns:
        Besides what `compare_losses` says: n_ctx; b_better, the share of tokens; `histogram` of differences, whose
        last bins hold what lies beyond them; `tokens`: those that add most to the difference on either side, each with
        its text, n, mean difference, `adds` to the mean over all tokens, and `examples` with contexts.
    """
    x, y = _windows(a, b)
    losses = [token_losses(side.model, x, y) for side in (a, b)]
    d = losses[1] - losses[0]
    by_window = d.mean(1)
    return {
        "unit": "token", "n_units": d.numel(), "n_groups": len(d), "n_ctx": x.shape[1],
        "a": losses[0].mean().item(), "b": losses[1].mean().item(), "difference": d.mean().item(),
        "se": (by_window.std() / len(by_window) ** 0.5).item() if len(by_window) > 1 else None,
        "b_better": (d < 0).double().mean().item(),
        "histogram": _histogram(d.flatten().numpy()),
        "tokens": _groups(x, y, losses, a.tokenizer),
    }  # fmt: skip


def _windows(a: Side, b: Side) -> tuple[Tensor, Tensor]:
    n_ctx = min(side.config.model.n_ctx for side in (a, b))
    strides = {side.config.train.stride for side in (a, b)}
    size = max(1, BATCH_TOKENS // n_ctx)
    n_batches = max(1, N_TOKENS // (size * n_ctx))
    stride = strides.pop() if len(strides) == 1 else 1
    batches = list(evaluation_batches(a.corpus.tokens("val"), n_batches, size, n_ctx, stride))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


@torch.no_grad()
def token_losses(model: Transformer, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (N, T) in nats, as float64, of each token of `targets` (N, T) after those of `inputs` (N, T)."""
    size = max(1, BATCH_TOKENS // inputs.shape[1])
    parts = [
        cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
        for x, y in zip(inputs.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(parts).double()


def _histogram(differences: np.ndarray) -> dict[str, list[float]]:
    reach = max(float(np.quantile(np.abs(differences), WIDEST)), 1e-6)
    counts, edges = np.histogram(np.clip(differences, -reach, reach), N_BINS, (-reach, reach))
    return {"edges": edges.tolist(), "shares": (counts / len(differences)).tolist()}


def _groups(x: Tensor, y: Tensor, losses: list[Tensor], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The tokens that add most to the difference, those at which B is worse first."""
    d = (losses[1] - losses[0]).flatten().numpy()
    flat = y.flatten().numpy()
    n, adds = np.bincount(flat), np.bincount(flat, weights=d) / len(d)
    order = np.argsort(-adds, kind="stable")
    worst = [i for i in order[:N_GROUPS] if adds[i] > 0]
    best = [i for i in order[::-1][:N_GROUPS] if adds[i] < 0]
    return [
        {
            "text": text(int(token), tokenizer), "n": int(n[token]), "mean": float(adds[token] * len(d) / n[token]),
            "adds": float(adds[token]), "examples": list(_examples(int(token), x, y, losses, tokenizer, adds[token])),
        }
        for token in (*worst, *best)
    ]  # fmt: skip


def _examples(
    token: int, x: Tensor, y: Tensor, losses: list[Tensor], tokenizer: Tokenizer, sign: float
) -> Iterator[dict[str, Any]]:
    """Where a token's losses differ most, to the side that its group is on."""
    d = losses[1] - losses[0]
    where = (y == token).nonzero()
    there = d[where[:, 0], where[:, 1]] * (1 if sign > 0 else -1)
    for i in there.argsort(descending=True, stable=True)[:N_EXAMPLES].tolist():
        window, at = where[i].tolist()
        first = max(0, at - CONTEXT)
        shown = [int(x[window, first]), *y[window, first : at + 1].tolist()]
        differences = [0.0, *(round(v, 3) for v in d[window, first : at + 1].tolist())]
        yield {
            "tokens": texts(shown, tokenizer), "differences": differences,
            "a": losses[0][window, at].item(), "b": losses[1][window, at].item(),
        }  # fmt: skip


def on_documents(a: Side, b: Side) -> dict[str, Any]:
    """Losses per byte of the same held-out documents, in each model's own tokens and context.

    Returns:
        Besides what `compare_losses` says: `documents`, those that differ most, with first line, bytes and losses.

    Raises:
        CompareError: the documents differ.
    """
    sides = [_document_losses(side) for side in (a, b)]
    n = min(len(documents) for documents, _ in sides)
    if not n:
        raise CompareError(
            "runs must share corpus and tokenizer, or else the held-out documents they are compared by, got none that "
            f"ends in the first {N_TOKENS} tokens of each"
        )
    documents = sides[0][0][:n]
    if documents != sides[1][0][:n]:
        raise CompareError(
            f"runs must have the same held-out text, got other documents in {a.name} than in {b.name}; train both with "
            "the same data.source, data.paths and data.val_fraction"
        )
    size = np.array([len(text.encode()) for text in documents], float)
    nats = np.array([losses[:n] for _, losses in sides])
    d = nats[1] - nats[0]
    ratio = d.sum() / size.sum()
    spread = ((d - ratio * size) ** 2).sum() * n / max(1, n - 1)
    order = np.argsort(-np.abs(d / size), kind="stable")[:N_GROUPS]
    return {
        "unit": "byte", "n_units": int(size.sum()), "n_groups": n,
        "a": float(nats[0].sum() / size.sum()), "b": float(nats[1].sum() / size.sum()), "difference": float(ratio),
        "se": float(spread**0.5 / size.sum()) if n > 1 else None,
        "documents": [
            {"text": documents[i].strip().split("\n")[0][:80], "n": int(size[i]), "a": nats[0][i] / size[i],
             "b": nats[1][i] / size[i]}
            for i in order.tolist()
        ],
    }  # fmt: skip


def _document_losses(side: Side) -> tuple[list[str], list[float]]:
    """Held-out documents as text, and the sum of each one's losses, its end included.

    Windows follow on each other. The first document is left out: its first token is given.
    """
    end = side.tokenizer.token_to_id(side.config.data.end_of_text)
    n_ctx = side.config.model.n_ctx
    tokens = np.asarray(side.corpus.tokens("val")[: N_TOKENS + 1]).astype(np.int64)
    n = (len(tokens) - 1) // n_ctx
    x, y = (torch.from_numpy(tokens[i : i + n * n_ctx]).view(n, n_ctx) for i in (0, 1))
    losses = token_losses(side.model, x, y).flatten().numpy()
    ends = np.flatnonzero(tokens[1 : 1 + len(losses)] == end)
    spans = list(pairwise(ends.tolist()))
    documents = [side.tokenizer.decode(tokens[s + 2 : e + 1].tolist(), skip_special_tokens=False) for s, e in spans]
    return documents, [float(losses[s + 1 : e + 1].sum()) for s, e in spans]
