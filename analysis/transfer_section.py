"""The section of a circuit's page that shows what its directions do to a dense model: curves, controls, a table."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsetrain.analysis.line_chart import Line, chart
from sparsetrain.bridging.train import is_finished
from sparsetrain.bridging.transfer import FORMAT, made_of
from sparsetrain.pruning.circuit import Circuit

CHARTS = 24  # of single directions, those that do most
KINDS = {
    "circuit": ("the circuit's directions", "#2f6fb5"),
    "random": ("random directions, mean and range", "#7d838c"),
    "probe": ("probes of the dense model", "#d3801f"),
    "patch": ("its own reads of the counterfactual", "#3b8f4e"),
}
STALE = "STALE: {} changed since this was measured; run sparsetrain transfer again."
OTHER = "Measured by another version of sparsetrain ({}), so it is not shown; run sparsetrain transfer again."
NOT_DEFINED = "Not defined: the dense model does not do the task on its own."
READING = (
    "Strength 1 adds, at the reads of the dense model, the change that each node of the sparse model makes from a "
    "prompt to its counterfactual, times the node's direction in the dense model. Random directions have the same "
    "lengths and angles; a probe is the difference of the two sides' means in the dense model's own reads, as long at "
    "each token as the circuit's change there. The full patch is all that could be done at these reads; a probe knows "
    "the dense model but not the node, so that it may do less than the circuit or more. The one node was chosen on "
    "training prompts (the second, if there is one, among those that are not read by the last norm, where a direction "
    "acts on the logits directly); so was the one channel of the residual stream, steered at all reads, where the "
    "circuit has it or not. Their ratio is to the mean size of what random directions do. The steepest direction is, "
    "of those as long, the one that raises the other answer most to first order on training prompts: its rise is about "
    "the most that a node so active can do. Bands: one standard error over prompts, for random directions all draws."
)
TABLE_HEAD = (
    "node", "carried to", "variance explained there", "length", "greatest change of the node",
    "rise of P(other answer)", "by random directions", "by a probe", "share moved",
)  # fmt: skip


def transfer_sections(run: str | Path, circuit_folder: str | Path, circuit: Circuit) -> str:
    """HTML of what `sparsetrain transfer` found of a circuit, a section for each bridge of the run; or nothing."""
    sections = []
    for bridge in sorted(Path(run).glob("bridges/[!.]*")):
        file = bridge / "transfer" / circuit.task / Path(circuit_folder).name / "transfer.json"
        if file.exists():
            now = made_of(Path(circuit_folder), bridge) if is_finished(bridge) else {}
            sections.append(section(json.loads(file.read_text()), now))
    return "\n".join(sections)


def section(found: dict[str, Any], made_of_now: Mapping[str, str]) -> str:
    """One transfer.

    Args:
        found: what transfer.json holds.
        made_of_now: what tells the circuit and the bridge as they are now; see `transfer.made_of`.
    """
    if found["format"] != FORMAT:
        title = f"On a dense model, by the bridge <code>{html.escape(found['bridge'])}</code>"
        why = OTHER.format(html.escape(found["format"]))
        return f'<section class="transfer"><h2>{title}</h2><p class="cautions">{why}</p></section>'
    changed = [f"the {what}" for what, was in found["made_of"].items() if made_of_now.get(what) != was]
    stale = f'<p class="cautions">{STALE.format(" and ".join(changed))}</p>' if changed else ""
    n_carried = len(found["nodes"]) + len(found["not_transferable"])
    task = found["dense_model"]
    answers = " and ".join(f"<code>{html.escape(repr(a))}</code>" for a in found["answers"])
    return (
        f'<section class="transfer"><h2>On the dense model <code>{html.escape(_short(found["dense"]))}</code>, '
        f"by the bridge <code>{html.escape(found['bridge'])}</code></h2>{stale}"
        f'<p class="note">{len(found["nodes"])} of the {n_carried} nodes that read the residual stream are carried '
        f"across; {found['n_prompts']} held-out prompts, answers mostly {answers}, compared at {found['alignment']}; "
        f"the dense model's own logit difference is {task['logit_difference']:.2f} +- "
        f"{task['logit_difference_se']:.2f}, its accuracy {task['accuracy']:.0%}.</p>"
        f"{_tiles(found)}{_together(found)}{_alone(found)}{_table(found)}{_left(found)}"
        f'<details><summary>How this is to be read</summary><p class="note">{READING}</p></details></section>'
    )


def _tiles(found: dict[str, Any]) -> str:
    tiles = []
    for kind, (words, _) in KINDS.items():
        share, inside = (found[scope] and found[scope][kind] for scope in ("share", "share_inside"))
        value = f"{share['value']:.1%}" if share else "not defined"
        spread = f"{share['low']:.1%} to {share['high']:.1%} over pairs" if share else NOT_DEFINED
        before = f"; {inside['value']:.1%} before the last norm" if inside else ""
        tiles.append((f"Moved by {words.split(',')[0]}", value, spread + before))
    for what, alone in (("node", found["one_node"]), ("channel of the residual stream", found["one_channel"])):
        tiles += [(f"One {what}: {one['name']}, {len(one['nodes'])} reads", *_alone_told(one)) for one in alone]
    for key, words in (("logit_difference", "Logit difference without them"), ("text_loss", "Loss on other text")):
        a = found["ablation"][key]
        tiles.append((words, f"{a['after']:.3f}", f"before {a['before']:.3f}; random {a['random']['mean']:.3f}; "
                      f"probe {a['probe']:.3f}"))  # fmt: skip
    return '<div class="tiles">' + "".join(_tile(*tile) for tile in tiles) + "</div>"


def _alone_told(one: Mapping[str, Any]) -> tuple[str, str]:
    """Of some nodes alone their ratio to random directions, and what it is a ratio of."""
    ratio = "not defined" if one["ratio"] is None else f"{one['ratio']:.1f} x random"
    most = one["steepest_rise"]
    steepest = "" if most is None else f"; by the steepest direction of its length {most:+.4f}"
    interval = "" if one["ratio"] is None else f"{one['low']:.1f} to {one['high']:.1f} over pairs and draws; "
    return ratio, (
        f"{interval}P(other answer) {one['rise']:+.4f}; by random directions {one['random_rise']:+.4f} "
        f"({one['random_lowest']:+.4f} to {one['random_highest']:+.4f}){steepest}"
    )


def _tile(label: str, value: str, control: str) -> str:
    shown = (html.escape(text) for text in (label, value, control))
    return '<div class="tile"><b>{}</b><strong>{}</strong><small>{}</small></div>'.format(*shown)


def _together(found: dict[str, Any]) -> str:
    """Charts of all directions at once: the other answer both ways, the own one, and the logit difference."""
    panels = (
        ("to_negative", "other", "P(negative answer), positive prompts"),
        ("to_positive", "other", "P(positive answer), negative prompts"),
        ("both", "own", "P(own answer), all prompts"),
        ("both", "logit_difference", "logit of own - other answer, all prompts"),
    )
    charts = []
    for side, measure, title in panels:
        lines = [
            Line(words, colour, x, *_band(found["curves"][kind][side][measure]))
            for kind, (words, colour) in KINDS.items()
            for x in [found["random_strengths" if kind == "random" else "strengths"]]
        ]
        charts.append(chart(title, lines, 316, 220, "strength"))
    legend = "".join(
        f'<span class="key" style="border-color:{colour}"></span>{words} ' for words, colour in KINDS.values()
    )
    return (
        "<h3>All directions together</h3>"
        f'<p class="legend">{legend}</p><div class="charts">{"".join(charts)}</div>'
    )  # fmt: skip


def _band(curve: Mapping[str, Sequence[float]]) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
    if "se" not in curve:
        return curve["mean"], curve["lowest"], curve["highest"]
    both = list(zip(curve["mean"], curve["se"], strict=True))
    return curve["mean"], [m - se for m, se in both], [m + se for m, se in both]


def _alone(found: dict[str, Any]) -> str:
    """A small chart for each direction: the other answer's probability, both ways."""
    ordered = sorted(found["nodes"], key=lambda n: -n["rise"])[:CHARTS]
    top = max(max(max(n["curve"][side]["other"]["mean"]) for side in ("to_negative", "to_positive")) for n in ordered)
    charts = []
    for node in ordered:
        lines = [
            Line(words, colour, found["strengths"], *_band(node["curve"][side]["other"]))
            for side, words, colour in (
                ("to_negative", "positive prompts", "#2f6fb5"), ("to_positive", "negative prompts", "#c8472f"),
            )
        ]  # fmt: skip
        charts.append(chart(node["node"], lines, 210, 130, "", top))
    more = f" The {CHARTS} that do most of {len(found['nodes'])}." if len(found["nodes"]) > CHARTS else ""
    legend = '<span class="key positive"></span>positive prompts <span class="key negative"></span>negative prompts'
    return (
        f'<h3>Each direction alone: P(other answer) by strength</h3><p class="legend">{legend}.{more}</p>'
        f'<div class="charts">{"".join(charts)}</div>'
    )


def _table(found: dict[str, Any]) -> str:
    rows = []
    for node in sorted(found["nodes"], key=lambda n: -n["rise"]):
        cells = (
            node["node"], node["dense_read"], f"{found['explained_to_dense'][node['site']]:.2f}",
            f"{node['length']:.3g}", f"{node['change']:.3g}", f"{node['rise']:+.4f}",
            f"{node['random_rise']:+.4f}", f"{node['probe_rise']:+.4f}",
            f"{node['share']:+.3f}" if found["share"] else "",
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in TABLE_HEAD)
    return (
        f'<details open><summary>All {len(rows)} directions, at strength 1</summary><table class="directions"><thead>'
        f"<tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></details>"
    )


def _left(found: dict[str, Any]) -> str:
    if not found["not_transferable"]:
        return ""
    rows = "".join(
        f"<li><code>{html.escape(node)}</code>: {html.escape(why)}</li>"
        for node, why in found["not_transferable"].items()
    )
    n = len(found["not_transferable"])
    return f"<details><summary>{n} nodes not carried across</summary><ul>{rows}</ul></details>"


def _short(dense: str) -> str:
    """A folder by its own name alone; a name on a hub as it is."""
    return Path(dense).name if Path(dense).is_absolute() else dense
