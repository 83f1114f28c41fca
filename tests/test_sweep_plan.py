"""The plan of a sweep: whose steps are timed, and what it says of engines and wall time."""

from dataclasses import dataclass, replace

import pytest

from sparsetrain.sweeping import plan
from sparsetrain.sweeping.plan import KNOWN, TIMED, Estimate, plan_text
from sparsetrain.sweeping.points import expand
from sparsetrain.sweeping.records import jobs, recorded
from sparsetrain.sweeping.sweep_config import load_sweep


class Timing:
    """Times steps in no time, and counts how often."""

    n = 0

    def run(self, job):
        self.n += 1
        job.write(result={"train_seconds": 100.0, "train_peak_bytes": 10})


def estimates(config, points, worker):
    return plan.estimates(config, points, {point.id: recorded(config, point) for point in points}, worker)


@pytest.mark.parametrize("steps, n_timed", [(90, 1), (120, 2), (10_000, 6)])
def test_timed_steps_are_few_beside_those_to_come(tmp_path, steps, n_timed):
    widths = "grid.model.d_model=[16,32,48,64,80,96,112]"
    config = load_sweep([f"out={tmp_path}", f"base=[train.steps={steps},sparsity.density=0.5]", widths])
    points, timing = expand(config), Timing()
    found = estimates(config, points, timing)
    assert timing.n == n_timed
    assert [found[point.id].source for point in points].count(TIMED) == n_timed
    assert found[points[-1].id] == Estimate(100.0, 10, TIMED, None, 0)  # the dearest is among them
    assert estimates(config, points, timing) == found and timing.n == n_timed  # they are kept


def test_points_that_are_done_stand_for_their_other_seeds_and_other_machines_are_not_timed(tmp_path):
    config = load_sweep([f"out={tmp_path}", "grid.model.d_model=[64,128]", "seeds=[0,1]", "tasks=[for_while]"])
    points = expand(config)
    train, prune = jobs(config, points[0])
    (train.folder / "model").mkdir(parents=True)
    train.write(result={"train_seconds": 7.0, "train_peak_bytes": None}, seconds=8.0)
    prune.write(error="died")
    found = estimates(config, points, None)
    assert [found[point.id].train_seconds for point in points] == [7.0, None, 7.0, None]
    assert [found[point.id].source for point in points] == [KNOWN, "not known"] * 2
    timed = estimates(config, points, Timing())
    assert [timed[point.id].source for point in points] == [KNOWN, TIMED] * 2
    assert [timed[point.id].seconds for point in points] == [0.0, 100.0, 7.0, 100.0]  # the first has nothing left


def test_steps_are_timed_again_where_only_how_they_are_computed_changes(tmp_path):
    timing = Timing()
    for more in ([], [], ["train.accumulate=8"], ["train.accumulate=8", "run.threads=2"]):
        config = load_sweep([f"out={tmp_path}", f"base={more}".replace("'", ""), "grid.model.d_model=[64]"])
        estimates(config, expand(config), timing)
    assert timing.n == 3


def test_tasks_are_counted_as_soon_as_it_is_known_what_a_model_does(tmp_path):
    config = load_sweep([f"out={tmp_path}", "grid.model.d_model=[64,128]", "tasks=[all]"])
    points = expand(config)
    train, abilities = jobs(config, points[0])
    (train.folder / "model").mkdir(parents=True)
    train.write(result={"train_seconds": 7.0, "train_peak_bytes": None}, seconds=8.0)
    assert {one.n_tasks for one in estimates(config, points, None).values()} == {None}
    losses = {"for_while": 0, "ioi": 9, "with_as": 0}
    abilities.write(result={task: {"loss": 1, "calibrated_loss": loss} for task, loss in losses.items()}, seconds=1.0)
    found = estimates(config, points, None)
    assert "how long pruning takes is not known" in plan_text(config, points, points, found, Two())
    pruned, _ = (job for job in jobs(config, points[0]) if job.stage == "prune")
    pruned.write(error="died", seconds=30.0)
    found = estimates(config, points, None)
    assert [(found[point.id].n_tasks, found[point.id].tasks_left) for point in points] == [(2, 1), (2, 2)]
    told = plan_text(config, points, points, found, Two())
    assert "pruning: about 90 s (2 tasks a point, 30 s each as those before)" in told
    assert "1 of 1 left (1 trained), 7.0 s of training each" in told


