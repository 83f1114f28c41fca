"""All that is done to a dense model along the directions of a circuit, each intervention beside its controls."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.bridging import steering
from sparsetrain.bridging.directions import Direction
from sparsetrain.bridging.residuals import Residuals
from sparsetrain.bridging.steering import Prompts, Pushes
from sparsetrain.bridging.transfer_measures import against_random, curve, defined, draws_curve, rise, share

log = logging.getLogger(__name__)

STRENGTHS = tuple(i / 10 for i in range(11))
RANDOM_STRENGTHS = (0.0, 0.5, 1.0)  # each costs a pass for each draw


@dataclass(frozen=True)
class Case:
    """All that the interventions need.

    Attributes:
        dense: the dense model.
        found: the directions.
        channels: directions of their channels at all reads, in the circuit or not.
        heldout, train: prompts of the task, and on them the changes (N, T) of the nodes by name.
        means: of the dense model's reads (D,), on training text.
        text: held-out batches of tokens and targets.
        train_base: answers (N, 3) on training prompts.
        n_random, seed: draws of random directions.
    """

    dense: Residuals
    found: list[Direction]
    channels: list[Direction]
    heldout: tuple[Prompts, dict[str, Tensor]]
    train: tuple[Prompts, dict[str, Tensor]]
    means: dict[str, Tensor]
    text: list[tuple[Tensor, Tensor]]
    train_base: Tensor
    n_random: int
    seed: int

    def generator(self, draw: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + draw)


def measure(case: Case) -> dict[str, Any]:
    """Steer and ablate the dense model.

    Returns:
        strengths, random_strengths; n_prompts, n_random; alignment: `all tokens`, or `tokens counted from the last`
        where the prompts of pairs differ in length.
        dense_model: its logit difference (right minus wrong answer; mean and standard error over pairs), accuracy,
        and `does_the_task`: whether that is clearly above zero.
        curves: of `circuit` (all directions together), `probe`, `patch` and `random`; see `transfer_measures`.
        nodes: for each direction where it is, its `length`, the `change` of its node (greatest over tokens, mean over
        prompts), its `curve`, its `share`, and the rise of the other answer's probability at strength 1: `rise`, by
        random directions, one for each pair (`random_rise`), by a probe (`probe_rise`).
        counterfactual_rise: how much likelier the other answer is on the counterfactual itself.
        one_node: the node (a channel at one read, as in the paper) that raises the other answer most on training
        prompts, and that of those not read by the last norm: what each does to held-out prompts beside random
        directions, see `against_random`, and `steepest_rise`: what that direction of its length does that raises the
        other answer most, to first order, on training prompts. No node that is as active could do much more.
        one_channel: the same, but for `steepest_rise`, of one of the nodes' channels at all reads together (of one
        place in the residual stream at all depths), whether or not the circuit has it there.
        share: of the change of the logit difference from the prompt to its counterfactual, how much is moved at
        strength 1: `value`, `low`, `high` (95 % by bootstrap over pairs) of `circuit`, `random` (with the `lowest` and
        `highest` of its draws), `probe`, `patch`; None where the dense model cannot do the task.
        share_inside: the same without what the last norm reads, where a direction acts on the logits directly and the
        full patch is the counterfactual itself; None where nothing is left.
        ablation: `logit_difference` and `text_loss` (nats per token, of `n_text_tokens` held-out tokens) of the model
        as it is (`before`), without the directions (`after`), without the probe's (`probe`) and as many random ones
        (`random`: mean, lowest, highest).
    """
    prompts, _ = case.heldout
    base = steering.plain(case.dense, prompts.data)
    target = steering.plain(case.dense, steering.counterfactuals(prompts.data))
    does_it, task = defined(base)
    if not does_it:
        log.warning(
            "the dense model must do the task for a share of it to be explained, got a logit difference of %.3f +- "
            "%.3f; the share is not defined", task["logit_difference"], task["logit_difference_se"],
        )  # fmt: skip
    inside = _inside(case.found)
    curves, shares = _together(case, case.found, base, target)
    shares_inside = _together(case, inside, base, target, (0, 1), (0, 1))[1] if inside and does_it else None
    return {
        "strengths": list(STRENGTHS),
        "random_strengths": list(RANDOM_STRENGTHS),
        "n_prompts": len(prompts.data),
        "n_random": case.n_random,
        "alignment": _alignment(prompts),
        "dense_model": task,
        "curves": curves,
        "share": shares if does_it else None,
        "share_inside": shares_inside,
        "counterfactual_rise": rise(target, base),
        "nodes": [_node(case, d, base, target) for d in case.found],
        "one_node": _best_alone(case, {d.node: [d] for d in case.found}, base),
        "one_channel": _best_alone(case, _by_channel(case.channels), base),
        "ablation": _ablation(case),
    }


def _swept(case: Case, pushes: Pushes, base: Tensor, strengths: Sequence[float] = STRENGTHS) -> Tensor:
    """Answers (S, N, 3) on held-out prompts at each strength; those at the first, 0, are `base`."""
    return torch.stack([base, *(steering.steer(case.dense, case.heldout[0], pushes, s) for s in strengths[1:])])


def _probes(case: Case, found: list[Direction]) -> dict[str, Tensor]:
    prompts, moved = case.train
    return steering.probes(steering.along(found, moved), prompts)


def _together(
    case: Case, found: list[Direction], base: Tensor, target: Tensor,
    strengths: Sequence[float] = STRENGTHS, random_strengths: Sequence[float] = RANDOM_STRENGTHS,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Curves and shares of several directions at once, and of what they are held against."""
    prompts, moved = case.heldout
    pushes = steering.along(found, moved)
    kinds = {
        "circuit": pushes,
        "probe": steering.along_probe(pushes, prompts, _probes(case, found)),
        "patch": steering.patch(prompts, list(pushes)),
    }
    swept = {name: _swept(case, kind, base, strengths) for name, kind in kinds.items()}
    random = [steering.turned(found, case.generator(i)) for i in range(case.n_random)]
    pushed = [steering.along(drawn, moved) for drawn in random]
    draws = torch.stack([_swept(case, drawn, base, random_strengths) for drawn in pushed])  # (R, S, N, 3)
    curves = {name: curve(answers) for name, answers in swept.items()}
    shares = {name: share(answers[-1], base, target) for name, answers in swept.items()}
    each = [share(draw[-1], base, target)["value"] for draw in draws]
    shares["random"] = share(draws[:, -1].mean(0), base, target) | {"lowest": min(each), "highest": max(each)}
    return {**curves, "random": draws_curve(draws)}, shares


