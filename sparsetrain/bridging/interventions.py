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
from sparsetrain.bridging.transfer_measures import curve, defined, draws_curve, rise, share

log = logging.getLogger(__name__)

STRENGTHS = tuple(i / 10 for i in range(11))
RANDOM_STRENGTHS = (0.0, 0.5, 1.0)  # each costs a pass for each draw


@dataclass(frozen=True)
class Case:
    """All that the interventions need.

    Attributes:
        dense: the dense model.
        found: the directions.
        heldout, train: prompts of the task, and on them the changes (N, T) of the nodes by name.
        means: of the dense model's reads (D,), on training text.
        text: held-out batches of tokens and targets.
        train_base: answers (N, 3) on training prompts.
        n_random, seed: draws of random directions.
    """

    dense: Residuals
    found: list[Direction]
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
        strengths, random_strengths; n_prompts, n_random; alignment: `all tokens`, or `last token` where the prompts of
        pairs differ in length.
        dense_model: its logit difference (right minus wrong answer; mean and standard error over pairs), accuracy,
        and `does_the_task`: whether that is clearly above zero.
        curves: of `circuit` (all directions together), `probe`, `patch` and `random`; see `transfer_measures`.
        nodes: for each direction where it is, its `length`, the `change` of its node (greatest over tokens, mean over
        prompts), its `curve`, its `share`, and the rise of the other answer's probability at strength 1: `rise`, on
        training prompts (`train_rise`), by random directions, one for each pair (`random_rise`), by a probe.
        one_node: the node that raises the other answer most on training prompts, and that of those not read by the
        last norm: each one's `rise` on held-out prompts, that of n_random random directions (mean, lowest, highest, and
        `random_size`, the mean of its absolute value, so that rises and falls do not cancel out), and the `ratio` of
        rise to random_size.
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
    inside = [d for d in case.found if d.dense_read != "final_in"]
    curves, shares = _together(case, case.found, base, target)
    shares_inside = _together(case, inside, base, target, (0, 1), (0, 1))[1] if inside and does_it else None
    nodes = [_node(case, d, base, target) for d in case.found]
    chosen = [_best(nodes), _best([node for node in nodes if node["dense_read"] != "final_in"])]
    return {
        "strengths": list(STRENGTHS),
        "random_strengths": list(RANDOM_STRENGTHS),
        "n_prompts": len(prompts.data),
        "n_random": case.n_random,
        "alignment": "all tokens" if prompts.everywhere else "last token",
        "dense_model": task,
        "curves": curves,
        "share": shares if does_it else None,
        "share_inside": shares_inside,
        "nodes": nodes,
        "one_node": [_one(case, node, base) for i, node in enumerate(chosen) if node and node not in chosen[:i]],
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
    random = [steering.along_random(found, moved, case.generator(i)) for i in range(case.n_random)]
    draws = torch.stack([_swept(case, drawn, base, random_strengths) for drawn in random])  # (R, S, N, 3)
    curves = {name: curve(answers) for name, answers in swept.items()}
    shares = {name: share(answers[-1], base, target) for name, answers in swept.items()}
    each = [share(draw[-1], base, target)["value"] for draw in draws]
    shares["random"] = share(draws[:, -1].mean(0), base, target) | {"lowest": min(each), "highest": max(each)}
    return {**curves, "random": draws_curve(draws)}, shares


def _node(case: Case, direction: Direction, base: Tensor, target: Tensor) -> dict[str, Any]:
    """One direction alone."""
    (prompts, moved), (train, train_moved) = case.heldout, case.train
    only = [direction]
    pushes = steering.along(only, moved)
    swept = _swept(case, pushes, base)
    probe = steering.steer(case.dense, prompts, steering.along_probe(pushes, prompts, _probes(case, only)), 1)
    random = steering.steer(case.dense, prompts, steering.along_own_random(direction, moved, case.generator(0)), 1)
    on_train = steering.steer(case.dense, train, steering.along(only, train_moved), 1)
    return {
        "node": direction.node, "site": direction.site, "dense_site": direction.dense_site,
        "dense_read": direction.dense_read, "length": direction.vector.norm().item(),
        "change": moved[direction.node].abs().amax(1).mean().item(),
        "curve": curve(swept),
        "rise": rise(swept[-1], base), "random_rise": rise(random, base), "probe_rise": rise(probe, base),
        "share": share(swept[-1], base, target)["value"],
        "train_rise": rise(on_train, case.train_base),
    }  # fmt: skip


def _best(nodes: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The node that raises the other answer most on training prompts."""
    return max(nodes, key=lambda node: node["train_rise"], default=None)


def _one(case: Case, node: dict[str, Any], base: Tensor) -> dict[str, Any]:
    """A node's rise beside that of random directions on all prompts."""
    prompts, moved = case.heldout
    only = [direction for direction in case.found if direction.node == node["node"]]
    random = [steering.along_random(only, moved, case.generator(i)) for i in range(case.n_random)]
    rises = [rise(steering.steer(case.dense, prompts, drawn, 1), base) for drawn in random]
    size = sum(map(abs, rises)) / len(rises)
    return {
        "node": node["node"], "rise": node["rise"], "random_rise": sum(rises) / len(rises), "random_lowest": min(rises),
        "random_highest": max(rises), "random_size": size, "ratio": node["rise"] / size if size else None,
    }  # fmt: skip


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
