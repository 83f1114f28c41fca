"""What `sparsetrain frontier` writes, and what a reader can do with the page in a browser."""

import json
import math
import os
import xml.etree.ElementTree as ElementTree

import pytest
from made_sweep import FAILED, model_rows, ruled_sweep, write_rows

from sparsetrain.analysis.frontier import MADE_ON, write_frontier
from sparsetrain.analysis.frontier_data import FrontierError
from sparsetrain.cli import main
from sparsetrain.sweeping.rows import read_rows
from sparsetrain.sweeping.sweep_config import SWEEP

FILES = {"frontier.html", "frontier.json", "frontier.md", "frontier.png", "frontier.svg"}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of 16 models with its frontier; one run directory is there, with a circuit and its page."""
    folder = tmp_path_factory.mktemp("swept")
    ruled_sweep(folder, (64, 128), (0.0625, 0.125, 0.25))
    first, second = [row for row in read_rows(folder) if row["reached"]][:2]
    circuit = folder / "points" / first["point"] / "circuits" / first["task"] / "node_masks"
    circuit.mkdir(parents=True)
    (circuit / "circuit.json").write_text("{}")
    (circuit / "circuit.html").write_text("<title>a circuit</title>")
    bare = circuit.parents[1] / second["task"] / "node_masks"
    bare.mkdir(parents=True)
    (bare / "circuit.json").write_text("{}")
    write_frontier([folder])
    return folder


@pytest.fixture
def page(open_page, swept):
    return open_page(swept / "frontier.html", width=1400)


def columns(page, name: str) -> dict:
    return page.evaluate(
        """(name) => Object.fromEntries(Object.entries(Bokeh.documents[0].get_model_by_name(name).data)
               .map(([key, column]) => [key, Array.from(column)]))""",
        name,
    )


def data_of(folder) -> dict:
    return json.loads((folder / "frontier.json").read_text())


def test_the_command_says_and_writes_it(tmp_path, capsys):
    folder = write_rows(tmp_path / "s", model_rows(3.0, {"a": 4, "b": 9}, width=1), model_rows(3.1, {"a": FAILED}))
    assert main(["frontier", str(folder), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "| width=1 | 1 | 4,000 | 1,000 | 3.000 | 2 of 2 | 6 [4, 9] |" in told
    assert "There is no dense baseline" in told and "One seed of each setting" in told and "training, s" in told
    assert "_seed-0: prune: died" in told
    assert told.endswith(f"page: {tmp_path / 'out' / 'frontier.html'}\n")
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES
    assert {file.name for file in folder.iterdir()} == {"rows.jsonl"}


def test_nothing_to_draw_is_an_error_with_a_remedy(tmp_path, capsys):
    assert main(["frontier", str(write_rows(tmp_path))]) == 1
    assert "error: a sweep must hold a trained model, got none in" in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"rows.jsonl"}


def test_what_cannot_be_written_is_an_error(tmp_path, capsys):
    folder = write_rows(tmp_path / "s", model_rows(3.0, {"a": 4}))
    (tmp_path / "file").write_text("")
    assert main(["frontier", str(folder), "--out", str(tmp_path / "file")]) == 1
    assert "could not make" in capsys.readouterr().err


def test_the_same_rows_give_the_same_files(swept, tmp_path):
    write_frontier([swept], tmp_path)
    for name in FILES - {"frontier.html"}:
        assert (tmp_path / name).read_bytes() == (swept / name).read_bytes(), name
    before = (tmp_path / "frontier.html").read_bytes()
    write_frontier([swept], tmp_path)
    assert (tmp_path / "frontier.html").read_bytes() == before


def test_the_pictures_are_pictures(swept):
    assert (swept / "frontier.png").read_bytes().startswith(b"\x89PNG")
    texts = [node.text for node in ElementTree.parse(swept / "frontier.svg").iter() if node.tag.endswith("}text")]
    assert "held-out loss, nats per token" in texts
    for setting in data_of(swept)["settings"]:
        key = "model.d_model" if setting["dense"] else "sparsity.density"  # what varies along its line
        label = f"{key.rpartition('.')[2]}={setting['values'][key]}, {setting['n_reached']}/{setting['n_asked']}"
        assert label in texts
    assert any(text.startswith("d_model=") and "density=" in text for text in texts), "along lines of equal L0"
    assert {"dense", "on the front", "nonsense circuits", "lines of equal size", "lines of equal L0"} <= {*texts}


def test_what_is_published_makes_the_page_again(swept, tmp_path):
    (run,) = (swept / "points").iterdir()
    corpus = {"tokenizer_sha256": "a", "tokens": {"val": 9}}
    made = {
        run / "config.yaml": "run: {name: x, seed: 3}\nmodel: {d_model: 64}\n",
        run / "environment.json": json.dumps({key: key for key in (*MADE_ON, "platform")} | {"corpus": corpus}),
        swept / SWEEP: "name: frontier\ntasks: [all]\nprune: [target_loss=0.15]\nseeds: [0]\n",
    }
    for file, text in made.items():
        file.write_text(text)
    write_frontier([swept], tmp_path / "out", tmp_path / "results")
    for file in made:
        file.unlink()
    assert {f.name for f in (tmp_path / "results").iterdir()} == FILES - {"frontier.html"} | {
        "rows.jsonl", "configs.json"
    }  # fmt: skip
    configs = json.loads((tmp_path / "results" / "configs.json").read_text())
    environment = {f"environment.{key}": corpus if key == "corpus" else key for key in MADE_ON}
    assert configs == {
        "searches": [{"name": "frontier", "tasks": ["all"], "prune": ["target_loss=0.15"]}],
        "shared": {"run.seed": 3, "model.d_model": 64, **environment},
        "points": {f"made/{run.name}": {}},
    }
    write_frontier([tmp_path / "results"], publish=tmp_path / "results")
    assert json.loads((tmp_path / "results" / "configs.json").read_text()) == configs, "the runs are gone"
    again, first = (data_of(folder) for folder in (tmp_path / "results", swept))
    assert again["settings"] == first["settings"] and again["equal_capability"] == first["equal_capability"]


def test_sweeps_of_one_name_are_not_published_together(tmp_path):
    folders = [write_rows(tmp_path / of / "s", model_rows(3.0, {"a": 4})) for of in ("one", "two")]
    with pytest.raises(FrontierError, match="must have different names"):
        write_frontier(folders, tmp_path / "out", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_no_rows_of_a_sweep_are_published_over(tmp_path):
    a, b = (write_rows(tmp_path / name, model_rows(3.0, {"a": 4}, sweep=name)) for name in "ab")
    with pytest.raises(FrontierError, match="publish must be a folder of its own"):
        write_frontier([a, b], tmp_path / "out", b)
    (b / SWEEP).write_text("seeds: [0, 1]\n")
    with pytest.raises(FrontierError, match="whose rows.jsonl are a sweep's"):
        write_frontier([a], tmp_path / "out", b)
    write_frontier([a, a.parent / "." / "a", tmp_path / "b" / ".." / "a"], tmp_path / "out", tmp_path / "results")
    assert len(read_rows(tmp_path / "results")) == 1, "one folder in three spellings"


@pytest.mark.browser
def test_the_page_shows_every_setting_at_its_place(page, swept):
    found = data_of(swept)["settings"]
    points = columns(page, "points")
    assert points["x"] == pytest.approx([s["val_loss"] for s in found], rel=1e-4)
    assert points["y"] == pytest.approx([s["means"]["common"]["mean"] for s in found], rel=1e-4)
    assert points["marker"] == ["diamond" if s["dense"] else "circle" for s in found]
    labels, counts = columns(page, "labels")["text"], [f"{s['n_reached']}/{s['n_asked']}" for s in found]
    assert sorted(text.rpartition(", ")[2] for text in labels) == sorted(counts)
    assert f"density=0.0625, {counts[0]}" in labels
    assert len(columns(page, "rings")["x"]) == sum(s["means"]["common"]["pareto"] for s in found) > 0
    assert page.locator("#settings tbody tr").count() == len(found)
    assert page.locator("#factors tbody tr").count() == len(data_of(swept)["equal_capability"])
    assert "null" not in page.inner_text("body")


@pytest.mark.browser
def test_means_and_lines_can_be_chosen(page, swept):
    found = data_of(swept)["settings"]
    assert len(columns(page, "lines")["xs"]) == 3  # dense and two widths
    page.select_option("#way", "sparsity.density")
    assert page.locator("#legend .line").all_inner_texts() == ["dense", "d_model=64", "d_model=128"]
    page.select_option("#way", "l0")
    assert any("nonzeros" in text for text in page.locator("#legend .line").all_inner_texts())
    page.select_option("#mean", "bound")
    assert columns(page, "points")["y"] == pytest.approx([s["means"]["bound"]["mean"] for s in found], rel=1e-4)
    assert "the truth is not known" in page.inner_text("#meaning")
    page.wait_for_function("Bokeh.documents[0].get_model_by_name('labels').data.text.some((t) => t.includes('↑'))")
    assert columns(page, "intervals")["x0"] and not columns(page, "floors")["x"]
    page.uncheck("#intervals")
    page.check("#floors")
    assert not columns(page, "floors")["top"], "a bound has no floor"
    page.select_option("#mean", "own")
    own = [s["means"]["own"]["mean"] for s in found]
    assert columns(page, "floors")["top"] == pytest.approx([4 * mean for mean in own], rel=1e-4)
    assert not columns(page, "intervals")["x0"]


@pytest.mark.browser
def test_a_click_shows_the_runs_and_circuits_of_a_setting(page, swept):
    page.evaluate("document.getElementById('figure').scrollIntoView()")
    place = page.evaluate(
        """() => {
            const plot = Bokeh.documents[0].get_model_by_name("frontier");
            const view = Bokeh.index.find_one_by_id(plot.id);
            const { x, y } = Bokeh.documents[0].get_model_by_name("points").data;
            const canvas = view.canvas_view.el.getBoundingClientRect();
            return [canvas.x + view.frame.x_scale.compute(x[0]), canvas.y + view.frame.y_scale.compute(y[0])];
        }"""
    )
    page.mouse.click(*place)
    page.wait_for_selector("#chosen")
    first, second = [row for row in read_rows(swept) if row["reached"]][:2]
    assert page.inner_text("#chosen") == "d_model=64 density=0.0625"
    (run,) = (swept / "points").iterdir()
    links = page.locator("#panel a").evaluate_all("(found) => found.map((a) => a.getAttribute('href'))")
    assert links == [
        f"points/{run.name}/", f"points/{run.name}/config.yaml",
        f"points/{run.name}/circuits/{first['task']}/node_masks/circuit.html",
        f"points/{run.name}/circuits/{second['task']}/node_masks/",
    ]  # fmt: skip
    assert "`sparsetrain frontier --pages` writes their pages" in page.inner_text("#panel")
    assert "its run directory is not beside this page" in page.inner_text("#panel")
    assert "not reached: 0.400 is above the target" in page.inner_text("#panel")
    page.keyboard.press("Escape")
    page.wait_for_selector("#chosen", state="detached")
    page.click("#panel .row")
    page.wait_for_selector("#chosen")


@pytest.mark.browser
def test_models_that_miss_a_task_stand_at_the_upper_edge(open_page, tmp_path):
    models = [model_rows(3.0 + i / 10, {"a": 5 + i, "b": None}, width=i) for i in range(2)]
    folder = write_rows(tmp_path, *models, model_rows(4.0, {"a": None, "b": None}, width=9))
    write_frontier([folder])
    page = open_page(folder / "frontier.html")
    points = columns(page, "points")
    assert points["marker"] == ["circle", "circle", "inverted_triangle"]
    assert points["y"][2] > max(points["y"][:2])
    assert "0/2" in columns(page, "labels")["text"]


@pytest.mark.browser
def test_labels_of_a_crowd_hide_nothing(open_page, tmp_path):
    ruled_sweep(tmp_path, range(64, 144, 8), [0.5 * 0.9**i for i in range(12)], n_seeds=1, n_tasks=3)
    write_frontier([tmp_path])
    page = open_page(tmp_path / "frontier.html")
    labels, points = columns(page, "labels"), columns(page, "points")
    x0, x1, width, y0, y1, height = page.evaluate(
        """() => {
            const { x_range, y_range, inner_width, inner_height } = Bokeh.documents[0].get_model_by_name("frontier");
            return [x_range.start, x_range.end, inner_width, y_range.start, y_range.end, inner_height];
        }"""
    )

    def pixels(x, y):
        return (x - x0) / (x1 - x0) * width, (1 - math.log(y / y0) / math.log(y1 / y0)) * height

    boxes = [(a - 4, b - 4, a + 4, b + 4) for a, b in map(pixels, points["x"], points["y"])]
    n = len(boxes)
    for x, y, text, dx, dy, align in zip(*(labels[k] for k in ("x", "y", "text", "dx", "dy", "align")), strict=True):
        (a, b), long = pixels(x, y), 5.5 * len(text)  # a digit of the font is 6 wide
        left = a + dx - (long if align == "right" else 0)
        boxes.append((left, b + dy - 4, left + long, b + dy + 4))
    assert 10 < len(boxes) - n < 130
    for i, (l, t, r, m) in enumerate(boxes[n:], n):
        assert not any(l < r2 and l2 < r and t < m2 and t2 < m for l2, t2, r2, m2 in boxes[:i]), i


def test_a_moved_sweep_keeps_its_links(swept, tmp_path):
    """They are relative, so nothing of where it lay is in the page."""
    assert os.fspath(swept) not in (swept / "frontier.html").read_text()
