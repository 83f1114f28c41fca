"""What a run tells while it trains: metrics.jsonl, TensorBoard and the log."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import torch

from sparsetrain import parallel
from sparsetrain.files import write_whole
from sparsetrain.sparsity import Projected, count

log = logging.getLogger(__name__)


class _Nowhere:
    """TensorBoard for a process that writes nothing."""

    def add_scalar(self, *args, **kwargs) -> None:
        pass

    add_histogram = add_image = add_scalar

    def close(self) -> None:
        pass


class Recorder:
    """Writes numbers to `metrics.jsonl` and TensorBoard, as a context; of several processes the first does.

    Args:
        run_dir: the run directory.
        step: steps done so far; what was recorded of later ones is forgotten, since a kill undid them.
    """

    def __init__(self, run_dir: Path, step: int):
        self.run_dir = run_dir
        self.step = step

    def __enter__(self) -> "Recorder":
        if parallel.rank():
            self.file, self.board = open(os.devnull, "w"), _Nowhere()
            return self
        # Imported here: it takes a second, and only training needs it.
        from torch.utils.tensorboard import SummaryWriter

        path = self.run_dir / "metrics.jsonl"
        _drop_lines_after(path, self.step)
        self.file = open(path, "a")
        self.board = SummaryWriter(self.run_dir / "tensorboard", purge_step=self.step + 1)
        return self

    def __exit__(self, *error) -> None:
        self.file.close()
        self.board.close()

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Record numbers of a step by name."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def sparsity(self, step: int, tensors: list[Projected]) -> None:
        """Record density and dead rows and columns of each projected tensor."""
        for name, row in count(tensors).items():
            for key, value in row.items():
                self.board.add_scalar(f"{key}/{name}", value, step)

    @torch.no_grad()
    def histograms(self, step: int, tensors: list[Projected]) -> None:
        """Record how nonzero weights, and their number in each row, are distributed."""
        for t in tensors:
            weight = t.dense()
            alive = weight != 0
            if alive.any():  # there is no histogram of nothing
                self.board.add_histogram(f"weights/{t.name}", weight[alive], step)
            if alive.dim() == 2:
                self.board.add_histogram(f"nonzeros_per_row/{t.name}", alive.sum(1), step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Record a picture (H, W, 3) uint8."""
        self.board.add_image(name, pixels, step, dataformats="HWC")


def _drop_lines_after(path: Path, step: int) -> None:
    """Forget lines of later steps, and a line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    write_whole(path, "".join(kept).encode())
