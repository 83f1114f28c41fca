"""What is said of a steered dense model: curves over strengths, and how much of the way it was moved.

Answers (N, 3) are a prompt's own answer's probability, the other's, and the logit difference; see `steering.answers`.
Rows 2i are positive prompts, which are steered to the negative side; rows 2i + 1 the reverse.
"""

from typing import Any

import torch
from torch import Tensor

MEASURES = ("own", "other", "logit_difference")
SIDES = {"both": slice(None), "to_negative": slice(0, None, 2), "to_positive": slice(1, None, 2)}
LEAST = 0.1  # nats of logit difference with which a model is said to do a task: odds of 1.1
RESAMPLES = 1000


def curve(swept: Tensor) -> dict[str, Any]:
    """For each of SIDES and MEASURES, `mean` and `se` (over prompts) at each strength, of answers (S, N, 3)."""
    return {
        side: {
            name: {"mean": part[..., i].mean(1).tolist(), "se": (part[..., i].std(1) / part.shape[1] ** 0.5).tolist()}
            for i, name in enumerate(MEASURES)
        }
        for side, rows in SIDES.items()
        for part in [swept[:, rows]]
    }


def draws_curve(draws: Tensor) -> dict[str, Any]:
    """The same of answers (R, S, N, 3) of random draws: `mean`, `lowest` and `highest` over draws."""
    found: dict[str, Any] = {}
    for side, rows in SIDES.items():
        means = draws[:, :, rows].mean(2)  # (R, S, 3)
        found[side] = {
            name: {
                "mean": means[..., i].mean(0).tolist(),
                "lowest": means[..., i].amin(0).tolist(),
                "highest": means[..., i].amax(0).tolist(),
            }
            for i, name in enumerate(MEASURES)
        }
    return found


def rise(found: Tensor, base: Tensor) -> float:
    """Mean rise of the other answer's probability."""
    return (found[:, 1] - base[:, 1]).mean().item()


def against_random(found: Tensor, draws: Tensor, base: Tensor) -> dict[str, float | None]:
    """How much the other answer's probability rises beside what random directions do.

    Args:
        found, base: answers (N, 3), steered and not.
        draws: answers (R, N, 3) along random directions.

    Returns:
        `rise`; `random_rise`, the mean over draws, `random_lowest`, `random_highest`; `random_size`, the mean of its
        absolute value, so that rises and falls do not cancel out; `ratio` of rise to random_size, None where random
        directions do nothing; `low`, `high`: 95 % of the ratio by bootstrap over pairs and draws.
    """
    ours = (found[:, 1] - base[:, 1]).double().cpu().view(-1, 2).mean(1)  # (P,)
    theirs = (draws[..., 1] - base[:, 1]).double().cpu().unflatten(1, (-1, 2)).mean(2)  # (R, P)
    each, size = theirs.mean(1), theirs.mean(1).abs().mean()
    generator = torch.Generator().manual_seed(0)
    pairs, drawn = (torch.randint(n, (RESAMPLES, n), generator=generator) for n in (len(ours), len(theirs)))
    sizes = theirs[drawn[:, :, None], pairs[:, None]].mean(2).abs().mean(1)
    low, high = _interval(ours[pairs].mean(1) / sizes)
    ratio = (ours.mean() / size).item() if size else None
    return {
        "rise": ours.mean().item(), "random_rise": each.mean().item(), "random_lowest": each.min().item(),
        "random_highest": each.max().item(), "random_size": size.item(), "ratio": ratio,
        "low": low if size else None, "high": high if size else None,
    }  # fmt: skip


def _interval(resampled: Tensor) -> tuple[float, float]:
    """Where 95 % of the resampled values are."""
    ordered = resampled.sort().values
    low, high = (ordered[int(q * (len(ordered) - 1))].item() for q in (0.025, 0.975))
    return low, high


def share(found: Tensor, base: Tensor, target: Tensor) -> dict[str, float]:
    """How far the logit difference was moved from the prompts' (0) to their counterfactuals' (1).

    A ratio of means over prompts, since a ratio for each would be ruled by those that hardly change.

    Args:
        found, base, target: answers (N, 3) steered, of the prompts, and of their counterfactuals.

    Returns:
        `value`; `low` and `high`: 95 % of what bootstrap over pairs gives.
    """
    moved, way = ((x[:, 2] - base[:, 2]).double().cpu().view(-1, 2).sum(1) for x in (found, target))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(moved), (RESAMPLES, len(moved)), generator=generator)
    low, high = _interval(moved[rows].sum(1) / way[rows].sum(1))
    return {"value": (moved.sum() / way.sum()).item(), "low": low, "high": high}


