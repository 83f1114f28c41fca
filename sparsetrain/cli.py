"""The command line: a thin roof over functions that a notebook can call as well."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from sparsetrain.bench import command as bench
from sparsetrain.bridge_config import BridgeConfig
from sparsetrain.config import ConfigError, RunConfig, config_to_yaml, describe_keys, load_config
from sparsetrain.prune_config import ProbingOptions, PruneConfig
from sparsetrain.sweeping.sweep_config import VARIED, SweepOptions, load_sweep

KEYS = "\nkeys, given as key=value or in a YAML file, with their defaults:\n"
PROBING_KEYS = "\n\nkeys of --method probing, which takes these in place of the ones above:\n"
Add = Callable[..., argparse.ArgumentParser]  # a command by name, function, summary, and its keys
METHODS = ("node_masks", "attribution", "edge_masks", "topk_masks", "acdc", "probing")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 an error with its message or no circuit, 130 interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no positional arguments after an option; overrides may stand anywhere.
    if any(item.startswith("-") for item in rest) or (rest and "config" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.config += rest
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "fsspec", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        status = options.command(options) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell says of a process that SIGPIPE ended
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ConfigError as error:  # before the other errors' modules, which take seconds to import
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if not isinstance(error, _expected_errors()):
            raise
        status = getattr(error, "exit_status", 1)
        print(error if status == 130 else f"error: {error}", file=sys.stderr)
        return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sparsetrain", description="Train weight-sparse transformers and read their circuits."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command, summary: str, keys: type | None = None) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=KEYS + describe_keys(keys) if keys else None,
        )  # fmt: skip
        made.set_defaults(command=command)
        return made

    for group in (_of_training, _of_models, _of_circuits, _of_sweeps_and_benchmarks):
        group(add)
    return parser


def _of_training(add: Add) -> None:
    for name, command, summary, keys in (
        ("train", _train, "Train a model from a config, or go on with a run that was stopped.", RunConfig),
        ("prepare", _prepare, "Read and tokenize the corpus of a config, without training.", RunConfig),
        ("bridge", _bridge, "Train a sparse model with a bridge to a dense one, or a bridge alone.", BridgeConfig),
    ):
        made = add(name, command, summary, keys)
        made.add_argument("config", nargs="*", metavar="FILE.yaml | key=value")
        made.add_argument("--print-config", action="store_true", help="print the resolved config and stop")


def _of_models(add: Add) -> None:
    made = add("import", _import, "Make a run directory of a GPT-2 model of Hugging Face, to prune it.")
    made.add_argument(
        "source",
        help="a folder with config.json, tokenizer.json and safetensors, or a name on the hub; glassllm:en or "
        "glassllm:pt makes a Hugging Face folder, to bridge to, of a model that the package glassllm ships",
    )
    made.add_argument("run", help="the run directory, or the folder, to write")

    made = add("sample", _sample, "Write text that a dense model makes up, as a corpus for a bridge to it.")
    made.add_argument("dense", help="a run directory, a Hugging Face folder, or a name on its hub")
    made.add_argument("file", help="the JSON-lines file to write")
    made.add_argument("--tokens", type=int, required=True, help="how many to write, in whole samples")
    made.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    made.add_argument("--length", type=int, default=128, help="tokens of a sample (default 128)")
    made.add_argument("--start", default="\n", help="text that every sample begins with (default: a line's end)")
    made.add_argument("--device", default="auto", help="auto (default), cpu or cuda")


def _of_circuits(add: Add) -> None:
    made = add("tasks", _tasks, "Print, for every task, how well a run's full model does it on held-out prompts.")
    made.add_argument("run", help="a run directory")
    made.add_argument("--pairs", type=int, default=64, help="prompt pairs per task (default 64)")
    made.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    made.add_argument("--examples", action="store_true", help="print a prompt pair of each task as well")

    made = add("prune", _prune, "Extract the circuit of a task from a run and measure it.", PruneConfig)
    made.epilog += PROBING_KEYS + describe_keys(ProbingOptions)
    made.add_argument("run", help="a run directory")
    made.add_argument("config", nargs="*", metavar="FILE.yaml | key=value")
    made.add_argument(
        "--task", required=True,
        help="a built-in task (`sparsetrain tasks RUN` lists them), or a JSON-lines file; with --method probing: "
        "subject_verb, reflexive or squares_mod_113",
    )  # fmt: skip
    made.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    made.add_argument("--method", default="node_masks", help=f"{', '.join(METHODS)} (default node_masks)")
    made.add_argument("--over-training", action="store_true", help="prune every kept checkpoint; draw when it forms")
    made.add_argument("--print-config", action="store_true", help="print the resolved config and stop")

    made = add("overlap", _overlap, "Print how much circuits have in common: what is in both over what is in either.")
    made.add_argument("circuits", nargs="+", help="folders of circuits of one graph, of several tasks or seeds, say")

    made = add("compare", _compare, "Set two runs side by side: losses token by token, circuits, weights, cost.")
    made.add_argument("runs", nargs=2, metavar="RUN", help="run directories, A and B")
    made.add_argument("--out", metavar="FOLDER", help="where to write (default: comparisons/A-B)")

    made = add("locality", _locality, "Measure and draw where a run's nodes lie, and how local its circuits are.")
    made.add_argument("run", help="a run directory")
    made.add_argument("--task", help="its circuits alone (default: those of all tasks)")
    made.add_argument("--circuit", nargs="+", help="these alone, by their folders' names")
    made.add_argument("--export", metavar="FOLDER", help="write a run whose weights are in the order of places")

    for name, command, summary in (
        ("transfer", _transfer, "Carry a circuit across a bridge: steer and ablate the dense model along it."),
        ("page", _page, "Write the page of a circuit again, from what the run directory holds."),
    ):
        made = add(name, command, summary)
        made.add_argument("run", help="a run directory")
        made.add_argument("--task", required=True, help="its name: the folder under circuits/")
        made.add_argument("--circuit", default="node_masks", help="its folder's name: the method, or what `name` was")
        if name == "transfer":
            made.add_argument("--bridge", default="dense", help="its folder's name under bridges/ (default dense)")
            made.add_argument("--device", default="auto", help="auto (default), cpu or cuda")


def _of_sweeps_and_benchmarks(add: Add) -> None:
    made = add("sweep", _sweep, "Train, prune and measure every combination of a config; goes on where it was stopped.")
    made.epilog = VARIED + "\n" + KEYS + describe_keys(SweepOptions)
    made.add_argument("config", nargs="+", metavar="FILE.yaml | key=value")
    made.add_argument("--plan", action="store_true", help="print the points, their time and memory, and stop")
    made.add_argument("--retry", action="store_true", help="run again what failed")

    made = add("frontier", _frontier, "Draw what sweeps found: held-out loss against the size of circuits.")
    made.add_argument("sweeps", nargs="+", metavar="SWEEP", help="a sweep's folder, finished or not")
    made.add_argument("--out", metavar="FOLDER", help="where to write (default: the first sweep's folder)")
    made.add_argument(
        "--publish", metavar="FOLDER",
        help="also write there what a repository can keep: figure, tables, rows and configs, without the page",
    )  # fmt: skip
    made.add_argument("--pages", action="store_true", help="first write the page of each circuit that has none")

    made = add(
        "bench",
        bench.command,
        "Check and time the kernels, or whole training steps, or compare training rules.",
    )
    bench.add_arguments(made)


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is meant for the user; anything else is a bug and keeps its traceback."""
    from sparsetrain.analysis.compare_losses import CompareError
    from sparsetrain.analysis.frontier_data import FrontierError
    from sparsetrain.bench.kernels import BenchError
    from sparsetrain.bridging.residuals import BridgeError
    from sparsetrain.checkpoint import CheckpointError
    from sparsetrain.data import DataError
    from sparsetrain.files import WriteError
    from sparsetrain.locality.positions import LocalityError
    from sparsetrain.loop import Interrupted, TrainingError
    from sparsetrain.parallel import ParallelError
    from sparsetrain.pruning.circuit import CircuitError
    from sparsetrain.tasks import TaskError

    files = DataError, CheckpointError, CircuitError, WriteError
    stages = TrainingError, Interrupted, ParallelError, BridgeError
    return ConfigError, *files, *stages, TaskError, BenchError, LocalityError, FrontierError, CompareError


