"""`sparsetrain bench`: measure, write the figures, say what they say."""

import logging
from pathlib import Path

import torch

from sparsetrain import machine
from sparsetrain.bench import kernels, report
from sparsetrain.files import write_json
from sparsetrain.kernels import costs

ROOT = Path(__file__).resolve().parents[2]
log = logging.getLogger(__name__)


def bench(device: torch.device, out: Path, quick: bool = False, publish: Path | None = None) -> str:
    """Check and time the kernels on a device.

    Args:
        device: cpu, or a cuda device.
        out: the JSON file to write: {"environment": ..., "rows": [...]}.
        quick: one width, for a look.
        publish: a folder that also keeps the JSON, this device's part of benchmarks.md, and the cost model of
            `backend="auto"` with this device's part fitted; where it is the checkout's docs/, the model in use.

    Returns:
        Markdown tables.

    Raises:
        BenchError: an op's result is wrong, so nothing was timed; or publishing a quick run, or to no folder.
    """
    if publish and (quick or not publish.is_dir()):
        raise kernels.BenchError(f"publishing needs a whole run (no --quick) and a folder that is there, got {publish}")
    rows = kernels.measure(device, quick, log.info)
    result = {"environment": machine.describe(device), "rows": rows}
    write_json(out, result)
    text = report.summary(result)
    if publish:
        name = f"kernels-{device.type}"
        write_json(publish / f"{name}.json", result)
        report.write_section(publish / "benchmarks.md", name, text)
        model = costs.FILE if publish.resolve() == ROOT / "docs" else publish / costs.FILE.name
        write_json(model, {**costs.table(), device.type: report.coefficients(result)})
        costs.table.cache_clear()
    return f"{text}\n\nfigures: {out}"
