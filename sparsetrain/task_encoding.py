"""A pair of prompts in a tokenizer's tokens, or the reason why it cannot be had in them."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from sparsetrain.task_language import AlignedPair
from sparsetrain.task_prompts import Pair


class Refused(Exception):
    """Why a pair does not suit the tokenizer or the context length."""


class Unaligned(Refused):
    """Its two prompts have not as many tokens, which another tokenizer hardly changes: they say more, or less."""


@dataclass(frozen=True)
class Encoded:
    """A pair in tokens; each tuple holds what belongs to the positive prompt, then what to the negative one."""

    prompts: tuple[list[int], ...]
    partners: tuple[list[int], ...]
    answers: tuple[int, ...]
    wrong: tuple[int, ...]
    right_sets: tuple[list[int], ...] = ()
    wrong_sets: tuple[list[int], ...] = ()


def encode_pair(pair: Pair, tokenizer: Tokenizer, n_ctx: int, whole_answers: bool, aligned: bool) -> Encoded:
    """Encode both prompts with their right answers and partners.

    Args:
        pair: what to encode.
        tokenizer: the model's tokenizer.
        n_ctx: its context length; a prompt is at most n_ctx - 1 tokens.
        whole_answers: an answer of several tokens is refused; otherwise its first token is asked for.
        aligned: prompts of different length are refused.

    Raises:
        Refused: the pair does not suit the tokenizer or the context length; says why in plain words.
    """
    prompts = [_ids(prompt, tokenizer) for prompt in (pair.positive, pair.negative)]
    for ids in prompts:
        if not 1 <= len(ids) < n_ctx:
            raise Refused(f"a prompt has {len(ids)} tokens, where n_ctx {n_ctx} allows 1 to {n_ctx - 1}")
    partners = _partners(pair, prompts, tokenizer) if isinstance(pair, AlignedPair) else prompts[::-1]
    if aligned and len(prompts[0]) != len(prompts[1]):
        lengths = f"{len(prompts[0])} and {len(prompts[1])}"
        raise Unaligned(f"its prompts have {lengths} tokens, where ablation=corrupted needs equally many")
    answers = (
        _answer(pair.positive, prompts[0], pair.positive_answer, tokenizer, whole_answers),
        _answer(pair.negative, prompts[1], pair.negative_answer, tokenizer, whole_answers),
    )
    if answers[0] == answers[1]:
        both = f"{pair.positive_answer!r} and {pair.negative_answer!r}"
        raise Refused(f"the answers {both} begin with the same token, {_texts(answers[:1], tokenizer)[0]!r}")
    if isinstance(pair, AlignedPair) and pair.right and pair.wrong:
        right, wrong = (tuple(_whole(texts, tokenizer) for texts in sets) for sets in (pair.right, pair.wrong))
        return Encoded(tuple(prompts), tuple(partners), answers, tuple(ids[0] for ids in wrong), right, wrong)
    return Encoded(tuple(prompts), tuple(partners), answers, answers[::-1])


def _answer(prompt: str, ids: list[int], answer: str, tokenizer: Tokenizer, whole: bool) -> int:
    """The token that an answer is asked for by, or raise Refused."""
    together = _ids(prompt + answer, tokenizer)
    rest = together[len(ids) :]
    if together[: len(ids)] != ids or not rest:
        raise Refused(f"the answer {answer!r} merges with the end of its prompt, {prompt[-20:]!r}")
    if whole and len(rest) > 1:
        raise Refused(f"the answer {answer!r} is not one token but {_texts(rest, tokenizer)}")
    return rest[0]


def _partners(pair: AlignedPair, prompts: list[list[int]], tokenizer: Tokenizer) -> list[list[int]]:
    """The corrupted partners, or raise Refused where they differ from the prompts in more than they shall."""
    _whole([word for words in pair.changed for word in words], tokenizer)
    partners = [_ids(text, tokenizer) for text in pair.partners] if pair.partners else prompts[::-1]
    for text, ids, partner, wanted in zip((pair.positive, pair.negative), prompts, partners, pair.changed, strict=True):
        if len(ids) != len(partner):
            raise Refused(f"{text[:60]!r} and its partner have {len(ids)} and {len(partner)} tokens, not as many")
        found = _texts([a for a, b in zip(ids, partner, strict=True) if a != b], tokenizer)
        if found != list(wanted):
            raise Refused(f"{text[:60]!r} must have the tokens {list(wanted)}, got {found} there")
    return partners


def _whole(texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """The one token of each text, or raise Refused."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
    for text, ids in zip(texts, encoded, strict=True):
        if len(ids) != 1:
            raise Refused(f"{text!r} must be one token, got {_texts(ids, tokenizer)}")
    return [ids[0] for ids in encoded]


def _ids(text: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode([token]) for token in ids]