@dataclass
class Two:
    """An engine that runs two points at once."""

    words, at_once = "ray, on this machine", 2


@pytest.mark.parametrize(
    "more, seconds, told",
    [
        ([], 30.0, "engine: ray, on this machine; 2 at once, each with 4 CPUs, 1 GPUs; about 45 s in all, pruning not"),
        (["tasks=[]"], 30.0, "about 45 s in all"),  # 3 points of 30 s
        (["tasks=[]", "seeds=[0]", "grid.optim.lr=[0.1]"], 30.0, "about 30 s in all"),  # no shorter than one
        (["tasks=[]"], None, "how long it takes is not known yet"),
        (["search.sampler=tpe", "samples.optim.lr=[uniform,0,1]", "n_samples=13", "tasks=[]", "seeds=[0]",
          "search.objective=val_loss"], 30.0, "about 3.2 min in all"),
    ],
)  # fmt: skip
def test_the_plan_says_how_many_points_run_at_once_and_the_time_that_follows(tmp_path, more, seconds, told):
    asked = [
        f"out={tmp_path}",
        "seeds=[0,1,2]",
        "tasks=[for_while]",
        "engine.kind=ray",
        "engine.cpus=4",
        "engine.gpus=1",
    ]
    config = load_sweep([*asked, *more])
    points = expand(config)
    expected = {point.id: Estimate(seconds, None, "timed", None, 0) for point in points}
    text = plan_text(config, points, points, expected, Two())
    assert told in text
    assert ("up to 3 points more" in text) == config.options.adaptive
    if config.options.adaptive:  # once those are done, the rest takes as long as they did
        done = {name: replace(one, trained=True) for name, one in expected.items()}
        text = plan_text(config, points, [], done, Two())
        assert "training: about 90 s" in text and "about 45 s in all" in text
    else:
        assert "nothing is left to do" in plan_text(config, points, [], expected, Two())


def test_what_is_not_timed_lies_between_those_that_are(tmp_path):
    """Steps have a part that does not grow with the model."""
    widths = "grid.model.d_model=[16,32,48,64,80,96,112]"
    config = load_sweep([f"out={tmp_path}", "base=[train.steps=120,sparsity.density=0.5]", widths])
    points = expand(config)
    takes = {point.config.model.d_model: 60 + 1e-12 * plan.cost(point.config) for point in points}

    class Linear(Timing):
        def run(self, job):
            seconds = takes[job.order["config"]["model"]["d_model"]]
            job.write(result={"train_seconds": seconds, "train_peak_bytes": 10})

    found = estimates(config, points, Linear())
    assert [found[point.id].train_seconds for point in points] == pytest.approx([*takes.values()])
    assert [found[point.id].source for point in points].count(TIMED) == 2


def test_combinations_of_equal_cost_may_take_the_same_and_the_memory_of_some_be_unknown(tmp_path):
    rates = "grid.optim.lr=[0.1,0.2,0.3,0.4,0.5,0.6,0.7]"
    config = load_sweep([f"out={tmp_path}", "base=[train.steps=10000,model.d_model=64]", rates])

    class Unknown(Timing):
        def run(self, job):
            self.n += 1
            job.write(result={"train_seconds": 100.0, "train_peak_bytes": 10 if self.n % 2 else None})

    found = estimates(config, expand(config), Unknown()).values()
    assert [one.train_seconds for one in found] == [100.0] * 7
