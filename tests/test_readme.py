"""The README's commands are run, and its Python is executed, as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    commands = [line.split("#")[0].split() for block in blocks("sh") for line in block.splitlines()]
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
    named = re.findall(r"make (\w+)", README)
    assert {"demo", "test"} <= set(named)
    assert all(re.search(rf"^{name}:", makefile, re.M) for name in named)


def test_the_python_example_runs(tiny_run, place, monkeypatch):
    (code,) = blocks("python")
    monkeypatch.chdir(tiny_run.parent)
    code = code.replace("runs/quickstart/circuits", "absent").replace("runs/quickstart", tiny_run.name)
    code = code.replace("tokens = ...", "import torch; tokens = torch.zeros(1, 4, dtype=torch.int64)")
    before_circuit = code.split("circuit = ")[0]
    names: dict = {}
    exec(before_circuit, names)
    assert names["logits"].shape == (1, 4, 400)
    assert names["seen"]["blocks.1.mlp_act"].shape == (1, 4, 128)


def test_the_tree_names_what_is_there():
    tree = README.split("## The house")[1].split("```")[1]
    folder = ""
    for line in tree.strip().splitlines():
        names = re.findall(r"[\w/]+(?:\.py|\.c|\.md|\.yaml|/)", line.split("  ")[0] + " " + line[:20])
        if line[0] != " ":
            folder = names[0]
        for name in names:
            path = ROOT / name if line[0] != " " else ROOT / folder / name
            assert path.exists(), f"{path} is in the README's tree"