def _node(case: Case, direction: Direction, base: Tensor, target: Tensor) -> dict[str, Any]:
    """One direction alone."""
    prompts, moved = case.heldout
    only = [direction]
    pushes = steering.along(only, moved)
    swept = _swept(case, pushes, base)
    probe = steering.steer(case.dense, prompts, steering.along_probe(pushes, prompts, _probes(case, only)), 1)
    random = steering.steer(case.dense, prompts, steering.along_own_random(direction, moved, case.generator(0)), 1)
    return {
        "node": direction.node, "site": direction.site, "dense_site": direction.dense_site,
        "dense_read": direction.dense_read, "length": direction.vector.norm().item(),
        "change": moved[direction.node].abs().amax(1).mean().item(),
        "curve": curve(swept),
        "rise": rise(swept[-1], base), "random_rise": rise(random, base), "probe_rise": rise(probe, base),
        "share": share(swept[-1], base, target)["value"],
    }  # fmt: skip


def _by_channel(found: Sequence[Direction]) -> dict[str, list[Direction]]:
    channels: dict[str, list[Direction]] = {}
    for direction in found:
        channels.setdefault(f"channel {direction.channel}", []).append(direction)
    return channels


def _best_alone(case: Case, groups: dict[str, list[Direction]], base: Tensor) -> list[dict[str, Any]]:
    """What the group of nodes does that raises the other answer most on training prompts; and that of those without
    what the last norm reads."""
    measured = []
    for some in (groups, {name: _inside(nodes) for name, nodes in groups.items()}):
        name, nodes = max(some.items(), key=lambda item: _on_train(case, item[1]))
        if nodes and [d.node for d in nodes] not in (one["nodes"] for one in measured):
            measured.append({"name": name, **_alone(case, nodes, base)})
    return measured


def _on_train(case: Case, nodes: list[Direction]) -> float:
    """The rise by some nodes on training prompts."""
    prompts, moved = case.train
    pushes = steering.along(nodes, moved)
    return rise(steering.steer(case.dense, prompts, pushes, 1), case.train_base) if nodes else -1.0


def _inside(found: Sequence[Direction]) -> list[Direction]:
    """The directions at reads before the last norm."""
    return [d for d in found if d.dense_read != "final_in"]


def _alone(case: Case, nodes: list[Direction], base: Tensor) -> dict[str, Any]:
    """The rise by some nodes, beside that by random directions, and of one node by the steepest one."""
    prompts, moved = case.heldout

    def steered(found: list[Direction]) -> Tensor:
        return steering.steer(case.dense, prompts, steering.along(found, moved), 1)

    draws = torch.stack([steered(steering.turned(nodes, case.generator(i))) for i in range(case.n_random)])
    steepest = None
    if len(nodes) == 1:  # of several reads the first order says less: what one moves changes what the others find
        steepest = rise(steered([steering.steepest(case.dense, *case.train, nodes[0])]), base)
    measured = against_random(steered(nodes), draws, base)
    return {"nodes": [d.node for d in nodes], **measured, "steepest_rise": steepest}


def _alignment(prompts: Prompts) -> str:
    last = prompts.data.last
    return "all tokens" if bool((last[0::2] == last[1::2]).all()) else "tokens counted from the last"


def _ablation(case: Case) -> dict[str, Any]:
    spans = steering.spans(case.found)
    probe = {name: w[None] for name, w in _probes(case, case.found).items()}
    random = [_without(case, steering.random_spans(spans, case.generator(i))) for i in range(case.n_random)]
    before, after, without_probe = (_without(case, s) for s in ({}, spans, probe))
    result: dict[str, Any] = {"n_directions": sum(map(len, spans.values()))}
    result["n_text_tokens"] = sum(x.numel() for x, _ in case.text)
    for key in before:
        drawn = [r[key] for r in random]
        spread = {"mean": sum(drawn) / len(drawn), "lowest": min(drawn), "highest": max(drawn)}
        result[key] = {"before": before[key], "after": after[key], "probe": without_probe[key], "random": spread}
    return result


@torch.no_grad()
def _without(case: Case, spans: dict[str, Tensor]) -> dict[str, float]:
    """Logit difference on held-out prompts and loss on held-out text with directions ablated."""
    edits = steering.ablations(spans, case.means)
    found = steering.ablate(case.dense, case.heldout[0].data, spans, case.means)
    losses = [
        F.cross_entropy(case.dense.steer(x, edits).flatten(0, 1), y.flatten(), reduction="none") for x, y in case.text
    ]
    return {"logit_difference": found[:, 2].mean().item(), "text_loss": torch.cat(losses).mean().item()}
