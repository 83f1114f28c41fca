"""What a point needs, what is forgotten or recorded of its failures, and what is shown of points under way."""

import fcntl
import io
from contextlib import contextmanager

import pytest

from sparsetrain.sweeping.complete import (
    Failure,
    Over,
    complete,
    forget_failures,
    give_up,
    is_left,
    left_jobs,
    under_way,
)
from sparsetrain.sweeping.points import expand
from sparsetrain.sweeping.progress import Progress
from sparsetrain.sweeping.records import jobs, recorded
from sparsetrain.sweeping.sweep_config import load_sweep

ASKED = ["seeds=[0,1,2]", "tasks=[for_while,else_elif]", "measures=[m:f]"]


@pytest.fixture
def swept(tmp_path):
    return load_sweep([f"out={tmp_path}", *ASKED])


@pytest.fixture
def point(swept):
    return expand(swept)[0]


class Doing:
    """Does jobs in no time, but for those that fail."""

    def __init__(self, **failing: str):
        self.failing, self.done = failing, []

    def __call__(self, job):
        self.done.append(job.name)
        for name in job.makes[:1]:
            (job.folder / name).mkdir(parents=True, exist_ok=True)
        if error := self.failing.get(job.stage):
            job.write(error=error)
            return error
        job.write(result={}, seconds=2.0)
        return None


def test_jobs_that_are_not_done_are_done_in_their_order_and_a_failure_does_not_stop_the_rest(swept, point):
    doing = Doing(prune="died")
    failed = complete(swept, point, doing)
    assert doing.done == ["train", "prune-for_while", "prune-else_elif", "measure-m.f"]
    assert failed == [Failure("prune-for_while", "died"), Failure("prune-else_elif", "died")]
    assert not is_left(recorded(swept, point)) and is_left(recorded(swept, point), retry=True)
    assert complete(swept, point, Doing()) == []
    forget_failures(swept, point)
    again = Doing()
    complete(swept, point, again)
    assert again.done == ["prune-for_while", "prune-else_elif", "measure-m.f"], "it measured a run without circuits"
    assert not is_left(recorded(swept, point))
    other = load_sweep([f"out={swept.options.out}", *ASKED, "prune=[target_loss=0.2]"])
    assert list(left_jobs(other, point)) == list(jobs(other, point))[1:], "and it measures circuits of one target"


def test_without_its_model_nothing_more_is_done(swept, point):
    doing = Doing(train="diverged")
    assert complete(swept, point, doing) == [Failure("train", "diverged")]
    assert doing.done == ["train"] and not is_left(recorded(swept, point))


def test_a_point_that_is_given_up_has_its_error_recorded(swept, point):
    doing = Doing(prune="died")
    complete(swept, point, doing)
    forget_failures(swept, point)
    assert give_up(swept, point, "its machine is gone") == Failure("prune-for_while", "its machine is gone")
    assert {job.name: record["error"] for job, record in recorded(swept, point) if "error" in record} == {
        "prune-for_while": "its machine is gone"
    }


@contextmanager
def locked(point):
    point.folder.mkdir(parents=True, exist_ok=True)
    with open(point.folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_the_bar_shows_the_points_that_are_under_way(swept, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    first, second, third = points = expand(swept)
    assert not under_way(first)
    expected = {point.id: 10.0 for point in points}
    with locked(first), locked(second), Progress(swept, 3, 0, expected, at_once=2) as progress:
        (first.folder / "metrics.jsonl").write_text('{"step": 40, "loss/train": 3.5}\n')
        assert [under_way(point) for point in points] == [True, True, False]
        progress.tick(points)
        told = terminal.getvalue()
        assert "time left not known yet" in told and f"  {first.id}: train, step 40 of 10000, loss 3.500" in told
        assert f"  {second.id}: train, step 0 of 10000" in told
        assert third.id not in terminal.getvalue()
        progress.finished(Over(first, [Failure("measure-m.f", "died")]), [], took=20.0)
    assert f"{first.id}: measure-m.f failed: died; see {first.folder / 'log.txt'}" in terminal.getvalue()
    assert f"{first.id}: 20 s; about 20 s left" in terminal.getvalue()  # 2 points of 20 s, two at once


def test_without_a_terminal_the_points_under_way_are_told_now_and_then(swept, monkeypatch, capsys):
    first, second, _ = points = expand(swept)
    with locked(second), Progress(swept, 3, 0, {}, at_once=1) as progress:
        progress.tick(points)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr("sparsetrain.sweeping.progress.TELL_SECONDS", 0.0)
        progress.tick(points)
    told = capsys.readouterr().err
    assert told.startswith(f"under way:\n  {second.id}: train, step ") and first.id not in told
