"""`sparsetrain bench`: measure, write the figures, say what they say."""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sparsetrain import machine
from sparsetrain.bench import kernels, report
from sparsetrain.files import write_json
from sparsetrain.kernels import costs

ROOT = Path(__file__).resolve().parents[2]
log = logging.getLogger(__name__)


def bench(
    what: str,
    device: torch.device,
    out: Path,
    quick: bool = False,
    publish: Path | None = None,
    programs: Path | None = None,
    n_seeds: int = 3,
    experiments: Sequence[str] = (),
) -> str:
    """Check and time the kernels, time training steps, compare rules, judge methods, or repeat BIMT, on a device.

    Args:
        what: "kernels", "step", "rules", "circuits", "pruning", "bridge" or "bimt", which runs on a CPU.
        device: cpu, or a cuda device.
        out: the JSON file to write: {"environment": ..., "rows": [...]}.
        quick: small sizes, for a look.
        publish: a folder that also keeps the JSON, this device's part of benchmarks.md, and with "kernels" the cost
            model of `backend="auto"` with this device's part fitted; in the checkout's docs/, the model in use.
        programs: of "circuits", in place of the benchmark's own; see `circuits.program_files`.
        n_seeds: of "circuits" and "bimt".
        experiments: of "bimt"; none for all.

    Returns:
        Markdown tables.

    Raises:
        BenchError: an op's result is wrong, so nothing was timed; or publishing a quick run, or to no folder.
    """
    if publish and (quick or programs or not publish.is_dir()):
        needs = "a whole run (no --quick, no --programs) and a folder that is there"
        raise kernels.BenchError(f"publishing needs {needs}, got {publish}")
    rows, summary = _measured(what, device, quick, out, programs, n_seeds, experiments)
    result = {"environment": machine.describe(device), "rows": rows}
    write_json(out, result)
    text = summary(result)
    if publish:
        name = f"{what}-{device.type}"
        write_json(publish / f"{name}.json", result)
        report.write_section(publish / "benchmarks.md", name, text)
    if publish and what == "bimt":
        for drawn in sorted(out.with_suffix("").glob("*.svg")):
            shutil.copy(drawn, publish)
    if publish and what == "kernels":
        model = costs.FILE if publish.resolve() == ROOT / "docs" else publish / costs.FILE.name
        write_json(model, {**costs.table(), device.type: report.coefficients(result)})
        costs.table.cache_clear()
    return f"{text}\n\nfigures: {out}"


def _measured(
    what: str,
    device: torch.device,
    quick: bool,
    out: Path,
    programs: Path | None,
    n_seeds: int,
    experiments: Sequence[str],
) -> tuple[list[dict], Callable[[dict], str]]:
    """The rows of a benchmark, and what says them. Training needs omegaconf, which kernels do without."""
    if what == "kernels":
        return kernels.measure(device, quick, log.info), report.summary
    if what == "rules":
        from sparsetrain.bench import rules

        return rules.measure(out.with_suffix(""), device, quick, log.info), rules.summary
    if what == "circuits":
        from sparsetrain.bench import circuits, circuits_report

        rows = circuits.measure(device, quick, log.info, programs, n_seeds, out.with_suffix(".rows.jsonl"))
        return rows, circuits_report.summary
    if what == "pruning":
        from sparsetrain.bench import pruning

        return pruning.measure(device, quick, log.info), pruning.summary
    if what == "bridge":
        from sparsetrain.bench import bridge

        return bridge.measure(device, quick, log.info), bridge.summary
    if what == "bimt":
        from sparsetrain.bench import bimt, bimt_report

        return bimt.measure(experiments, n_seeds, quick, log.info, out.with_suffix("")), bimt_report.summary
    from sparsetrain.bench import step, step_report

    rows = []
    for config in step.configs(device, quick):
        rows += step.measure(config, device, log.info)
    return rows, step_report.summary
