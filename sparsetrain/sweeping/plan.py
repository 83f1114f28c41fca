"""What is left of a sweep, and how long it may take: from points that are done, or else from a few timed steps."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice, pairwise
from statistics import fmean

from sparsetrain.config import RunConfig, config_to_dict
from sparsetrain.sweeping.draws import known_draws
from sparsetrain.sweeping.engines import Engine
from sparsetrain.sweeping.identity import not_default
from sparsetrain.sweeping.points import Point
from sparsetrain.sweeping.records import Job, Recorded
from sparsetrain.sweeping.sweep_config import ALL, Sweep
from sparsetrain.sweeping.worker import Worker

STEPS = 4  # that are timed at the beginning of a run, and as many at its end
MOST_TIMED = 6  # combinations whose steps are timed; others are scaled from the nearest
TIMED_SHARE = 1 / 50  # of all steps to come that may be timed before them, unless that leaves none
KNOWN, TIMED, SCALED = "as its seeds took", "timed steps", "scaled from timed steps"


@dataclass(frozen=True)
class Estimate:
    """What a point takes.

    Attributes:
        train_seconds: training; None where nothing is known.
        peak_bytes: the most memory while training.
        source: what the two rest on.
        task_seconds: pruning one task; None before any was pruned.
        n_tasks: tasks that are pruned, or a mean over the points of which it is known; None where it is of none.
        trained: whether it is trained already.
        n_pruned: tasks that are pruned already.
    """

    train_seconds: float | None
    peak_bytes: int | None
    source: str
    task_seconds: float | None
    n_tasks: float | None
    trained: bool = False
    n_pruned: int = 0

    @property
    def train_left(self) -> float | None:
        """Seconds of training to come; None where nothing is known."""
        return 0.0 if self.trained else self.train_seconds

    @property
    def tasks_left(self) -> float:
        return max(0.0, (self.n_tasks or 0) - self.n_pruned)

    @property
    def pruning_known(self) -> bool:
        return self.task_seconds is not None and self.n_tasks is not None

    @property
    def seconds(self) -> float:
        """All that is known of the time that the point still takes."""
        return (self.train_left or 0) + (self.task_seconds or 0) * self.tasks_left


def estimates(
    config: Sweep, points: list[Point], found: Mapping[str, Recorded], worker: Worker | None
) -> dict[str, Estimate]:
    """An estimate for each point, by its id; steps are timed where no other seed of the point is done.

    Args:
        config: the sweep.
        points: its points.
        found: what is recorded of each, by its id.
        worker: times steps; None: none are timed, since the points run on other machines.
    """
    groups = _grouped(points)
    cells = {group: of[-1] for group, of in groups.items()}
    known = {group: _known([found[point.id] for point in of]) for group, of in groups.items()}
    unknown = [point for group, point in cells.items() if known[group] is None]
    steps = sum(point.config.train.steps for group, of in groups.items() if known[group] is None for point in of)
    n_timed = min(MOST_TIMED, max(1, int(steps * TIMED_SHARE / (2 * STEPS)))) if worker else 0
    timed = {point.group: _timed(config, point, worker) for point in _spread(unknown, n_timed)} if worker else {}
    pruned = [
        record["seconds"] for of in found.values() for job, record in of if "seconds" in record and job.stage == "prune"
    ]
    numbers = {name: _n_tasks(config, of) for name, of in found.items()}
    counted = [n for n in numbers.values() if n is not None]
    mean = fmean(counted) if counted else None
    training = {g: known[g] or timed.get(g) or _scaled(cells[g], timed, cells) for g in cells}
    task_seconds = fmean(pruned) if pruned else None
    return {
        p.id: Estimate(
            *training[p.group], task_seconds, mean if numbers[p.id] is None else numbers[p.id],
            trained="result" in found[p.id][0][1],
            n_pruned=sum(job.stage == "prune" and bool(record) for job, record in found[p.id]),
        ) for p in points
    }  # fmt: skip


def _grouped(points: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault(point.group, []).append(point)
    return groups


def _n_tasks(config: Sweep, of: Recorded) -> int | None:
    """How many tasks a point prunes; None before it is known what its model does."""
    known = ALL not in config.options.tasks or any(
        job.stage == "abilities" and "result" in record for job, record in of
    )
    return sum(job.stage == "prune" for job, _ in of) if known else None


def plan_text(
    config: Sweep, points: list[Point], left: list[Point], expected: dict[str, Estimate], engine: Engine
) -> str:
    """The plan as a table: a line for all seeds of a combination, then the sum over what is left, and the wall time."""
    cells, still = _grouped(points), {point.id for point in left}
    width = max(len(_cell_name(of[0])) for of in cells.values())
    lines = [
        f"{config.options.folder}: {len(points)} points, {len(points) - len(left)} done or failed, {len(left)} left"
    ]
    for of in cells.values():
        one, open_points = expected[of[0].id], [expected[point.id] for point in of if point.id in still]
        n_trained = sum(point.trained for point in open_points)
        trained = f" ({n_trained} trained)" if n_trained else ""
        lines.append(
            f"  {_cell_name(of[0]):{width}}  {len(open_points)} of {len(of)} left{trained}, "
            f"{duration(one.train_seconds)} of training each, {_memory(one.peak_bytes)} ({one.source})"
        )
    if n_more := _n_draws_to_come(config) * len(config.options.seeds):
        lines.append(f"  up to {n_more} points more, whose draws follow from what these give")
    whole = [replace(one, trained=False, n_pruned=0) for one in expected.values()]  # draws to come are as those before
    to_come = [*(expected[point.id] for point in left), *islice(cycle(whole), n_more)]
    training = [one.train_left for one in to_come]
    seconds = None if None in training else sum(training)
    lines.append(f"training: about {duration(seconds)}; {_pruning(config, to_come)}")
    return "\n".join([*lines, _wall_time(config, to_come, engine)])


def _n_draws_to_come(config: Sweep) -> int:
    return config.options.n_samples - len(known_draws(config)) if config.options.adaptive else 0


def _wall_time(config: Sweep, to_come: list[Estimate], engine: Engine) -> str:
    """The engine, how many points it runs at once, and how long all that is left takes then."""
    options = config.options.engine
    asked = [f"{options.cpus} CPUs", f"{options.gpus:g} GPUs" * bool(options.gpus)]
    asked += [f"{options.memory:g} GiB"] if options.memory else []
    each = f", each with {', '.join(filter(None, asked))}" if options.kind != "serial" else ""
    rooms = "as many points at once as there is room for" if engine.at_once is None else f"{engine.at_once} at once"
    if not to_come:
        return f"engine: {engine.words}; {rooms}{each}; nothing is left to do"
    if engine.at_once is None or any(one.train_left is None for one in to_come):
        return f"engine: {engine.words}; {rooms}{each}; how long it takes is not known yet"
    taken = [one.seconds for one in to_come]
    seconds = max(max(taken), sum(taken) / engine.at_once)
    known = not config.options.tasks or all(one.pruning_known for one in to_come)
    without = "" if known else ", pruning not counted"
    return f"engine: {engine.words}; {rooms}{each}; about {duration(seconds)} in all{without}"


def _pruning(config: Sweep, to_come: list[Estimate]) -> str:
    if not config.options.tasks:
        return "no task is pruned"
    if not to_come:
        return "nothing is left to prune"
    if not all(one.pruning_known for one in to_come):
        return "how long pruning takes is not known before a task was pruned"
    each = to_come[0].task_seconds
    tasks = f"{fmean(one.n_tasks for one in to_come):.3g} tasks a point, {duration(each)} each as those before"
    return f"pruning: about {duration(each * sum(one.tasks_left for one in to_come))} ({tasks})"


def _known(seeds: list[Recorded]) -> tuple[float, int | None, str] | None:
    """Time and memory of the seeds of a combination that are trained."""
    results = [record["result"] for of in seeds for job, record in of if job.stage == "train" and "result" in record]
    if not results:
        return None
    memory = [result["train_peak_bytes"] for result in results if result["train_peak_bytes"]]
    return fmean(r["train_seconds"] for r in results), max(memory, default=None), KNOWN


def _spread(points: list[Point], n: int) -> list[Point]:
    """Some of the points, from the cheapest to the dearest; the dearest alone where it is one."""
    ordered = sorted(points, key=lambda point: cost(point.config))
    if len(ordered) <= n:
        return ordered
    return [ordered[-1 - i * (len(ordered) - 1) // max(1, n - 1)] for i in range(n)]


def _timed(config: Sweep, point: Point, worker: Worker) -> tuple[float | None, int | None, str]:
    others = ("run.name", "run.out", "run.seed")
    asked = {key: value for key, value in not_default(point.config) if key not in others} | {"machine": platform.node()}
    order = {"config": config_to_dict(point.config), "steps": STEPS}
    name = f"calibrate-{point.id.rpartition('_seed-')[0]}"
    job = Job(name, "calibrate", config.options.folder / "plan", asked, order)
    error = None if job.record() else worker.run(job)
    result = job.record().get("result")
    if not result:
        return None, None, f"not known: {error or job.record().get('error')}"
    source = f"{TIMED}, not compiled" if point.config.run.compile else TIMED
    return result["train_seconds"], result["train_peak_bytes"], source


def _scaled(point: Point, timed: dict, cells: dict) -> tuple[float | None, int | None, str]:
    """Time between those of the timed combinations next in cost; beyond these, in proportion to the nearest."""
    of = cost(point.config)
    known = ((cost(cells[g].config), *timed[g][:2]) for g in timed if timed[g][0] is not None)
    costs = sorted(known, key=lambda one: one[:2])  # memory may not be known
    if not costs:
        return None, None, "not known"
    at, seconds, memory = min(costs, key=lambda one: abs(one[0] - of))
    for (low, first, _), (high, second, _) in pairwise(costs):
        if low <= of <= high and low < high:
            return first + (second - first) * (of - low) / (high - low), memory, SCALED
    return seconds * of / at, memory, SCALED


def cost(config: RunConfig) -> float:
    """What training costs at the beginning, in multiply-adds of the dense products."""
    m, t = config.model, config.train
    block = m.d_model**2 * (4 + 2 * m.mlp_ratio) + 2 * m.n_ctx * m.d_model
    return 3.0 * t.steps * t.batch_size * m.n_ctx * (m.n_layers * block + m.d_model * config.data.vocab_size)


def _cell_name(point: Point) -> str:
    values = [f"{key}={value}" for key, value in point.values.items()]
    return " ".join(filter(None, (point.arm, *values))) or "base"


def duration(seconds: float | None) -> str:
    """Seconds in the unit that suits them."""
    if seconds is None:
        return "? s"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _memory(n_bytes: int | None) -> str:
    return "? GiB" if n_bytes is None else f"{n_bytes / 2**30:.2f} GiB"
