"""What `sparsetrain locality` finds out about a run: measures of its layout and of its circuits, beside their nulls."""

import json
import logging
import statistics
import time
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsetrain.analysis.sheet_page import write_sheet
from sparsetrain.checkpoint import save_sparse, whole_folder
from sparsetrain.files import write_json
from sparsetrain.locality.circuit_measures import nodes_by_class, overlap_measures, spread_measures, wiring_measures
from sparsetrain.locality.measures import block_fill, clusterability, length_measures, mean_count_length, mean_length
from sparsetrain.locality.modularity import modularity_measures
from sparsetrain.locality.positions import Layout, LocalityError, identity
from sparsetrain.locality.run import LaidOutRun, open_run
from sparsetrain.pruning.circuit import Circuit, CircuitError, load_circuit

log = logging.getLogger(__name__)

N_SHUFFLES = 3  # of the null of lengths; modularity has its own
N_CLUSTERS = 8
BLOCK, FULLEST = 16, 0.25  # side of a tile, and which share of all tiles is taken
N_OVERLAP_DRAWS = 50
N_PASSES = 20  # that latency is the median of
# The measures of Nainani 2024 (BIMT for circuit discovery), and where each comes from.
SOURCES = {
    "training_seconds": "summary.json, seconds",
    "training_peak_bytes": "summary.json, peak_bytes: of the process that finished the run",
    "inference_milliseconds": "measured now: one sequence of n_ctx tokens on this CPU, dense products",
    "logit_difference_gap": "circuit.json, full_model_logit_difference - logit_difference",
    "discovery_seconds": "circuit.json, settings.cost.seconds",
    "discovery_peak_bytes": "circuit.json, settings.cost.peak_bytes: of the process",
    "share_of_edges": "computed here: the circuit's edges over the nonzeros of all blocks",
}


def write_report(run: str | Path, circuits: dict[str, Circuit], named: bool) -> dict[str, Any]:
    """Measure a run and its circuits; write `locality/{measures.json, sheet.html}` into the run, whole or not at all.

    A layout that had to be found afterwards is written beside them, as `layout.safetensors`.

    Args:
        run: a run directory.
        circuits: of this run, by the names they shall have.
        named: whether the user asked for these: a circuit that cannot be measured is then an error, else left out.

    Returns:
        What measures.json holds, see `measure`.

    Raises:
        CheckpointError: the run cannot be read, or the files cannot be written.
        LocalityError: the layout does not fit, or a named circuit is of the component graph or of another model.
    """
    laid = open_run(run)
    found, shown = measure(laid, circuits, named)
    with whole_folder(Path(run) / "locality") as folder:
        write_json(folder / "measures.json", found)
        if laid.kept is None:
            save_sparse(folder / "layout.safetensors", laid.afterwards.tensors())
        write_sheet(folder / "sheet.html", laid, found, shown)
    return found


def run_circuits(run: str | Path, task: str | None = None, names: list[str] | None = None) -> dict[str, Circuit]:
    """The circuits of a run by `task/name`: all, or those of a task, or those with these names.

    Of a search that missed its target, an earlier circuit of the same name is not taken.

    Raises:
        CircuitError: one that was named is not there, or cannot be read.
    """
    folder = Path(run) / "circuits"
    found = (file.parent for file in sorted(folder.glob("[!.]*/[!.]*/circuit.json")))
    there = {f.relative_to(folder).as_posix(): f for f in found if not (f / "unreached.json").exists()}
    chosen = [name for name in there if _is_chosen(name, task, names)]
    missing = [n for n in names or [] if not any(name.endswith(f"/{n}") for name in chosen)]
    if missing or (task and not chosen):
        raise CircuitError(
            f"circuits must be among those of {folder}, which are {', '.join(there) or 'none'}, got "
            + (f"--circuit {' '.join(missing)}" if missing else "")
            + (f"{' of ' if missing else ''}--task {task}" if task else "")
        )
    return {name: load_circuit(there[name]) for name in chosen}


