"""Two runs side by side: losses worked out another way, circuits, refusals, and the page."""

import json
import shutil
from functools import cache

import numpy as np
import pytest
import torch

from sparsetrain.analysis.compare import _names, compare
from sparsetrain.analysis.compare_losses import Side, on_documents
from sparsetrain.checkpoint import load_run, run_corpus
from sparsetrain.cli import main
from sparsetrain.config import RunConfig, load_config
from sparsetrain.train import train

SMALL = [
    "run.threads=1", "data.source=text", "data.val_fraction=0.4", "model.n_layers=1", "model.d_model=16",
    "model.d_head=8", "model.n_ctx=16", "sparsity.density=0.5", "train.batch_size=2", "train.eval_batches=1",
    "train.steps=2", "train.eval_every=2", "train.checkpoint_every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def compared(tiny_run, dense_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    return compare(tiny_run, dense_run, folder)[0]


@pytest.fixture(scope="module")
def found(compared):
    return json.loads((compared / "compare.json").read_text())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A function that trains a tiny run on many short texts, some arguments changed."""
    root = tmp_path_factory.mktemp("written")
    for folder, word in (("texts", "square"), ("others", "second power")):
        (root / folder).mkdir()
        for i in range(60):
            text = f"number {i} is {'odd' if i % 2 else 'even'},\nand {i * i} its {word}\n"
            (root / folder / f"{i}.txt").write_text(text * 3)

    @cache
    def make(name: str, *arguments: str):
        data = [f"data.paths=[{root / 'texts'}]", f"data.cache={root / 'data'}", "data.vocab_size=300"]
        run = [f"run.out={root / 'runs'}", f"run.name={name}"]
        return train(load_config(RunConfig, [*SMALL, *data, *run, *[a.replace("ROOT", str(root)) for a in arguments]]))

    return make


def losses_of(run):
    """Of every token after the first of each window of 32, one window at a time."""
    model, _, config = load_run(run)
    tokens = np.asarray(run_corpus(run, config).tokens("val")).astype(np.int64)
    starts = np.linspace(0, len(tokens) - 33, min(2048, (len(tokens) - 1) // 32)).astype(np.int64)
    rows = torch.from_numpy(tokens[starts[:, None] + np.arange(33)])
    with torch.no_grad():
        logs = torch.cat([model(part[:, :-1]).log_softmax(-1) for part in rows.split(100)])
    return rows[:, 1:], -logs.gather(-1, rows[:, 1:, None])[..., 0].double()


def test_differences_are_those_of_each_token(found, tiny_run, dense_run):
    (tokens, a), (_, b) = losses_of(tiny_run), losses_of(dense_run)
    d = b - a
    read = found["losses"]
    assert read["unit"] == "token" and read["n_units"] == d.numel() and read["n_groups"] == len(d)
    assert (read["a"], read["b"]) == (pytest.approx(a.mean().item()), pytest.approx(b.mean().item()))
    assert read["difference"] == pytest.approx(d.mean().item(), abs=1e-7)
    assert read["se"] == pytest.approx((d.mean(1).std() / len(d) ** 0.5).item(), rel=1e-4)
    assert read["b_better"] == pytest.approx((d < 0).double().mean().item(), abs=1e-3)
    assert sum(read["histogram"]["shares"]) == pytest.approx(1)
    tokenizer = load_run(tiny_run)[1]
    adds = {tokenizer.decode([t], skip_special_tokens=False): d[tokens == t].sum().item() / d.numel()
            for t in tokens.unique().tolist()}  # fmt: skip
    assert read["tokens"][0]["adds"] == pytest.approx(max(adds.values()), rel=1e-4)
    for token in read["tokens"]:
        assert token["adds"] == pytest.approx(adds[token["text"]], rel=1e-4)
        assert token["mean"] * token["n"] / d.numel() == pytest.approx(token["adds"], rel=1e-6)
        for example in token["examples"]:
            assert example["tokens"][-1] == token["text"]
            assert example["differences"][-1] == pytest.approx(example["b"] - example["a"], abs=1e-3)
    greatest = d[tokens == next(t for t in tokens.unique() if tokenizer.decode([int(t)]) == read["tokens"][0]["text"])]
    first = read["tokens"][0]["examples"][0]
    assert first["b"] - first["a"] == pytest.approx(greatest.max().item(), rel=1e-4)


def test_weights_cost_and_settings_stand_side_by_side(found, tiny_run, dense_run):
    summaries = [json.loads((run / "summary.json").read_text()) for run in (tiny_run, dense_run)]
    assert [n for n, _ in found["weights"]["all"]] == [summary["n_nonzero"] for summary in summaries]
    assert found["weights"]["all"][1][0] == found["weights"]["all"][1][1]
    assert found["cost"]["seconds"] == [summary["seconds"] for summary in summaries]
    assert found["settings"]["sparsity.density"] == [0.25, 1.0]
    assert not any(key.startswith("run.") for key in found["settings"])


def circuit(run, task, name, **measures):
    folder = run / "circuits" / task / name
    folder.mkdir(parents=True)
    shared = {"graph": "channel", "target_loss": 0.15, "n_nodes": 4, "n_edges": 10, "task_loss": 0.1}
    (folder / "metrics.json").write_text(json.dumps(shared | measures))


def test_circuits_are_paired_by_task_and_name(tiny_run, tmp_path):
    a, b = (shutil.copytree(tiny_run, tmp_path / name) for name in "ab")
    circuit(a, "one", "acdc")
    circuit(b, "one", "acdc", n_edges=25)
    circuit(a, "two", "acdc")
    circuit(b, "two", "acdc", target_loss=0.3)
    circuit(a, "three", "acdc")
    circuit(b, "three", "acdc", target_loss=0.5)  # found before the search that missed
    missed = {"best_loss": 0.4, "target_loss": 0.15, "why": "", "task": "three", "full_model_loss": 0.3}
    (b / "circuits/three/acdc/unreached.json").write_text(json.dumps(missed))
    circuit(a, "one", "mine")
    circuit(a, "one", "acdc-checkpoints/step_1")
    folder, text = compare(a, b, tmp_path / "out")
    rows = {(row["task"], row["name"]): row for row in json.loads((folder / "compare.json").read_text())["circuits"]}
    assert len(rows) == 4
    assert rows["one", "acdc"]["factor"] == 2.5
    assert rows["two", "acdc"]["factor"] is None and "not comparable: target_loss differ" in text
    assert rows["three", "acdc"]["b"]["task_loss"] == 0.4 and "B missed the target" in text
    assert rows["one", "mine"]["b"] is None and "B was not pruned" in text
    assert "B - A +0.0000" in text


@pytest.mark.parametrize(
    "a, b, names", [("a/x", "b/y", ["x", "y"]), ("a/x", "b/x", ["a_x", "b_x"]), ("a/p/x", "b/p/x", ["a_x", "b_x"])]
)
def test_runs_of_one_name_are_told_apart_by_what_differs_in_their_paths(tmp_path, a, b, names):
    assert _names(tmp_path / a, tmp_path / b) == names


def test_the_command_writes_beside_it_and_says_it(tiny_run, dense_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(tiny_run), str(dense_run)]) == 0
    told = capsys.readouterr().out
    assert "held-out loss, nats per token: A " in told and "Tokens that add most to the difference" in told
    assert told.endswith("page: comparisons/shared-dense/compare.html\n")
    before = (tmp_path / "comparisons/shared-dense/compare.html").read_bytes()
    assert main(["compare", str(tiny_run), str(dense_run), "--out", "again"]) == 0
    assert (tmp_path / "again/compare.html").read_bytes() == before


def test_other_tokenizers_are_compared_by_the_bytes_of_the_same_documents(written, tmp_path):
    runs = written("few"), written("more", "data.vocab_size=330")
    folder, text = compare(*runs, tmp_path)
    read = json.loads((folder / "compare.json").read_text())["losses"]
    assert "their tokens differ, so losses are per byte of the same documents" in text
    assert read["unit"] == "byte" and 10 < read["n_groups"] < 40
    for run, loss in zip(runs, (read["a"], read["b"]), strict=True):
        model, tokenizer, config = load_run(run)
        tokens = torch.from_numpy(np.asarray(run_corpus(run, config).tokens("val")).astype(np.int64))
        n = (len(tokens) - 1) // 16
        logs = model(tokens[: n * 16].view(n, 16)).log_softmax(-1).detach().flatten(0, 1)
        each = -logs.gather(-1, tokens[1 : n * 16 + 1, None])[:, 0]
        ends = (tokens[1 : n * 16 + 1] == 0).nonzero().flatten()[: read["n_groups"] + 1]
        n_bytes = len(tokenizer.decode(tokens[ends[0] + 1 : ends[-1] + 1].tolist()).encode())
        assert n_bytes == read["n_units"]
        assert loss == pytest.approx(each[ends[0] + 1 : ends[-1] + 1].sum().item() / n_bytes, rel=1e-4)
    worst = read["documents"][0]
    assert worst["text"].startswith("number ") and "Documents that differ most" in text
    assert "histogram" not in read and "in context" not in (folder / "compare.html").read_text()


def test_a_tokenizer_that_is_named_by_its_file_is_the_same(written, tmp_path):
    run = written("few")
    folder, _ = compare(run, written("named", f"data.tokenizer={run / 'tokenizer.json'}", "run.seed=1"), tmp_path)
    assert json.loads((folder / "compare.json").read_text())["losses"]["unit"] == "token"


def test_the_error_of_a_ratio_is_the_spread_of_documents(written):
    run = written("few")
    model, tokenizer, config = load_run(run)
    side = Side("x", model, tokenizer, config, run_corpus(run, config))
    same = on_documents(side, side)
    assert (same["difference"], same["se"]) == (0, 0)
    model_b = load_run(run)[0]
    with torch.no_grad():
        model_b.unembed.weight.mul_(0)
    read = on_documents(side, Side("y", model_b, tokenizer, config, side.corpus))
    assert read["difference"] == pytest.approx(read["b"] - read["a"])
    assert 0 < read["se"] < 0.2 * abs(read["b"])


def test_what_cannot_be_compared_is_refused(tiny_run, written, tmp_path, capsys):
    def refused(a, b, words):
        assert main(["compare", str(a), str(b), "--out", str(tmp_path / "out")]) == 1
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    few = written("few")
    refused(few, written("others", "data.paths=[ROOT/others]"), "must have the same held-out text, got other documents")
    refused(few, written("split", "data.val_fraction=0.2"), "train both with the same data.source")
    refused(tiny_run, few, "got none that ends in the first 65536 tokens of each")
    refused(tiny_run, tmp_path, "must be a run directory with a model or a checkpoint, got none there")
    without = shutil.copytree(tiny_run, tmp_path / "imported")
    for file in (without / "config.yaml", without / "model" / "config.yaml"):
        file.write_text(file.read_text().replace("source: text", "source: none"))
    refused(without, tiny_run, "data.source must name a corpus, got none")


@pytest.mark.browser
def test_the_page_opens_and_shows_tokens_in_context(open_page, compared, found):
    page = open_page(compared / "compare.html")
    shares = page.evaluate("Array.from(Bokeh.documents[0].get_model_by_name('differences').data.top)")
    assert shares == pytest.approx(found["losses"]["histogram"]["shares"])
    titles = page.locator("h2").all_inner_texts()
    assert titles == ["Tokens that add most to the difference", "Cost", "Settings that differ", "Nonzero weights"]
    assert page.locator("#contexts details").count() == len(found["losses"]["tokens"])
    page.locator("#contexts summary").first.click()
    assert page.locator("#contexts details").first.locator(".token.peak").count() == 3
