"""Whether two models mean the same by their tokens, without which a bridge cannot compare what they predict."""

from collections.abc import Mapping

from sparsetrain.bridging.residuals import BridgeError, Residuals

# Prose, code, digits, spaces and what few tokenizers hold whole: where two of them part, some line of it shows it.
SAMPLE = (
    "Alice said: “Why?”\n\ndef area(radius):\n    return 3.14159 * radius ** 2  # ünïcödé, 漢字, 🙂\n"
    "\tTab  and   spaces"
)


def same_tokens(a: Residuals, b: Residuals) -> int:
    """Make sure that two models mean the same by their tokens.

    Rows of the logits beyond the tokenizer's tokens, which some models have for the sake of a round number, are
    allowed on either side.

    Returns:
        How many logits, from the first, the two have in common: what their predictions can be compared over.

    Raises:
        BridgeError: how their vocabularies or encodings differ.
    """
    ours, theirs = a.tokenizer.get_vocab(), b.tokenizer.get_vocab()
    if ours != theirs:
        raise BridgeError(f"the two models must have the same tokens, got {_difference(ours, theirs)}")
    n_common, n_needed = min(a.vocab_size, b.vocab_size), max(ours.values()) + 1
    if n_common < n_needed:
        raise BridgeError(
            f"both models must have a logit for each of the tokenizer's {n_needed} tokens, "
            f"got {a.vocab_size} and {b.vocab_size} logits"
        )
    for piece in (SAMPLE, *SAMPLE.splitlines(keepends=True)):
        first, second = (m.tokenizer.encode(piece, add_special_tokens=False).ids for m in (a, b))
        if first != second:
            raise BridgeError(
                f"the two tokenizers must encode alike, got {_around(first, second)} of {piece!r}; they have the same "
                "tokens, so their normalizers, pre-tokenizers or merges differ"
            )
    return n_common


def _difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """How two vocabularies differ: sizes, and the first tokens with other ids."""
    parted = sorted(
        (token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token)),
        key=lambda token: (min(ours.get(token, len(ours)), theirs.get(token, len(theirs))), token),
    )
    shown = ", ".join(f"{t!r} ({ours.get(t, 'none')} and {theirs.get(t, 'none')})" for t in parted[:4])
    return f"{len(ours)} and {len(theirs)} tokens, {len(parted)} with other ids: {shown}"


def _around(first: list[int], second: list[int]) -> str:
    """Where two encodings part."""
    at = next((i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), min(len(first), len(second)))
    return f"{first[at : at + 4]} and {second[at : at + 4]} from token {at}"
