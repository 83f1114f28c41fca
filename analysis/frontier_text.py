"""A frontier in words: its tables, and what must be said beside them."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from sparsetrain.analysis.frontier_data import Row, Setting, Study
from sparsetrain.analysis.frontier_means import MEANS, Floor, Value, default_mean
from sparsetrain.sweeping.rows import WINDOWS

Table = tuple[Sequence[str], list[list[str]]]
MEANINGS = {
    "common": "The same tasks for every model, so none gains by failing at a hard one: those by which most circuits "
              "are compared. Models that miss one, or are not finished, have no such mean; they stand at the picture's "
              "upper edge.",
    "own": "Each model's own tasks, so a model that reaches easy tasks alone looks better than it is: compare points "
           "only where their tasks are as many.",
    "bound": "A task that is not reached counts as all nonzero weights of the model, which is the least that can be "
             "said of it: the truth is not known, and an arrow says so. Small models gain by it.",
}  # fmt: skip


def target(study: Study) -> str:
    """What circuits were cut at."""
    loss = "the target task loss" if study.target_loss is None else f"a task loss of {study.target_loss:g}"
    return f"{loss} on training prompts"


def title(setting: Setting, study: Study) -> str:
    """A setting's name, with its sweep where there are several."""
    return f"{setting.name} ({setting.row['sweep']})" if study.has_several_sweeps else setting.name