def _train(options: argparse.Namespace) -> None:
    config = load_config(RunConfig, options.config)
    if options.print_config:
        print(config_to_yaml(config), end="")
        return
    from sparsetrain.parallel import number
    from sparsetrain.train import train

    run_dir = train(config)
    if number():  # of several processes the first has the word
        return
    print((run_dir / "summary.json").read_text(), end="")
    print(f"run directory: {run_dir}")


def _prepare(options: argparse.Namespace) -> None:
    config = load_config(RunConfig, options.config)
    if options.print_config:
        print(config_to_yaml(config), end="")
        return
    from sparsetrain.data import prepare

    corpus = prepare(config.data)
    print(f"{corpus.folder}: {corpus.manifest['tokens']} tokens")


def _bridge(options: argparse.Namespace) -> None:
    config = load_config(BridgeConfig, options.config)
    if options.print_config:
        print(config_to_yaml(config), end="")
        return
    from sparsetrain.bridging.quality import describe
    from sparsetrain.bridging.train import bridge

    folder = bridge(config)
    print(describe(json.loads((folder / "report.json").read_text())))
    print(f"bridge: {folder}")


def _import(options: argparse.Namespace) -> None:
    if options.source.startswith("glassllm:"):
        from sparsetrain.interop.glassllm import import_glassllm

        folder = import_glassllm(options.source.removeprefix("glassllm:"), options.run)
        print(f"Hugging Face folder: {folder}")
        print(f"a corpus of its tokens: data.tokenizer={folder / 'tokenizer.json'} data.end_of_text='<eos>'")
        return
    from sparsetrain.interop.huggingface import import_gpt2

    print(f"run directory: {import_gpt2(options.source, options.run)}")
    print("no corpus came with it: prune it under ablation=mean_task, mean_position, zero or corrupted")


