"""Shared fixtures: a small real corpus, the config of a tiny model on it, and one trained run."""

import json
import os
import shutil
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when a module of kernels is imported

if TYPE_CHECKING:
    from sparsetrain.config import RunConfig  # imported where it is used: the kernels' tests need torch alone

torch.set_num_threads(1)

MODULES = ("argparse", "ast", "calendar", "csv", "dataclasses", "inspect", "pickle", "shutil", "textwrap", "typing")
SLOWEST = (
    "test_readme", "test_train", "test_sweep_ray", "test_compile", "test_triton_topk", "test_bridging", "test_parallel",
    "test_sweep_slurm", "test_prune", "test_sparse_linear", "test_sweep_run",
)  # fmt: skip
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
TINY = (
    "run.threads=1", "data.source=text", "data.vocab_size=400", "data.val_fraction=0.2", "model.n_layers=2",
    "model.d_model=32", "model.d_head=8", "model.n_ctx=32", "sparsity.density=0.25", "optim.lr=0.02",
    "train.steps=20", "train.batch_size=4", "train.eval_every=10", "train.eval_batches=2", "train.log_every=5",
    "train.checkpoint_every=10", "train.histogram_every=10",
)  # fmt: skip

DENSE = ["model.bigram=false", "sparsity.density=1", "optim.lr=0.01", "model.abs_topk=1"]


def pytest_collection_modifyitems(items):
    """The slowest files first, lest one process be left alone with them at the end."""
    order = {name: i for i, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=chromium, args=QUIET)
        yield running
        running.close()


@pytest.fixture
def open_page(browser):
    """A function that opens a page from its file; whatever the page asks for or complains about fails the test."""
    opened, wrong = [], []

    def open_file(file: Path, ready: str = "body[data-ready=yes]", width: int = 1200):
        tab = browser.new_page(viewport={"width": width, "height": 900})
        opened.append(tab)
        address = file.as_uri()
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        tab.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith(address) else None)
        tab.goto(address)
        tab.wait_for_selector(ready)
        return tab

    yield open_file
    assert wrong == []
    for tab in opened:
        tab.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> list[str]:
    """Arguments of a tiny run on ten modules of the standard library, in a folder of their own."""
    root = tmp_path_factory.mktemp("tiny")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    paths = ",".join(str(stdlib / f"{name}.py") for name in MODULES)
    return [*TINY, f"data.paths=[{paths}]", f"data.cache={root / 'data'}", f"run.out={root / 'runs'}"]


@pytest.fixture(scope="session")
def tiny_config(tiny) -> "RunConfig":
    from sparsetrain.config import RunConfig, load_config

    return load_config(RunConfig, tiny)


@pytest.fixture(scope="session")
def trained(tiny) -> Path:
    """A finished run; `tiny_run` is the copy to use."""
    from sparsetrain.config import RunConfig, load_config
    from sparsetrain.train import train

    return train(load_config(RunConfig, [*tiny, "run.name=shared"]))


@pytest.fixture(scope="module")
def tiny_run(trained, tmp_path_factory) -> Path:
    """A finished run, which the tests of a module share: what they leave in it (circuits, pages) ends with them."""
    return Path(shutil.copytree(trained, tmp_path_factory.mktemp("runs") / trained.name))


@pytest.fixture(scope="module")
def sweep_place(tmp_path_factory):
    """A folder with a task that a tiny model does (bigrams know it), in which processes of sweeps run."""
    names = ("name", "path", "data", "value", "key", "line", "text", "file", "node", "code", "func", "args", "list")
    rows = [
        {"positive": f"    def {name}(self):\n        return self", "negative": f"    def {name}(self):\n        if",
         "positive_answer": ".", "negative_answer": " "}
        for name in [prefix + name for prefix in ("", "get_", "_") for name in names]
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder


@pytest.fixture(scope="module")
def sweep_base(tiny) -> list[str]:
    """What sweeps of tiny runs share."""
    shared = [item for item in tiny if not item.startswith("run.out=")]
    return [f"base={json.dumps(shared)}", "tasks=[mine.jsonl]"]


@pytest.fixture(scope="session")
def dense_run(tiny) -> Path:
    """A tiny dense run of plain norms and no AbsTopK, so that its residual can be rotated."""
    from sparsetrain.config import RunConfig, load_config
    from sparsetrain.train import train

    return train(load_config(RunConfig, [*tiny, *DENSE, "run.name=dense"]))


@pytest.fixture(scope="module")
def rotated_run(dense_run, tmp_path_factory):
    """The dense run's model in another basis of its residual stream, and that basis."""
    from sparsetrain import checkpoint

    model, _, _ = checkpoint.load_run(dense_run)
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    rotate_(model, rotation)
    folder = tmp_path_factory.mktemp("rotated") / "run"
    folder.mkdir()
    for name in ("config.yaml", "tokenizer.json"):
        (folder / name).write_bytes((dense_run / "model" / name).read_bytes())
    checkpoint.export_model(folder, model, (folder / "config.yaml").read_text())
    return folder, rotation


@torch.no_grad()
def rotate_(model, rotation):
    """Residuals become h @ rotation; the gains of the norms go into what reads through them."""
    model.embed.weight.copy_(model.embed.weight @ rotation)
    for block in model.blocks:
        for norm, reader, writer in (
            (block.attn.norm.resid, block.attn.qkv, block.attn.out),
            (block.mlp.norm.resid, block.mlp.up, block.mlp.out),
        ):
            fold_(norm, reader, rotation)
            writer.weight.copy_(rotation.T @ writer.weight)
            writer.bias.copy_(writer.bias @ rotation)
    fold_(model.norm, model.unembed, rotation)


def fold_(norm, reader, rotation):
    reader.weight.copy_(reader.weight * norm.weight @ rotation)
    norm.weight.fill_(1)