def defined(base: Tensor) -> tuple[bool, dict[str, Any]]:
    """Whether a model does a task, and how well, from its answers (N, 3).

    It does if its mean logit difference is at least LEAST and twice its standard error over pairs.
    """
    pairs = base[:, 2].view(-1, 2).mean(1)
    mean, error = pairs.mean().item(), (pairs.std() / len(pairs) ** 0.5).item()
    does_it = mean >= max(LEAST, 2 * error)
    accuracy = (base[:, 2] > 0).float().mean().item()
    return does_it, {
        "does_the_task": does_it, "logit_difference": mean, "logit_difference_se": error, "accuracy": accuracy,
    }  # fmt: skip


def describe(found: dict[str, Any]) -> str:
    """A transfer as a table."""
    task, ablation, left = found["dense_model"], found["ablation"], found["not_transferable"]
    best = [one["name"] for one in found["one_node"]]
    lines = [
        f"{found['task']}: {len(found['nodes'])} of the {len(found['nodes']) + len(left)} nodes that read the residual "
        f"stream carried to {found['dense']}",
        *(f"  not {name}: {why}" for name, why in left.items()),
        f"  its logit difference {task['logit_difference']:.3f} +- {task['logit_difference_se']:.3f}, accuracy "
        f"{task['accuracy']:.1%} of {found['n_prompts']} prompts",
        *_share_lines(found),
        f"  {'node':28} {'at':20} {'rise of P(other)':>17} {'random':>9} {'probe':>9} {'share':>7}",
    ]
    for node in sorted(found["nodes"], key=lambda n: -n["rise"]):
        mark = "*" if node["node"] in best else " "
        lines.append(
            f" {mark}{node['node']:28} {node['dense_read']:20} {node['rise']:+17.4f} {node['random_rise']:+9.4f} "
            f"{node['probe_rise']:+9.4f} {node['share']:+7.3f}"
        )
    lines.append(
        f"  alone, chosen on training prompts, beside {found['n_random']} random directions; the counterfactual itself "
        f"{found['counterfactual_rise']:+.4f}"
    )
    for one in [*found["one_node"], *found["one_channel"]]:
        lines.append(
            f"  * {one['name']} ({_places(one)}): {one['rise']:+.4f}; random {one['random_rise']:+.4f} "
            f"({one['random_lowest']:+.4f} to {one['random_highest']:+.4f}), of mean size {one['random_size']:.4f}: "
            f"ratio {ratio_text(one)}{_steepest(one)}"
        )
    for key, name in (("logit_difference", "logit difference"), ("text_loss", "loss on other text")):
        a = ablation[key]
        lines.append(
            f"  {name} without {ablation['n_directions']} directions {a['after']:.3f} (before {a['before']:.3f}; "
            f"random ones {a['random']['mean']:.3f}, {a['random']['lowest']:.3f} to {a['random']['highest']:.3f}; "
            f"the probe's {a['probe']:.3f})"
        )
    return "\n".join(lines)


def _places(one: dict[str, Any]) -> str:
    return f"{len(one['nodes'])} reads" if len(one["nodes"]) > 1 else "one read"


def _steepest(one: dict[str, Any]) -> str:
    rise = one["steepest_rise"]
    return "" if rise is None else f"; the steepest direction of this length {rise:+.4f}"


def ratio_text(one: dict[str, Any]) -> str:
    """A ratio to random directions with its interval, or that there is none."""
    return "not defined" if one["ratio"] is None else f"{one['ratio']:.1f} ({one['low']:.1f} to {one['high']:.1f})"


def _share_lines(found: dict[str, Any]) -> list[str]:
    if found["share"] is None:
        return ["  share of its logit difference that is moved: not defined, since it does not do the task"]
    names = {"circuit": "the circuit's directions", "random": "random directions", "probe": "probes of the dense model",
             "patch": "its own reads of the counterfactual"}  # fmt: skip
    scopes = {"share": "at strength 1 (95 % over pairs)", "share_inside": "the same without what the last norm reads"}
    lines = ["  share of the change of its logit difference that is moved"]
    for scope in scopes:
        if found[scope]:
            lines.append(f"   {scopes[scope]}")
            shares = {words: found[scope][key] for key, words in names.items()}
            lines += [f"    {w:36} {s['value']:+.3f}  ({s['low']:+.3f} to {s['high']:+.3f})" for w, s in shares.items()]
    return lines