def _is_chosen(name: str, task: str | None, names: list[str] | None) -> bool:
    of_task, _, folder = name.partition("/")
    return task in (None, of_task) and (names is None or folder in names)


def measure(laid: LaidOutRun, circuits: dict[str, Circuit], named: bool) -> tuple[dict[str, Any], dict[str, Circuit]]:
    """All measures of a run as plain values, and the circuits that could be measured.

    Returns:
        `run`, `sheet`, `layout` (`kept` or `afterwards`), `n_edges`; `length`, see `length_measures`; `relayout`,
        of a layout found afterwards; `index_order`, of nodes in the order of their indices; `modularity`, see there;
        `clusterability` and `block_fill`, in index order and in the layout; `circuits` by name; `overlaps` of each two;
        `skipped`, circuits by name with the reason; `discovery`, the measures of Nainani 2024 with their sources.
    """
    edges, by_index = laid.edges, identity(laid.plan)
    n_edges = sum(map(len, edges))
    log.info("laying out %d edges", n_edges)
    layout = laid.layout
    measured, skipped = _circuits(laid, circuits, named)  # first: what was named may be an error
    shown = {name: circuits[name] for name in measured}
    log.info("laying out %d shuffles of them", N_SHUFFLES)
    length = length_measures(edges, layout, range(N_SHUFFLES))
    null = float(np.mean(length["null"]))
    log.info("communities, and those of shuffled edges")
    found = {
        "run": laid.folder.resolve().name,
        "sheet": laid.plan.sheet,
        "layout": "afterwards" if laid.kept is None else "kept",
        "n_edges": n_edges,
        "length": length,
        "relayout": _lengths(laid, laid.afterwards, null),
        "index_order": _lengths(laid, by_index, null),
        "modularity": modularity_measures(edges, layout),
        "clusterability": {
            "k": N_CLUSTERS, "random": 1 / N_CLUSTERS,
            **{name: clusterability(edges, x, N_CLUSTERS) for name, x in (("index", by_index), ("layout", layout))},
        },
        "block_fill": {
            "block": BLOCK, "share": FULLEST,
            **{name: block_fill(edges, x, BLOCK, FULLEST) for name, x in (("index", by_index), ("layout", layout))},
        },
    }  # fmt: skip
    found |= {"circuits": measured, "overlaps": _overlaps(laid, shown), "skipped": skipped}
    found["discovery"] = {"run": _run_costs(laid), "circuits": {n: _costs(c, measured[n]) for n, c in shown.items()},
                          "sources": SOURCES}  # fmt: skip
    return found, shown


def numbers(run: str | Path) -> dict[str, float | None]:
    """A run's locality in numbers, for the `measures` of a sweep; see `measure` for what they are.

    Returns:
        Of the model: `wire_length` in its layout, `wire_length_afterwards` in one found afterwards, `wire_length_null`
        of its degrees (mean over shuffles), `modularity` and `modularity_null`, `clusterability`, `block_fill`,
        `inference_ms`. Of its circuits, as means: `circuit_edge_share` and `circuit_wire_share` of the model's wiring,
        `circuit_distance` of a node from another over that of random nodes of the same degrees, `circuit_span` over
        theirs, and `logit_difference_gap`; None where there is no circuit of channels.

    Raises:
        CheckpointError: the run holds no readable model, or its layout is damaged.
        LocalityError: the layout does not fit.
    """
    found, _ = measure(open_run(run), run_circuits(run), False)
    circuits, costs = found["circuits"].values(), found["discovery"]["circuits"].values()
    spreads = [circuit["spread"] for circuit in circuits]
    return {
        "wire_length": found["length"]["length"],
        "wire_length_afterwards": found["relayout"]["length"],
        "wire_length_null": statistics.fmean(found["length"]["null"]),
        "modularity": found["modularity"]["q"],
        "modularity_null": statistics.fmean(found["modularity"]["null"]),
        "clusterability": found["clusterability"]["layout"],
        "block_fill": found["block_fill"]["layout"],
        "inference_ms": found["discovery"]["run"]["inference_milliseconds"],
        "circuit_edge_share": _mean(circuit["wiring"]["edge_share"] for circuit in circuits),
        "circuit_wire_share": _mean(circuit["wiring"]["wire_share"] for circuit in circuits),
        "circuit_distance": _mean(s["distance"] / s["random_distance"] for s in spreads if s["random_distance"]),
        "circuit_span": _mean(s["span"] / s["random_span"] for s in spreads if s["random_span"]),
        "logit_difference_gap": _mean(
            c["logit_difference_gap"] for c in costs if c["logit_difference_gap"] is not None
        ),
    }


