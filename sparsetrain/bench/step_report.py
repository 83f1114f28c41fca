"""What the benchmark of whole training steps says: who is faster, what it takes, where the time goes, what it costs."""

from statistics import mean, median

from sparsetrain.bench.step import CANDIDATES, OURS, RECIPE, TWIN
from sparsetrain.bench.timing import ratio

LAST = 50  # steps whose losses are compared


def summary(result: dict) -> str:
    """Markdown tables of one run.

    Args:
        result: {"environment": ..., "rows": [...]}, rows as `step.measure` returns them, with the sizes of the model.
    """
    env = result["environment"]
    parts = [
        f"{env['device']}, {env['threads']} threads, torch {env['versions']['torch']}, Triton "
        f"{env['versions']['triton']}, Python {env['python']}, commit {env['commit']}, {env['date']}. Whole training "
        "steps in one process, on a CPU one of each arm in turn, on the same batches of the standard library's source; "
        "medians, and in brackets the least and the greatest. `dense-masked` is the released recipe: the same model "
        "and numerics with dense products, torch.topk + scatter, torch's own attention and loss, dense Adam, and a "
        "projection by torch.topk. The dense transformers have our attention, norm and loss. No arm is compiled. A "
        "step with candidates counts its share of a choice of new ones. On a CPU peak memory is that of a process that "
        "takes the first two steps, the first of which is dense for every arm."
    ]
    for size, rows in _by_size(result["rows"]):
        parts.append(f"**{size}**\n\n{_table(rows)}\n\n{_losses_line(rows)}\n\n{_floor_line(rows)}")
        parts.append(f"Where the time of a step goes, in ms (one profiled step of each):\n\n{_profile_table(rows)}")
    return "\n\n".join(parts)


def _by_size(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    return [(size, [row for row in rows if row["size"] == size]) for size in sizes]


def _table(rows: list[dict]) -> str:
    rival = _arm(rows, RECIPE)
    lines = [
        "| arm | ms a step | tokens/s | x dense-masked | peak memory, GiB | weights | nonzeros at most |",
        "|---|" + "---|" * 6,
    ]
    for row in rows:
        if row["arm"] == TWIN:
            continue
        ms, speed = sorted(1e3 * s for s in row["seconds"]), row["tokens"] / _seconds(row)
        middle, least, greatest = ratio(rival["seconds"], row["seconds"])
        cells = (
            row["arm"], f"{1e3 * _seconds(row):.0f} ({ms[0]:.0f}-{ms[-1]:.0f})", f"{speed:,.0f}",
            "" if row is rival else f"{middle:.3g} ({least:.2g}-{greatest:.2g})", f"{row['peak_bytes'] / 2**30:.2f}",
            f"{row['parameters']:,}", f"{row['nonzeros']:,}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(row: dict) -> float:
    """The median of a step; with candidates, with its share of the steps that choose new ones, if there was one."""
    every = row["refill_every"]
    refills = [s for i, s in enumerate(row["seconds"], 1) if every and i % every == 0]
    others = [s for i, s in enumerate(row["seconds"], 1) if not every or i % every]
    return median(others) + ((median(refills) - median(others)) / every if refills else 0)


def losses(rows: list[dict]) -> dict[str, float]:
    """Mean loss over the last steps of ours and of the recipe, how far each step's differ, and how far noise moves it.

    Returns:
        ours, recipe (nats), difference (mean absolute one, step by step), noise (the same, of ours started from weights
        that differ by 1e-6).
    """
    ours, recipe, twin = (_arm(rows, name)["losses"][-LAST:] for name in (OURS, RECIPE, TWIN))
    return {
        "ours": mean(ours),
        "recipe": mean(recipe),
        "difference": mean(abs(a - b) for a, b in zip(ours, recipe, strict=True)),
        "noise": mean(abs(a - b) for a, b in zip(ours, twin, strict=True)),
    }


def _losses_line(rows: list[dict]) -> str:
    found, steps = losses(rows), len(_arm(rows, OURS)["losses"])
    return (
        f"Losses over the last {min(LAST, steps)} of {steps} steps from the same weights: ours with the dense gradient "
        f"{found['ours']:.4f}, dense-masked {found['recipe']:.4f}; step by step they differ by "
        f"{found['difference']:.4f} on average, and ours from ours started 1e-6 away by {found['noise']:.4f}."
    )


def _floor_line(rows: list[dict]) -> str:
    ours, candidates = _arm(rows, OURS), _arm(rows, CANDIDATES)
    return (
        "Floors (each op's bytes at the speed of a copy, or its fp32 multiply-adds at that of a dense product; sparse "
        "products, selections, attention, loss and Adam; without the dense gradient's own product): "
        f"{1e3 * ours['floor']:.0f} ms with the dense gradient, whose step takes "
        f"{_seconds(ours) / ours['floor']:.2g} times that, and {1e3 * candidates['floor']:.0f} ms with candidates, "
        f"{_seconds(candidates) / candidates['floor']:.2g} times."
    )


def _profile_table(rows: list[dict]) -> str:
    shown = [row for row in rows if row["arm"] in (RECIPE, OURS, CANDIDATES)]
    columns = []
    for row in shown:
        total = sum(row["profile"].values())
        named = sorted(((k, v) for k, v in row["profile"].items() if k != "other"), key=lambda pair: -pair[1])
        named = [*named[:8], ("all else", total - sum(v for _, v in named[:8]))]
        columns.append([f"{_short(name)} {1e3 * seconds:.0f}" for name, seconds in named])
    lines = [f"| {' | '.join(row['arm'] for row in shown)} |", "|---|" + "---|" * (len(shown) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in zip(*columns, strict=True))])


def _short(name: str) -> str:
    name = name.removeprefix("GeneratedBackwardFor_sparsetrain_").removesuffix("_default")
    return f"`{name.removeprefix('sparsetrain::').removeprefix('aten::')}`"


def _arm(rows: list[dict], name: str) -> dict:
    return next(row for row in rows if row["arm"] == name)
