"""What a sweep draws of its `samples`: all at once, or, where a search adapts, those that were noted so far.

A search notes its draws in `draws.json` in the sweep's folder, in their order. What they gave stands in the run
directories alone.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

from sparsetrain.config import RunConfig, config_from_dict
from sparsetrain.files import write_json
from sparsetrain.sweeping.identity import identity, not_default
from sparsetrain.sweeping.sweep_config import Sweep, read_leaves

DRAWS = "draws.json"
Draw = dict[str, Any]


def known_draws(sweep: Sweep) -> list[Draw]:
    """The draws of a sweep: of a search that adapts as far as they are known, those at random first."""
    options = sweep.options
    if not options.adaptive:
        return [at_random(sweep, i) for i in range(options.n_samples)]
    first = [at_random(sweep, i) for i in range(min(options.search.startup, options.n_samples))]
    return [*first, *_noted(sweep)[len(first) : options.n_samples]]


def note_draws(sweep: Sweep, draws: list[Draw]) -> None:
    """Note the draws of a search, before anything is done for the last of them.

    Raises:
        WriteError: they could not be written.
    """
    write_json(_file(sweep), {"asked": _asked(sweep), "draws": draws})


def at_random(sweep: Sweep, i: int) -> Draw:
    """The draw of a number, of the seed and of nothing else."""
    return {
        key: _drawn(random.Random(f"{sweep.options.sample_seed} {i} {key}"), *of) for key, of in sweep.samples.items()
    }


def _drawn(rng: random.Random, kind: str, *of: Any) -> Any:
    if kind == "choice":
        return rng.choice(of)
    low, high = of
    if kind == "integer":
        return rng.randint(low, high)
    drawn = rng.uniform(low, high) if kind == "uniform" else math.exp(rng.uniform(math.log(low), math.log(high)))
    return rounded(drawn, low, high)


def rounded(drawn: float, low: float, high: float) -> float:
    """A drawn number in four digits, which are enough and can be read, and in its range."""
    return min(high, max(low, float(f"{drawn:.4g}")))


def _noted(sweep: Sweep) -> list[Draw]:
    """The draws that were noted by a search that asked the same; none where there are none."""
    try:
        found = json.loads(_file(sweep).read_text())
    except (FileNotFoundError, ValueError):
        return []
    return found["draws"] if found["asked"] == json.loads(json.dumps(_asked(sweep))) else []


def _file(sweep: Sweep) -> Path:
    return sweep.options.folder / DRAWS


def _asked(sweep: Sweep) -> dict[str, Any]:
    """All that the draws of a search depend on besides their number: with anything else they are drawn anew."""
    options = sweep.options
    arm = [item for items in sweep.arms.values() for item in items]
    return {
        "search": dict(not_default(options.search)), "seed": options.sample_seed, "samples": sweep.samples,
        "base": identity(config_from_dict(RunConfig, read_leaves([*options.base, *arm]))), "seeds": options.seeds,
        "tasks": options.tasks, "method": options.method, "prune": dict(not_default(sweep.prune)),
    }  # fmt: skip