def _mean(values: Iterable[float]) -> float | None:
    there = list(values)
    return statistics.fmean(there) if there else None


def _lengths(laid: LaidOutRun, layout: Layout, null: float) -> dict[str, float]:
    length = mean_length(laid.edges, layout)
    return {"length": length, "count_length": mean_count_length(laid.edges, layout), "ratio": length / null}


def _circuits(laid: LaidOutRun, circuits: dict[str, Circuit], named: bool) -> tuple[dict[str, Any], dict[str, str]]:
    measured, skipped = {}, {}
    for name, circuit in circuits.items():
        try:
            measured[name] = circuit_measures(laid, circuit)
        except LocalityError as error:
            if named:
                raise LocalityError(f"{name}: {error}") from None
            skipped[name] = str(error)
    return measured, skipped


def circuit_measures(laid: LaidOutRun, circuit: Circuit) -> dict[str, Any]:
    """Size and place of one circuit: `n_nodes`, `n_edges`, `task_loss`, `wiring` and `spread` (see those).

    Raises:
        LocalityError: it is of the component graph, of another model, or has no edges.
    """
    if circuit.graph != "channel":
        raise LocalityError(
            f"a circuit must be of the channel graph to have a place, got the {circuit.graph} graph, whose edges are "
            "no weights; prune with graph=channel"
        )
    ends = [(edge.source, edge.target) for edge in circuit.edges]
    return {
        "n_nodes": len(circuit.node_names()),
        "n_edges": len(circuit.edges),
        "task_loss": circuit.measures.get("task_loss"),
        "wiring": wiring_measures(ends, laid.edges, laid.layout),
        "spread": spread_measures(nodes_by_class(circuit.nodes, laid.layout), laid.edges, laid.layout, 0),
    }


def _overlaps(laid: LaidOutRun, circuits: dict[str, Circuit]) -> list[dict[str, Any]]:
    nodes = {name: nodes_by_class(c.nodes, laid.layout) for name, c in circuits.items()}
    return [
        {"a": a, "b": b, **overlap_measures(nodes[a], nodes[b], laid.edges, laid.layout, 0, N_OVERLAP_DRAWS)}
        for a, b in combinations(nodes, 2)
    ]


def _run_costs(laid: LaidOutRun) -> dict[str, float | None]:
    file = laid.folder / "summary.json"
    summary = json.loads(file.read_text()) if file.exists() else {}
    return {
        "training_seconds": summary.get("seconds"),
        "training_peak_bytes": summary.get("peak_bytes"),
        "inference_milliseconds": _latency(laid),
    }


def _costs(circuit: Circuit, measured: dict[str, Any]) -> dict[str, float | None]:
    m, cost = circuit.measures, circuit.settings.get("cost", {})
    full, ours = m.get("full_model_logit_difference"), m.get("logit_difference")
    return {
        "logit_difference_gap": None if full is None or ours is None else full - ours,
        "discovery_seconds": cost.get("seconds"),
        "discovery_peak_bytes": cost.get("peak_bytes"),
        "share_of_edges": measured["wiring"]["edge_share"],
    }


@torch.no_grad()
def _latency(laid: LaidOutRun) -> float:
    """Median milliseconds of a forward pass of one sequence."""
    tokens = torch.zeros(1, laid.config.model.n_ctx, dtype=torch.int64)
    seconds = []
    for _ in range(N_PASSES + 2):
        began = time.perf_counter()
        laid.model(tokens)
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds[2:])
