"""Metrics that read as if no kill had happened."""

import json

import torch

from sparsetrain.record import Recorder
from sparsetrain.sparsity import Projected


def test_lines_of_undone_steps_and_cut_lines_are_forgotten(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": s, "x": 1.0}) + "\n" for s in (5, 10, 15)) + '{"step": 20, "x"')
    with Recorder(tmp_path, 10) as recorder:
        recorder.numbers(12, {"x": 2.0})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": 5, "x": 1.0}, {"step": 10, "x": 1.0}, {"step": 12, "x": 2.0},
    ]  # fmt: skip


def test_a_tensor_of_zeros_has_no_histogram_and_does_no_harm(tmp_path):
    dead = Projected("dead", torch.nn.Parameter(torch.zeros(3, 4)), "block")
    with Recorder(tmp_path, 0) as recorder:
        recorder.histograms(1, [dead])
        recorder.sparsity(1, [dead])
