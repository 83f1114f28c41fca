"""`sparsetrain bench`: measure, write the figures, say what they say."""

import logging
from pathlib import Path

import torch

from sparsetrain import machine
from sparsetrain.bench import kernels, report
from sparsetrain.checkpoint import write_json
from sparsetrain.kernels import costs

ROOT = Path(__file__).resolve().parents[2]
log = logging.getLogger(__name__)


def bench(device: torch.device, out: Path, quick: bool = False, publish: bool = False) -> str:
    """Check and time the kernels on a device.

    Args:
        device: cpu, or a cuda device.
        out: the JSON file to write: {"environment": ..., "rows": [...]}.
        quick: one width, for a look.
        publish: also keep the JSON under docs/, rewrite this device's part of docs/benchmarks.md, and fit the cost
            model of `backend="auto"`. For maintainers, in a checkout.

    Returns:
        Markdown tables.

    Raises:
        BenchError: an op's result is wrong, so nothing was timed; or publishing a quick run, or without a checkout.
    """
    if publish and (quick or not (ROOT / "docs").is_dir()):
        raise kernels.BenchError("publishing needs a whole run (no --quick) in a checkout that has docs/")
    rows = kernels.measure(device, quick, log.info)
    result = {"environment": machine.describe(device), "rows": rows}
    write_json(out, result)
    text = report.summary(result)
    if publish:
        name = f"kernels-{device.type}"
        write_json(ROOT / "docs" / f"{name}.json", result)
        report.write_section(ROOT / "docs" / "benchmarks.md", name, text)
        write_json(costs.FILE, {**costs.table(), device.type: report.coefficients(result)})
        costs.table.cache_clear()
    return f"{text}\n\nfigures: {out}"
