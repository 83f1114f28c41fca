"""The README's commands are run, and its Python is executed, as they stand there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparsetrain.config import load_config
from sparsetrain.prune_config import PruneConfig
from sparsetrain.pruning.prune import prune

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder as a clone has it."""
    here = tmp_path_factory.mktemp("clone")
    (here / "configs").symlink_to(ROOT / "configs")
    return here


def test_the_commands_run(place):
    commands = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    ours = [c[1:] for c in commands if c and c[0] == "sparsetrain"]
    assert len(ours) >= 4
    for arguments in ours:
        done = subprocess.run(
            [sys.executable, "-m", "sparsetrain", *arguments], cwd=place, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, (arguments, done.stderr)
        assert done.stdout, arguments


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"(?:^|`)make ([\w-]+)", README, re.M)
    assert {"demo", "test"} <= set(named)
    assert all(re.search(rf"^{name}:", makefile, re.M) for name in named)


def test_the_example_of_sparse_products_runs():
    (code,) = (block for block in blocks("python") if "sparse_linear" in block)
    names: dict = {}
    exec(code, names)
    assert names["y"].shape == (8, 512, 1024) and names["y"].mT.is_contiguous()


def test_the_python_example_runs(tiny_run, tmp_path, monkeypatch):
    (code,) = (block for block in blocks("python") if "sparsetrain.load" in block)
    shutil.copytree(tiny_run, tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    settings = ["node_masks.steps=5", "train_pairs=4", "heldout_pairs=4", "reference_tokens=64",
                "target_loss=9", "nonsense=false"]  # fmt: skip
    prune("runs/quickstart", "single_double_quote", load_config(PruneConfig, settings))
    code = code.replace("tokens = ...", "import torch; tokens = torch.zeros(1, 4, dtype=torch.int64)")
    names: dict = {}
    exec(code, names)
    assert names["logits"].shape == (1, 4, 400)
    assert names["seen"]["blocks.1.mlp_act"].shape == (1, 4, 128)
    assert names["circuit"].task == "single_double_quote"


def test_the_example_of_ranked_edges_runs(tiny_run, tmp_path, monkeypatch, capsys):
    (code,) = (block for block in blocks("python") if "attribution.rank" in block)
    shutil.copytree(tiny_run, tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert len(names["best"]) == 10
    assert str(names["best"][0]) in capsys.readouterr().out


def test_the_tree_is_the_house_in_both_directions():
    tree = README.split("## The house")[1].split("```")[1]
    named, folder, inside = set(), "", ""
    for line in tree.strip().splitlines():
        if line[0] != " ":
            folder = inside = line.split()[0]
        elif line[2] != " ":
            first = line.split()[0]
            inside = folder + first if first.endswith("/") else folder
        for name in re.findall(r"[\w/]+\.(?:py|c|md|yaml|js)\b", line):
            assert (ROOT / inside / name).exists(), f"{inside}{name} is in the README's tree"
            named.add(f"{inside}{name}")
    there = {
        str(file.relative_to(ROOT))
        for folder in ("kernels", "sparsetrain", "analysis")
        for file in (ROOT / folder).rglob("*.py")
        if not file.name.startswith("__") and not {"kernels", "analysis"} & set(file.relative_to(ROOT).parts[1:-1])
    }
    assert there <= named, f"missing in the README's tree: {sorted(there - named)}"
