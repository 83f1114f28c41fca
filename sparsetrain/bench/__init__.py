"""Benchmarks: what is checked, then timed against what else could be used, side by side in one process."""
