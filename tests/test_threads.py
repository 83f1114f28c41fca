"""The choice of threads."""

from sparsetrain.threads import Threads


def test_threads_settles_on_the_faster_count_and_looks_again():
    threads = Threads(None)
    threads.counts = [1, 2]
    chosen = []
    for step in range(2 * Threads.PERIOD):
        n = threads.choose()
        chosen.append(n)
        fast = 2 if step < Threads.PERIOD else 1
        threads.record(n, 0.1 if n == fast else 0.3)
    first, second = chosen[: Threads.PERIOD], chosen[Threads.PERIOD :]
    trials = 2 * Threads.TRIALS
    assert set(first[trials:]) == {2}
    assert set(second[trials:]) == {1}
    assert Threads(3).choose() == 3