def _sample(options: argparse.Namespace) -> None:
    from sparsetrain.bridging.sample import sample

    o = options
    made = sample(o.dense, o.file, o.tokens, o.seed, o.length, o.start, _device(o))
    print(f"{o.file}: {made.n_documents} samples of {made.n_tokens_each} tokens, of {made.n_drawn} that were drawn")
    print(
        f"a corpus of it: data.source=json data.paths=[{o.file}]; a sample at a time: model.n_ctx="
        f"{made.n_tokens_each - 1} train.stride={made.n_tokens_each + 1}"
    )


def _tasks(options: argparse.Namespace) -> None:
    from sparsetrain.pruning.measures import score_tasks

    # Which first tokens stand for answers of several is seen with --examples; here it would tear the table apart.
    logging.getLogger("sparsetrain.tasks").setLevel(logging.WARNING)
    head = f"{'task':28} {'loss':>6} {'accuracy':>9} {'calibrated':>11} {'pairs told apart':>17}"
    for score in score_tasks(options.run, options.pairs, _device(options)):
        print(head, end="\n" * bool(head))
        head = ""
        if score.loss is None:
            print(f"{score.name:28} not possible with this tokenizer: {score.reason}")
        else:
            numbers = f"{score.loss:6.3f} {score.accuracy:9.1%} {score.calibrated_loss:11.3f}"
            print(f"{score.name:28} {numbers} {score.pair_accuracy:17.1%}")
        if options.examples:
            for prompt, answer in score.examples:
                print(f"    {prompt!r} -> {answer!r}")
    print(
        "chance: loss 0.693, 50 %. calibrated: the loss after fitting one scale and one shift, as for circuits. pairs\n"
        "told apart: the right answer is likelier after its own prompt than after the other. Prune what has a low\n"
        "calibrated loss: see `sparsetrain prune --help`."
    )


def _prune(options: argparse.Namespace) -> int | None:
    if options.method not in METHODS:  # before a model is read
        raise ConfigError(f"--method must be one of {', '.join(METHODS)}, got {options.method!r}")
    probing = options.method == "probing"
    if probing and options.over_training:
        raise ConfigError("--over-training must go with a method of circuits, got --method probing")
    config = load_config(ProbingOptions if probing else PruneConfig, options.config)
    if options.print_config:
        print(config_to_yaml(config), end="")
        return
    if probing:
        return _probe(options, config)
    if options.over_training:
        return _over_training(options, config)
    from sparsetrain.analysis.circuit_page import write_page
    from sparsetrain.analysis.readings import cautions
    from sparsetrain.pruning.circuit import describe
    from sparsetrain.pruning.prune import Unreached, prune

    found = prune(options.run, options.task, config, options.method, _device(options))
    if isinstance(found, Unreached):
        print(
            f"no circuit of {found.task} reaches {found.target_loss}; the best had {found.best_loss:.3f}: {found.why}"
        )
        return 1
    folder = Path(options.run) / "circuits" / found.task / (config.name or found.method)
    print(describe(found))
    for caution in cautions(found.measures):
        print(f"  - {caution}")
    print(f"page: {write_page(options.run, folder)}")


