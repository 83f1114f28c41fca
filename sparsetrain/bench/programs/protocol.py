"""The programs of the benchmark, in RASP. What lies beside this file was made from it:

    pip install tracr-pypi
    python -m sparsetrain.bench.compile_programs sparsetrain/bench/programs/protocol.py sparsetrain/bench/programs

A file of your own needs the same: PROGRAMS, for each name what compile_programs.Program holds: output, vocabulary,
max_seq_len, length. Let max_seq_len be greater than length, or a part that finds out the length can be cut without a
trace.
"""

from tracr.compiler import lib
from tracr.rasp import rasp


def reverse() -> rasp.SOp:
    """The tokens from the last to the first, by the length that is counted."""
    length = rasp.SelectorWidth(rasp.Select(rasp.tokens, rasp.tokens, rasp.Comparison.TRUE))
    opposite = length - rasp.indices - 1
    return rasp.Aggregate(rasp.Select(rasp.indices, opposite, rasp.Comparison.EQ), rasp.tokens)


LETTERS, NUMBERS = {"a", "b", "c"}, {1, 2, 3}
PROGRAMS = {
    "xproportion": (lib.make_frac_prevs(rasp.tokens == "x"), {"w", "x", "y", "z"}, 5, 4),
    "reverse": (reverse(), NUMBERS, 5, 4),
    "reverse_full": (reverse(), NUMBERS, 5, 5),
    "hist": (lib.make_hist(), LETTERS, 5, 5),
    "detect_ab": (lib.detect_pattern(rasp.tokens, "ab"), LETTERS, 5, 5),
    "sort_unique": (lib.make_sort_unique(rasp.tokens, rasp.tokens), NUMBERS, 5, 5),
    "sort": (lib.make_sort(rasp.tokens, rasp.tokens, max_seq_len=5, min_key=1), NUMBERS, 5, 5),
    "length": (lib.make_length(), LETTERS, 5, 4),
    "length_full": (lib.make_length(), LETTERS, 5, 5),
}
