"""Metrics that read as if no kill had happened."""

import io
import json

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


def test_a_picture_comes_back_as_it_was(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    with Recorder(tmp_path, 0) as recorder:
        recorder.image(3, "picture", pixels)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    [seen] = events.Images("picture")
    assert seen.step == 3
    assert np.array_equal(np.array(Image.open(io.BytesIO(seen.encoded_image_string))), pixels)
