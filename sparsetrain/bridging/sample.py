"""A corpus that a dense model wrote itself, for a bridge to a model whose own corpus is not at hand.

It is what the model holds likely, not the text it was trained on: a bridge trained on it is a bridge on the model's own
distribution, and says nothing of how the two models agree on anybody's text.

Samples are kept whose text encodes back to the tokens that were drawn. What is left out is text that the model spelt
with tokens its tokenizer would not have chosen, with which it would read other tokens than it wrote.
"""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from sparsetrain.bridging.dense import OwnModel, load_dense
from sparsetrain.bridging.residuals import BridgeError, Residuals
from sparsetrain.config import ConfigError
from sparsetrain.files import write_whole

log = logging.getLogger(__name__)

BATCH = 256  # sequences drawn at a time


class Sampled(NamedTuple):
    """What was written: documents, tokens in each of them, and how many were drawn for that."""

    n_documents: int
    n_tokens_each: int
    n_drawn: int


def sample(
    source: str | Path, file: str | Path, n_tokens: int, seed: int = 0, length: int = 128, start: str = "\n",
    device: str | torch.device = "cpu",
) -> Sampled:  # fmt: skip
    """Write text sampled from a dense model, at temperature 1 from all of its tokens.

    Args:
        source: the model; see `load_dense`.
        file: JSON lines, {"text": ...}, for `data.source=json`; written whole or not at all.
        n_tokens: at least so many, in whole documents.
        seed: of what is drawn.
        length: tokens of a sample, the start among them.
        start: what every sample begins with. It is part of the document unless it is special tokens alone.
        device: where the model runs.

    Returns:
        How much it was. All documents are equally long, for `train.stride`.

    Raises:
        BridgeError, CheckpointError: as `load_dense`; or no sample encodes back to its tokens.
        ConfigError: a number is out of range, `start` has no tokens, or the file exists.
        WriteError: it could not be written.
    """
    file = Path(file)
    if file.exists():
        raise ConfigError(f"the file must be a new one, got {file}, which exists; name another")
    model = load_dense(source, device)
    head = model.tokenizer.encode(start, add_special_tokens=False).ids
    _check(model, head, n_tokens, length, start)
    n_each = length - (len(head) if _is_special(model.tokenizer, head) else 0)
    n_documents, n_drawn, texts = -(-n_tokens // n_each), 0, []
    with tqdm(desc="sampling", unit=" documents", total=n_documents, disable=None) as progress:
        for drawn in _batches(model, torch.tensor([head] * BATCH, device=device), length, seed):
            n_drawn += len(drawn)
            texts += readable(model.tokenizer, drawn[:, length - n_each :].tolist())
            if not texts:
                raise BridgeError(
                    f"samples must encode back to the tokens that were drawn, got none of {n_drawn} of {length} tokens "
                    f"that begin with {start!r}; take another --start or a lower --length"
                )
            progress.update(min(len(texts), n_documents) - progress.n)
            if len(texts) >= n_documents:
                break
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts[:n_documents])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(lines).encode())
    return Sampled(n_documents, n_each, n_drawn)


def readable(tokenizer: Tokenizer, samples: list[list[int]]) -> list[str]:
    """The texts of those samples, lists of token ids, that encode back to the same ids."""
    texts = tokenizer.decode_batch(samples)
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [text for text, again, ids in zip(texts, encoded, samples, strict=True) if again.ids == ids]


@torch.no_grad()
def lengthen(model: Residuals, tokens: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Sequences (B, length) that begin with `tokens` (B, T) and go on as the model has it."""
    predict = _of_ours(model) if isinstance(model, OwnModel) else _of_theirs(model)
    while tokens.shape[1] < length:
        following = torch.multinomial(predict(tokens).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, following], 1)
    return tokens


def _batches(model: Residuals, heads: Tensor, length: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator(heads.device).manual_seed(seed)
    while True:
        yield lengthen(model, heads, length, generator)


def _of_ours(model: OwnModel) -> Callable[[Tensor], Tensor]:
    """Logits (B, V) of what follows tokens (B, T); the context that our models have grows short, so without a cache."""

    def predict(tokens: Tensor) -> Tensor:
        return model.model.logits(model.model.final_resid(tokens)[:, -1], tokens[:, -1])

    return predict


def _of_theirs(model: Residuals) -> Callable[[Tensor], Tensor]:
    """The same of a model of Hugging Face, for tokens that grow by one from call to call."""
    cache = None

    def predict(tokens: Tensor) -> Tensor:
        nonlocal cache
        new = tokens if cache is None else tokens[:, -1:]
        out = model.model(input_ids=new, past_key_values=cache, use_cache=True)
        cache = getattr(out, "past_key_values", None)  # a model that has none reads all tokens again
        return out.logits[:, -1]

    return predict


def _is_special(tokenizer: Tokenizer, head: list[int]) -> bool:
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return set(head) <= special


def _check(model: Residuals, head: list[int], n_tokens: int, length: int, start: str) -> None:
    most = model.n_ctx or length
    if not head:
        raise ConfigError(f"--start must be text of at least one token, got {start!r}")
    if not len(head) < length <= most:
        raise ConfigError(
            f"--length must be above the {len(head)} tokens of --start and at most the model's {most}, got {length}"
        )
    if n_tokens < 1:
        raise ConfigError(f"--tokens must be at least 1, got {n_tokens}")
