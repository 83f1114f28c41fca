"""What a circuit's nodes do on text: activations of the full model on held-out windows and on the task's prompts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sparsetrain.data import Corpus, evaluation_batches
from sparsetrain.model import Transformer
from sparsetrain.tasks import TaskData

WINDOWS, BATCH = 64, 16
SNIPPETS = 5  # of each sign
BEFORE, LENGTH = 16, 24  # tokens shown before the peak, and in all
DIGITS = 3


def corpus_windows(corpus: Corpus, n_ctx: int) -> Tensor:
    """Held-out windows (N, n_ctx) of a corpus, spread evenly; the same ones each time."""
    tokens = corpus.tokens("val")
    batches = evaluation_batches(tokens, WINDOWS // BATCH, BATCH, n_ctx)
    return torch.cat([inputs for inputs, _ in batches])


@torch.no_grad()
def activations(model: Transformer, tokens: Tensor, channels: Mapping[str, Sequence[int]]) -> Tensor:
    """Activations of some channels of the full model.

    Args:
        model: the model.
        tokens: (N, T).
        channels: for each site the channels wanted.

    Returns:
        (number of channels, N, T), sites and channels in the order given.
    """
    parts = []
    for batch in tokens.split(BATCH):
        seen: dict[str, Tensor] = {}
        model.final_resid(batch, model.visitor(seen, channels))
        parts.append(torch.cat([seen[site][..., list(wanted)] for site, wanted in channels.items()], dim=-1))
    return torch.cat(parts).permute(2, 0, 1).float()


def on_corpus(found: Tensor) -> dict[str, Any]:
    """One node's activations (N, T) on the corpus: how often it is active, and where most so, on both sides of zero."""
    return {
        "active": significant((found != 0).float().mean().item()),
        "mean": significant(found.mean().item()),
        "positive": _top_snippets(found),
        "negative": _top_snippets(-found, sign=-1),
    }


def on_prompts(found: Tensor, last: Tensor) -> list[list[float]]:
    """One node's activations (N, T) on prompts, without the padding after each prompt's `last` (N,) token."""
    return [_rounded(row[: end + 1]) for row, end in zip(found, last.tolist(), strict=True)]


def prompt_texts(data: TaskData, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The tokens of each prompt, and its right and wrong answer."""
    return [
        {
            "tokens": texts(row[: end + 1].tolist(), tokenizer),
            "answer": text(right, tokenizer),
            "wrong": text(wrong, tokenizer),
        }
        for row, end, right, wrong in zip(
            data.tokens, data.last.tolist(), data.correct.tolist(), data.wrong.tolist(), strict=True
        )
    ]


def texts(tokens: Iterable[int], tokenizer: Tokenizer) -> list[str]:
    """Each token as text."""
    return [text(token, tokenizer) for token in tokens]


def text(token: int, tokenizer: Tokenizer) -> str:
    """A token as text; a part of a character that is no text alone is shown as the replacement character."""
    return tokenizer.decode([token], skip_special_tokens=False)


def significant(value: float) -> float:
    """A number with as many digits as a reader can use."""
    return float(f"{value:.{DIGITS}g}")


def _top_snippets(found: Tensor, sign: int = 1) -> list[dict[str, Any]]:
    """The windows with the highest peaks above zero, one peak in each."""
    peaks, where = found.max(dim=1)
    best = sorted(range(len(peaks)), key=lambda i: (-peaks[i].item(), i))[:SNIPPETS]
    snippets = []
    for window in best:
        if peaks[window] <= 0:
            break
        start = max(0, min(int(where[window]) - BEFORE, found.shape[1] - LENGTH))
        shown = sign * found[window, start : start + LENGTH]
        snippets.append(
            {"window": window, "start": start, "peak": int(where[window]) - start, "values": _rounded(shown)}
        )
    return snippets


def _rounded(values: Tensor) -> list[float]:
    # A zero is written as 0, which is what most activations are under AbsTopK.
    return [significant(v) if v else 0 for v in values.tolist()]
