"""Holds the methods that rank edges to circuits that are known: how often each finds them, and how long it takes."""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsetrain.bench.kernels import BenchError
from sparsetrain.bench.known_circuits import PROGRAMS, TOLERANCE, KnownCircuit, change, known_circuits
from sparsetrain.machine import describe
from sparsetrain.prune_config import AcdcOptions, AttributionOptions, EdgeMaskOptions, TopkMaskOptions
from sparsetrain.pruning import acdc, attribution, edge_masks, topk_masks
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.curves import auroc
from sparsetrain.pruning.cut import smallest
from sparsetrain.pruning.edges import Batch, EdgeGraph, EdgeSet, batches, flat, n_edges, top_edges, unflat
from sparsetrain.pruning.objective import METRICS, Metric
from sparsetrain.pruning.space import EdgeSpace
from sparsetrain.tasks import TaskData

KEY = ("program", "ablation", "graph", "method", "seed")  # tells rows apart
QUICK = ("hist", "xproportion")
BY_GRADIENT = ("eap", "eap_ig_inputs", "eap_ig_activations", "gates")
BY_PATCHING = ("gates_checked", "exact")
DRAWS_NOTHING = (*BY_GRADIENT, "exact", "acdc")  # so one seed is enough

# A method as it is asked here: (graph, data, ablation, seed) -> scores, the greater the more an edge matters.
Ranker = Callable[[EdgeGraph, TaskData, Ablation, int], EdgeSet]


def rankers() -> dict[str, Ranker]:
    """The methods with their defaults, and a random ranking.

    A gradient is taken of what is linear in the outputs, since the distance from the full model's is flat there; the
    others are to keep that distance small.
    """
    linear, distance = METRICS["projection"], METRICS["squared_error"]
    return {
        "random": random_scores,
        **{name: _ranker(attribution.rank, linear, AttributionOptions(estimator=name)) for name in BY_GRADIENT},
        **{name: _ranker(attribution.rank, distance, AttributionOptions(estimator=name)) for name in BY_PATCHING},
        "acdc": _ranker(acdc.rank, distance, AcdcOptions()),
        "topk_masks": _ranker(topk_masks.rank, distance, TopkMaskOptions()),
        "edge_masks": _ranker(edge_masks.rank, distance, EdgeMaskOptions()),
    }


def random_scores(graph: EdgeGraph, data: TaskData, ablation: Ablation, seed: int) -> EdgeSet:
    """What a ranking is worth that knows nothing."""
    drawn = torch.rand(n_edges(graph.edges), generator=torch.Generator().manual_seed(seed))
    return unflat(graph, drawn.to(graph.model.unembed.weight.device))


def _ranker(rank: Callable[..., EdgeSet], metric: Metric, options: Any) -> Ranker:
    """A method with a metric and options; of attributions the size counts, as it does in the publications."""

    def ranked(graph: EdgeGraph, data: TaskData, ablation: Ablation, seed: int) -> EdgeSet:
        scores = rank(graph, data, ablation, metric, options, seed)
        return {group: x.abs() if rank is attribution.rank else x for group, x in scores.items()}

    return ranked


def program_files(place: Path | None) -> list[Path]:
    """The files of the programs to be run.

    Args:
        place: None for those of the benchmark; else a program's file, a folder of such, or a Python file of programs in
            RASP, which are compiled beside it.

    Raises:
        BenchError: there is no program.
    """
    if place is not None and place.suffix == ".py":
        from sparsetrain.bench.compile_programs import compile_file

        return compile_file(place, place.parent)
    place = place or PROGRAMS
    found = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if not found:
        raise BenchError(f"--programs must be a .py file of programs, a compiled one, or a folder of such, got {place}")
    return found


def measure(
    device: torch.device, quick: bool, say: Callable[[str], None], programs: Path | None, n_seeds: int, done: Path
) -> list[dict]:
    """Run every method on every circuit with every seed.

    Args:
        device: where the methods run.
        quick: two programs and one seed, for a look.
        say: told what is done.
        programs: see `program_files`; None also takes the circuits made by hand.
        n_seeds: of the methods that draw.
        done: a file of rows, one a line, that is added to; those of the same commit are not measured again.

    Returns:
        Rows as `judge` gives them.
    """
    files = program_files(programs)
    if quick and programs is None:
        files = [path for path in files if path.stem in QUICK]
    circuits = known_circuits(files, made=programs is None, device=device)
    return compare(rankers(), list(circuits), range(1 if quick else n_seeds), say, done)


