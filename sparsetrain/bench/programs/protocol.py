"""The programs of the benchmark, in RASP. What lies beside this file was made from it:

    pip install tracr-pypi
    python -m sparsetrain.bench.compile_programs sparsetrain/bench/programs/protocol.py sparsetrain/bench/programs

A file of your own needs the same: PROGRAMS, by name, each with the fields of compile_programs.Program. Let max_seq_len be
greater than length, or a part that finds out the length can be cut without a trace.
"""

from tracr.compiler import lib
from tracr.rasp import rasp


def reverse() -> rasp.SOp:
    """The tokens from the last to the first, by the length that is counted."""
    length = rasp.SelectorWidth(rasp.Select(rasp.tokens, rasp.tokens, rasp.Comparison.TRUE))
    opposite = length - rasp.indices - 1
    return rasp.Aggregate(rasp.Select(rasp.indices, opposite, rasp.Comparison.EQ), rasp.tokens)


LETTERS, NUMBERS = {"a", "b", "c"}, {1, 2, 3}
sort = lib.make_sort(rasp.tokens, rasp.tokens, max_seq_len=5, min_key=1)
PROGRAMS = {
    "xproportion": dict(
        output=lib.make_frac_prevs(rasp.tokens == "x"), vocabulary={"w", "x", "y", "z"}, max_seq_len=5, length=4
    ),
    "reverse": dict(output=reverse(), vocabulary=NUMBERS, max_seq_len=5, length=4),
    "reverse_full": dict(output=reverse(), vocabulary=NUMBERS, max_seq_len=5, length=5),
    "hist": dict(output=lib.make_hist(), vocabulary=LETTERS, max_seq_len=5, length=5),
    "detect_ab": dict(output=lib.detect_pattern(rasp.tokens, "ab"), vocabulary=LETTERS, max_seq_len=5, length=5),
    "sort_unique": dict(
        output=lib.make_sort_unique(rasp.tokens, rasp.tokens), vocabulary=NUMBERS, max_seq_len=5, length=5
    ),
    "sort": dict(output=sort, vocabulary=NUMBERS, max_seq_len=5, length=5),
    "length": dict(output=lib.make_length(), vocabulary=LETTERS, max_seq_len=5, length=4),
    "length_full": dict(output=lib.make_length(), vocabulary=LETTERS, max_seq_len=5, length=5),
}