def _probe(options: argparse.Namespace, config: ProbingOptions) -> None:
    from sparsetrain.pruning.probing_run import probe_run

    found = probe_run(options.run, options.task, config, _device(options))
    print(f"{found.variable} in {found.sublayer}: {', '.join(found.neuron_names()) or 'no neuron'}")
    for name, measures in {"": found.measures, **found.controls}.items():
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in measures.items() if v != ""}
        print("\n".join([f"control: {name}"] * bool(name) + [f"  {key:40} {value}" for key, value in shown.items()]))
    print(f"saved in {Path(options.run) / 'circuits' / options.task / 'probing'}")


def _over_training(options: argparse.Namespace, config: PruneConfig) -> None:
    from sparsetrain.analysis.formation_page import write_formation_page
    from sparsetrain.pruning.formation import over_training

    file = over_training(options.run, options.task, config, options.method, _device(options))
    print(file.read_text(), end="")
    print(f"page: {write_formation_page(file)}")


def _sweep(options: argparse.Namespace) -> int:
    from sparsetrain.sweeping.run import not_done, plan, sweep
    from sparsetrain.sweeping.table import TABLE

    config = load_sweep(options.config)
    if options.plan:
        print(plan(config))
        return 0
    rows = sweep(config, options.retry)
    print((config.options.folder / TABLE).read_text(), end="")
    print(f"rows: {config.options.folder / 'rows.jsonl'}")
    if left := not_done(config):
        print(f"{len(left)} points are not done ({left[0].id}, ...): give the command again", file=sys.stderr)
    return 1 if left or any(row["error"] for row in rows) else 0


def _compare(options: argparse.Namespace) -> None:
    from sparsetrain.analysis.compare import compare

    out, text = compare(*options.runs, options.out)
    print(text)
    print(f"page: {out / 'compare.html'}")


def _frontier(options: argparse.Namespace) -> None:
    from sparsetrain.analysis.frontier import write_frontier

    out, text = write_frontier(options.sweeps, options.out, options.publish, options.pages)
    print(text)
    print(f"page: {out / 'frontier.html'}")


def _overlap(options: argparse.Namespace) -> None:
    from sparsetrain.pruning.circuit import load_circuit, of_one_model, overlaps

    circuits = {folder: load_circuit(folder) for folder in options.circuits}
    for (a, b), (nodes, edges) in overlaps(circuits).items():
        print(f"nodes {nodes:.3f}  edges {edges:.3f}  {a}  {b}")
    if not of_one_model(circuits.values()):
        print(
            "These circuits are not known to be of the same weights. Between models that were trained apart, with\n"
            "other seeds say, nodes of one name have nothing to do with each other: take what is above for chance\n"
            "and compare sizes and measures instead. Between checkpoints of one run names mean the same."
        )


def _locality(options: argparse.Namespace) -> None:
    if options.export:
        from sparsetrain.locality.run import export_run

        print(f"run directory: {export_run(options.run, options.export)}")
        print("the same function; its channels have other numbers, so circuits were left behind: prune it to have them")
        return
    from sparsetrain.analysis.locality_report import run_circuits, write_report
    from sparsetrain.analysis.locality_text import report_text

    circuits = run_circuits(options.run, options.task, options.circuit)
    print(report_text(write_report(options.run, circuits, named=options.circuit is not None)))
    print(f"page: {Path(options.run) / 'locality' / 'sheet.html'}")


def _device(options: argparse.Namespace):
    from sparsetrain.threads import use_faster_count
    from sparsetrain.train import pick_device

    use_faster_count()
    return pick_device(options.device)


def _transfer(options: argparse.Namespace) -> None:
    from sparsetrain.analysis.circuit_page import write_page
    from sparsetrain.bridging.transfer import transfer
    from sparsetrain.bridging.transfer_measures import describe
    from sparsetrain.pruning.circuit import circuit_folder

    file = transfer(options.run, options.task, options.circuit, options.bridge, _device(options))
    print(describe(json.loads(file.read_text())))
    print(f"saved in {file}")
    print(f"page: {write_page(options.run, circuit_folder(options.run, options.task, options.circuit))}")


def _page(options: argparse.Namespace) -> None:
    from sparsetrain.analysis.circuit_page import write_page
    from sparsetrain.pruning.circuit import circuit_folder

    print(write_page(options.run, circuit_folder(options.run, options.task, options.circuit)))


if __name__ == "__main__":
    sys.exit(main())