def compare(
    methods: Mapping[str, Ranker], circuits: Sequence[KnownCircuit], seeds: Iterable[int], say: Callable[[str], None],
    done: Path,
) -> list[dict]:  # fmt: skip
    """A row for each method, circuit and seed, one seed after the other; rows in `done` are taken from there.

    There is none where no edge is to be found or the graph is not for the method; what draws nothing has one seed.
    """
    commit = describe(torch.device("cpu"))["commit"]
    read = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    rows = {tuple(row[key] for key in KEY): row for row in read if row["commit"] == commit}
    asked = []
    for seed, circuit, (name, method) in itertools.product(seeds, circuits, methods.items()):
        other_graph = name == "eap_ig_activations" and circuit.graph.kind == "channel"
        if not n_edges(circuit.edges) or other_graph or (seed and name in DRAWS_NOTHING):
            continue
        key = (circuit.name, circuit.ablation.kind, circuit.graph.kind, name, seed)
        asked.append(key)
        if key in rows:
            continue
        say(f"{circuit.name}, {circuit.ablation.kind}: {name}, seed {seed}")
        prompts = list(batches(circuit.graph, circuit.data, circuit.ablation, len(circuit.data)))
        start = time.perf_counter()
        scores = method(circuit.graph, circuit.data, circuit.ablation, seed)
        cost = {"seconds": time.perf_counter() - start, "commit": commit}
        rows[key] = {"method": name, "seed": seed, **cost, **judge(circuit, prompts, scores)}
        with done.open("a") as file:
            file.write(json.dumps(rows[key]) + "\n")
    return [rows[key] for key in asked]


def judge(circuit: KnownCircuit, prompts: list[Batch], scores: EdgeSet) -> dict:
    """How near a ranking comes to the circuit.

    Args:
        circuit: the one that was to be found.
        prompts: its data, laid out.
        scores: the ranking, greater first.

    Returns:
        program, ablation, graph, n_edges, n_circuit; auroc; top: whether the circuit's edges score above all others,
        strictly; n_cut and n_hit: how many edges the shortest beginning of the ranking has that gives the model's
        outputs, and how many of them are the circuit's; exact: whether it is the circuit or one of its alternatives,
        None where the edges that are needed are not enough, so that there is no one circuit; n_cleaned and cleaned: the
        same of the cut that `sparsetrain prune` makes, which also tries to drop each edge.
    """
    graph, truth = circuit.graph, flat(circuit.graph, circuit.edges)
    values = flat(graph, scores)
    kept = flat(graph, shortest(graph, prompts, scores))
    cut = smallest(EdgeSpace(graph), scores, lambda edges: change(graph, prompts, edges), TOLERANCE)
    cleaned = flat(graph, cut.kept)
    right = [flat(graph, edges) for edges in (circuit.edges, *circuit.alternatives)]
    unique = circuit.error <= TOLERANCE
    return {
        "program": circuit.name, "ablation": circuit.ablation.kind, "graph": graph.kind, "n_edges": len(truth),
        "n_circuit": int(truth.sum()), "auroc": auroc(graph, scores, circuit.edges),
        "top": bool(values[truth].min() > values[~truth].max()),
        "n_cut": int(kept.sum()), "n_hit": int((kept & truth).sum()),
        "exact": any(torch.equal(kept, edges) for edges in right) if unique else None,
        "n_cleaned": int(cleaned.sum()),
        "cleaned": any(torch.equal(cleaned, edges) for edges in right) if unique else None,
    }  # fmt: skip


def shortest(graph: EdgeGraph, prompts: list[Batch], scores: EdgeSet) -> EdgeSet:
    """The shortest beginning of a ranking that gives the model's outputs, without dangling edges where it can do so."""
    kept = graph.edges
    for n in range(n_edges(graph.edges)):
        kept = top_edges(graph, scores, n)
        if change(graph, prompts, kept) <= TOLERANCE:
            break
    else:
        kept = graph.edges
    tidy = graph.connected(kept)
    return tidy if change(graph, prompts, tidy) <= TOLERANCE else kept
