"""The command `sparsetrain bench`; `python -m sparsetrain.bench.command` is the same where only torch is installed."""

import argparse
import logging
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command can be told."""
    parser.add_argument(
        "what", nargs="?", default="kernels",
        choices=("kernels", "step", "rules", "circuits", "pruning", "bridge", "bimt"),
        help="kernels (default): each op; step: whole training steps; rules: losses under different training rules; "
        "circuits: methods that rank edges, on circuits that are known; pruning: what a search for nodes costs; "
        "bridge: what a step with a bridge costs; bimt: brain-inspired modular training",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--quick", action="store_true", help="small sizes: seconds in place of minutes")
    parser.add_argument("--seeds", type=int, default=3, help="for circuits and bimt: how many (default 3)")
    parser.add_argument("--experiments", nargs="+", default=(), metavar="NAME", help="for bimt (default: all seven)")
    parser.add_argument(
        "--programs", type=Path, metavar="PATH",
        help="for circuits: a .py file of RASP programs (needs tracr-pypi), or a folder of compiled ones",
    )  # fmt: skip
    parser.add_argument("--out", default="bench.json", help="where the figures are written (default bench.json)")
    parser.add_argument(
        "--publish", nargs="?", const="docs", metavar="FOLDER",
        help="keep the figures and their page in FOLDER (default docs) and fit the cost model of backend='auto', which "
        "for the docs of a checkout is the one in use",
    )  # fmt: skip


def command(options: argparse.Namespace) -> None:
    """Run the benchmark and print its tables.

    Raises:
        BenchError: an op's result is wrong, or there is no such device or program.
    """
    import torch

    from sparsetrain.bench import run
    from sparsetrain.bench.kernels import BenchError

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device must be auto or cpu on a machine without a CUDA device, got cuda")
    on_cpu = options.device == "cpu" or options.what == "bimt" or not torch.cuda.is_available()
    device = torch.device("cpu" if on_cpu else "cuda")
    publish = None if options.publish is None else Path(options.publish)
    only = (options.programs, options.seeds, options.experiments)
    print(run.bench(options.what, device, Path(options.out), options.quick, publish, *only))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser("sparsetrain.bench.command", description=__doc__)
    add_arguments(parser)
    command(parser.parse_args())