def cautions(study: Study, found: Sequence[Mapping[str, Any]], factors: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know before taking the picture for an answer."""
    seeds = [len(setting.models) for setting in study.settings]
    told = []
    n_reached = len({task for model in study.models for task in model.reached})
    without = [f["missed"] for f in found if f["means"]["common"].mean is None]
    if not study.common:
        told.append("No task is reached by more than half of the settings, so there is no mean over the same tasks.")
    elif without or len(study.common) < n_reached:
        at_edge = {"miss one": sum(without), "are not finished": len(without) - sum(without)}
        words = [f"{n} of {len(found)} settings {what}" for what, n in at_edge.items() if n]
        edge = "; " + " and ".join([*words, "stand at the upper edge"]) if without else ""
        told.append(
            f"The same tasks for all are {len(study.common)} of the {n_reached} that some model reaches, by which most "
            f"circuits are compared{edge}."
        )
    if study.trivial:
        told.append(
            f"No model needs an edge for {', '.join(study.trivial)}, or none does to give nonsense answers to the same "
            "prompts: their sizes say nothing, and they are in no comparison."
        )
    if max(seeds) == 1:
        told.append("One seed of each setting: intervals are over tasks alone, and seeds may differ by more.")
    elif max(seeds) < 5:
        told.append(
            f"Intervals resample {max(seeds)} seeds of a setting at most, which is few: with two seeds and four "
            "tasks they hold the truth in some 89 % of simulated cases, not in 95 %."
        )
    if varied := _varied_windows(study):
        told.append(
            f"The models differ in {', '.join(varied)}, which held-out losses depend on too: other windows of "
            "the corpus, or longer ones."
        )
    told += _of_circuits(study)
    told.append(
        "Points share their tasks, so the intervals of two points may overlap although one is surely lower. What is "
        "below compares them task by task."
    )
    if not any(setting.dense for setting in study.settings):
        told.append(
            "There is no dense baseline that is trained, so nothing is said about how much circuits shrink; see "
            "`dense` in `sparsetrain sweep --help`."
        )
    elif all("nearest" in row for row in factors):
        told.append(
            "No line of sparse models overlaps in loss with a dense one; the baselines may have widths of their own, "
            "see `dense` in `sparsetrain sweep --help`."
        )
    if study.missing:
        told.append(f"Not finished: what is missing or failed is listed below ({len(study.missing)}).")
    return told


def _varied_windows(study: Study) -> list[str]:
    """The keys of windows that differ; earlier rows hold those alone that a grid varied."""
    windows = [model.row.get("windows") or model.row["values"] for model in study.models]
    return [key for key in WINDOWS if len({of[key] for of in windows if key in of}) > 1]


def _of_circuits(study: Study) -> list[str]:
    """Circuits whose size says less than it seems to, of tasks that are not trivial."""
    telling = [task for task in study.tasks if task not in study.trivial]
    circuits = [m.outcomes[task] for m in study.models for task in telling if task in m.reached]
    none = sum(not row["n_edges"] for row in circuits)
    controls = [(row["n_edges"], row["nonsense"]) for row in circuits if row.get("nonsense")]
    found = [(n, control["n_edges"]) for n, control in controls if control["reached"]]
    no_smaller = sum(nonsense <= n for n, nonsense in found)
    heldout = [row["task_loss"] for row in circuits]
    told = []
    if study.target_loss is not None and heldout and median(heldout) > study.target_loss:
        above = sum(loss > study.target_loss for loss in heldout)
        told.append(
            f"Circuits were cut to {target(study)}, and fit these better than others: on held-out prompts {above} of "
            f"{len(heldout)} are above it, with a median of {median(heldout):.2g} and at most {max(heldout):.2g} (by "
            "task below). More prune.train_pairs bring them nearer."
        )
    if none:
        told.append(
            f"{none} of {len(circuits)} circuits have no edge, and are counted as one: what needs none, a bigram table "
            "or one channel from embedding to logits, does these tasks, so their size says nothing about the models."
        )
    if no_smaller:
        told.append(
            f"{no_smaller} of {len(controls)} circuits are no smaller than what the same search finds for nonsense "
            f"answers to the same prompts ({len(found)} times it finds one), so their size says little about the task."
        )
    return told


def setting_table(study: Study, found: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each setting."""
    head = ["setting", "seeds", "weights", "nonzero", "held-out loss", "reached", *(f"edges: {m}" for m in MEANS),
            "nonsense circuits", "training, s", "a search, s", "on the front"]  # fmt: skip
    first = default_mean(study)
    rows = []
    for setting, f in zip(study.settings, found, strict=True):
        values: Mapping[str, Value] = f["means"]
        rows.append([
            title(setting, study), str(len(setting.models)), f"{setting.n_params:,.0f}", f"{setting.n_nonzero:,.0f}",
            _with_interval(f["val_loss"], f["loss_interval"], ".3f"),
            f"{f['n_reached']} of {f['n_asked']}" + (f", {f['n_open']} open" if f["n_open"] else ""),
            *("at least " * v.at_least + _with_interval(v.mean, v.interval, ",.0f") for v in values.values()),
            _nonsense(f["floors"]["own"]),
            _mean_seconds(model.row["train_seconds"] for model in setting.models),
            _mean_seconds(r.get("discovery_seconds") for model in setting.models for r in model.outcomes.values()),
            "yes" if values[first].pareto else "",
        ])  # fmt: skip
    return head, rows


def _mean_seconds(values: Iterable[float | None]) -> str:
    """Of those that are known."""
    there = [value for value in values if value is not None]
    return f"{fmean(there):,.0f}" if there else ""


def _nonsense(floor: Floor) -> str:
    reached = f"{floor.n_reached} of {floor.n_asked} found"
    return reached if floor.times is None else f"{floor.times:.2g} times as large, {reached}"


def task_table(study: Study) -> Table:
    """How many models reach each task, on training prompts, and what its circuits and their controls come to."""
    head = ["task", "models that reach it", "the same for all", "held-out loss, median", "above the target",
            "without an edge", "nonsense circuits found", "of these no larger"]  # fmt: skip
    rows = []
    for task in study.tasks:
        circuits = [m.outcomes[task] for m in study.models if task in m.reached]
        same = "yes" if task in study.common else "trivial" if task in study.trivial else ""
        n_asked = sum(task in m.outcomes for m in study.models)
        more = _of_task(circuits, study) if circuits else [""] * 5
        rows.append([task, f"{len(circuits)} of {n_asked}", same, *more])
    return head, rows


def _of_task(circuits: list[Row], study: Study) -> list[str]:
    losses = [row["task_loss"] for row in circuits]
    above = "" if study.target_loss is None else str(sum(loss > study.target_loss for loss in losses))
    found = [row for row in circuits if row.get("nonsense") and row["nonsense"]["reached"]]
    no_larger = sum(row["nonsense"]["n_edges"] <= row["n_edges"] for row in found)
    without = sum(not row["n_edges"] for row in circuits)
    return [f"{median(losses):.2f}", above, str(without), str(len(found)), str(no_larger) if found else ""]


def factor_table(factors: Sequence[Mapping[str, Any]]) -> Table:
    """Interpretability at equal capability."""
    head = ["line", "against", "held-out loss", "edges", "dense edges", "circuits shrink by", "tasks compared",
            "nonsense circuits shrink by"]  # fmt: skip
    return head, [[row["line"], row["dense"], *_factor(row)] for row in factors]


def _factor(row: Mapping[str, Any]) -> list[str]:
    if "nearest" in row:
        if row["nearest"] is None:
            return ["", "", "", "no circuit on one side", "", ""]
        (a, loss), (b, other) = row["nearest"]
        return ["", "", "", f"no overlap; nearest: {a} at {loss:.3f}, {b} at {other:.3f}", "", ""]
    tasks = f"{row['n_tasks']} of {row['n_asked']}"
    loss = f"{row['loss']:.3f} of {row['at']}"
    if row["factor"] is None:
        return [loss, "", "", "no task that both reach, and that needs an edge", tasks, ""]
    numbers = [loss, f"{row['edges']:,.0f}", f"{row['dense_edges']:,.0f}"]
    if row["n_without_edges"]:  # counted as one edge, so that the factor may be any
        tasks += f"; {row['n_without_edges']} of {row['n_circuits']} circuits have no edge"
    return [*numbers, f"{_with_interval(row['factor'], row['interval'], '.3g')}", tasks, _of_nonsense(row["nonsense"])]


def _of_nonsense(found: Mapping[str, Any] | None) -> str:
    """The control of a factor: what shrinks alike for nonsense is not of the task."""
    if found is None:
        return "none found on both sides"
    n = found["n_tasks"]
    return f"{found['factor']:.3g}, where the real ones shrink by {found['real']:.3g} ({n} task{'s' * (n > 1)})"


def _with_interval(mean: float | None, interval: tuple[float, float] | None, form: str) -> str:
    if mean is None:
        return ""
    return f"{mean:{form}}" + (f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else "")


def markdown(study: Study, found: Sequence[Mapping[str, Any]], factors: Sequence[Mapping[str, Any]]) -> str:
    """The tables as a document."""
    parts = ["# Capability against interpretability", introduction(study), _listed(cautions(study, found, factors))]
    parts += ["## Settings", _table(*setting_table(study, found)), _listed(f"{m}: {MEANINGS[m]}" for m in MEANS)]
    if factors:
        parts += ["## Interpretability at equal capability", _table(*factor_table(factors))]
    parts += ["## Tasks", _table(*task_table(study))]
    if study.left_out:
        parts.append(f"Left out, since none of these models can be asked: {', '.join(study.left_out)}.")
    if study.missing:
        parts += ["## Missing", _listed(study.missing)]
    return "\n\n".join(parts) + "\n"


def introduction(study: Study) -> str:
    """What the picture shows."""
    unit = "edges" if study.graph == "channel" else "edges between heads and MLPs"
    n = len(study.models)
    same = f" ({len(study.common)} of them the same for all)" if len(study.common) < len(study.tasks) else ""
    return (
        f"Held-out loss against the geometric mean over tasks of the {unit} of circuits at {target(study)}: "
        f"{n} model{'s' * (n > 1)}, {len(study.settings)} settings, {len(study.tasks)} tasks{same}. Brackets of "
        "edges are 95 % bootstrap intervals over tasks and seeds, those of losses one standard error over seeds."
    )


def _listed(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
