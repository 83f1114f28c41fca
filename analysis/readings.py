"""A circuit's measures in plain words: each number beside its control, and how far it can be trusted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Measures = Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """One row of the table of measures."""

    label: str
    value: str
    control: str
    meaning: str


def readings(measures: Measures) -> list[Reading]:
    """The table of measures; rows whose numbers are not there are left out."""
    rows = [_size, _loss, _accuracy, _agreement, _kl, _completeness, _random_circuits, _nonsense, _curve,
            _alternatives]  # fmt: skip
    found = []
    for row in rows:
        try:
            found.append(row(measures))
        except KeyError:
            continue
    return found


def cautions(measures: Measures) -> list[str]:
    """What a reader of these measures should not be misled by; empty where nothing stands out."""
    found = []
    for caution in (
        _model_at_chance, _missed_target, _better_than_model, _rests_on_calibration, _not_needed, _other_predictions,
        _nonsense_as_easy, _dangles,
    ):  # fmt: skip
        try:
            text = caution(measures)
        except KeyError:
            continue
        if text:
            found.append(text)
    return found


def _size(m: Measures) -> Reading:
    nonsense = m.get("nonsense")
    control = f"nonsense control {nonsense['n_nodes']:,} / {nonsense['n_edges']:,}" if nonsense else ""
    counted = {
        "channel": "Channels that are kept, and nonzero weights between them; embedding and unembedding not counted.",
        "component": "Heads, MLPs and the two ends of the model that are kept, and what each reads of another.",
    }
    meaning = counted[m.get("graph", "channel")]
    return Reading("Nodes / edges", f"{m['n_nodes']:,} / {m['n_edges']:,}", control, meaning)


def _loss(m: Measures) -> Reading:
    return Reading(
        "Task loss", _shown(m["task_loss"]),
        f"target {m['target_loss']:g}; full model, calibrated alike, {_shown(m['full_model_loss_calibrated'])}; "
        f"chance {_shown(m['chance_loss'])}",
        "How badly the circuit alone chooses between right and wrong answer on held-out prompts, with everything "
        "else ablated, after fitting one scale and one shift.",
    )  # fmt: skip


def _accuracy(m: Measures) -> Reading:
    return Reading(
        "Accuracy", f"{m['task_accuracy']:.1%}", f"full model {m['full_model_accuracy']:.1%}; chance 50%",
        "Share of held-out prompts on which the circuit alone prefers the right answer.",
    )  # fmt: skip


def _agreement(m: Measures) -> Reading:
    return Reading(
        "Agreement", f"{m['agreement']:.1%}", "100% would be the same choices",
        "Share of prompts on which circuit and full model prefer the same answer, right or wrong.",
    )  # fmt: skip


def _kl(m: Measures) -> Reading:
    return Reading(
        "KL to the model", f"{m['kl']:.3f} nats", "0 would be the same predictions",
        "How far the circuit's prediction over the whole vocabulary is from the full model's, without calibration.",
    )  # fmt: skip


def _completeness(m: Measures) -> Reading:
    spread = f"{m['random_ablation_loss']:.3f} ± {m['random_ablation_loss_std']:.3f}"
    return Reading(
        "Loss without it", _shown(m["completeness_loss"]),
        f"random sets ablated {spread}; full model {_shown(m['full_model_loss'])}",
        "Task loss of the full model when the circuit alone is ablated; if the circuit is all that does the task, "
        "this is at chance or above, and far above random sets of its size and places.",
    )  # fmt: skip


def _random_circuits(m: Measures) -> Reading:
    return Reading(
        "Random circuits alone", _shown(m["random_circuit_loss"]),
        f"this circuit {_shown(m['task_loss'])}; chance {_shown(m['chance_loss'])}",
        "Mean task loss of random sets of the same size kept alone, each with its own calibration.",
    )  # fmt: skip


def _nonsense(m: Measures) -> Reading:
    control = m["nonsense"]
    first, second = control["answers"]
    reached = "target reached" if control["reached"] else "target not reached"
    return Reading(
        "Nonsense control", f"{control['n_nodes']:,} / {control['n_edges']:,}",
        f"{reached}; loss {_shown(control['task_loss'])}, this circuit {_shown(m['task_loss'])}",
        f"What the same search finds when the same prompts ask for {first!r} and {second!r}, which mean nothing; "
        "a circuit as small as that is no evidence of an algorithm.",
    )  # fmt: skip


def _curve(m: Measures) -> Reading:
    curve = m["curve"]
    return Reading(
        "Its ranking", f"CMD {curve['cmd']:.3f}", f"CPR {curve['cpr']:.3f}; 0 and 1 would be the model at every size",
        "Faithfulness of circuits of many sizes cut from the ranking, by the logit difference: the distance from the "
        "full model (CMD, edges by magnitude) and the area under the curve (CPR, by signed score).",
    )  # fmt: skip


def _alternatives(m: Measures) -> Reading:
    found = m["alternatives"]
    if not found["n"]:
        return Reading("Minimal circuits near it", "not known", "the search stopped before the first",
                       "Raise alternative_runs to find them.")  # fmt: skip
    return Reading(
        "Minimal circuits near it", f"{found['n']}{'' if found['complete'] else ' or more'}",
        f"{found['n_needed']:,} edges in all of them",
        "Circuits that each do as well and of which no edge can go, among the edges of this one and as many of the "
        "next best. More than one means that the model does the task in more than one way: see alternatives.json.",
    )  # fmt: skip


def _shown(loss: float) -> str:
    return f"{loss:.3f}" if loss >= 0.0005 else "< 0.001"


def _model_at_chance(m: Measures) -> str | None:
    if m["full_model_loss_calibrated"] <= 0.95 * m["chance_loss"]:
        return None
    return (
        f"The full model itself is near chance ({_shown(m['full_model_loss_calibrated'])}, calibrated alike): there is "
        "hardly anything that a circuit could be faithful to, and faithfulness, CPR and CMD say nothing."
    )


def _missed_target(m: Measures) -> str | None:
    if m["task_loss"] <= m["target_loss"]:
        return None
    if m.get("size") is not None and m["train_loss"] > m["target_loss"]:
        return (
            f"A circuit of {m['size']} {m['units']}, as it was asked for, misses the target of {m['target_loss']:g}: "
            f"{_shown(m['train_loss'])} on the prompts it was found on, {_shown(m['task_loss'])} on held-out ones "
            f"(chance {_shown(m['chance_loss'])})."
        )
    return (
        f"The target of {m['target_loss']:g} was reached on the prompts the circuit was found on "
        f"({_shown(m['train_loss'])}), not on held-out ones ({_shown(m['task_loss'])})."
    )


def _better_than_model(m: Measures) -> str | None:
    circuit, model = m["task_loss"], m["full_model_loss_calibrated"]
    if circuit >= model or _shown(circuit) == _shown(model):
        return None
    return (
        f"The circuit's loss ({_shown(circuit)}) is below the full model's, calibrated alike ({_shown(model)}): some "
        "of the task was learnt by choosing what is kept. Do not read the difference as the model's own ability."
    )


def _dangles(m: Measures) -> str | None:
    if not m["n_dangling"]:
        return None
    lie = "lies" if m["n_dangling"] == 1 else "lie"
    said = f"{m['n_dangling']} of the {m.get('units', 'nodes')} {lie} on no path from the tokens to the logits"
    if m.get("size") is not None:
        return f"{said}: a circuit of a given size is not cleaned, and keeps what its ranking puts first."
    return f"{said}, yet the target is missed without: an effect through the scale of a norm, or of a constant."


def _rests_on_calibration(m: Measures) -> str | None:
    if m["task_loss_uncalibrated"] <= m["chance_loss"] or m["task_loss"] > 0.95 * m["chance_loss"]:
        return None  # calibrated it is no better than chance either: nothing moves apart
    return (
        f"Without calibration the circuit's loss is {_shown(m['task_loss_uncalibrated'])}, no better than chance: "
        "it moves the answers apart, but where the line between them lies was fitted."
    )


def _not_needed(m: Measures) -> str | None:
    if m["completeness_loss"] > m["random_ablation_loss"] + 2 * m["random_ablation_loss_std"]:
        return None
    return (
        "Ablating the circuit hurts the model no more than ablating random parts: "
        + ("it can do the task, but the model does not need it, and other parts do the task too."
           if m["task_loss"] <= m["target_loss"] else "the model does not need it for the task.")
    )  # fmt: skip


def _other_predictions(m: Measures) -> str | None:
    if m["kl"] <= 1:
        return None
    return (
        f"A KL of {m['kl']:.2f} nats is large: the circuit reproduces the choice between the two answers, not the "
        "model's prediction."
    )


def _nonsense_as_easy(m: Measures) -> str | None:
    control = m["nonsense"]
    counted = "n_edges" if m.get("units") == "edges" else "n_nodes"
    if not control["reached"] or control[counted] > m[counted]:
        return None
    return (
        "The same search finds a circuit at most as large for nonsense answers: its small size says nothing about "
        "how the model does the task."
    )
