"""The house: imports point down, and importing costs little."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"kernels"},
    {"config", "files", "linear", "machine", "parallel", "task_fragments"},
    {"bridge_config", "data", "model", "prune_config", "task_encoding", "task_files", "task_language", "task_prompts"},
    {"sparsity", "checkpoint", "task_probing"},
    {"tasks"},
    {"candidates", "locality", "memory", "optim", "record", "threads"},
    {"loop"},
    {"step"},
    {"train", "pruning", "interop"},
    {"bench", "bridging"},
    {"sweeping"},
    {"analysis"},
    {"cli"},
    {"__main__", "__init__"},
]


def floor_of(part: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if part in floor)


def sources():
    for folder, prefix in (("sparsetrain", ""), ("kernels", "kernels"), ("analysis", "analysis")):
        for file in sorted((ROOT / folder).rglob("*.py")):
            inside = file.relative_to(ROOT / folder).parts
            if not prefix and inside[0] in ("kernels", "analysis"):
                continue  # the links; their folders are read on their own
            yield file, prefix or inside[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """The parts of this package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sparsetrain":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("sparsetrain.")}
    return found


def test_every_import_points_to_the_same_floor_or_down():
    wrong = [
        f"{file.relative_to(ROOT)} (floor {floor_of(part)}) imports {other} (floor {floor_of(other)})"
        for file, part in sources()
        for other in imported(file)
        if floor_of(other) > floor_of(part)
    ]
    assert not wrong, "\n".join(wrong)


def test_stages_do_not_import_each_other():
    for file, part in sources():
        if part in ("train", "pruning"):
            assert not imported(file) & ({"train", "pruning"} - {part}), file


def test_kernels_know_torch_alone():
    for file, part in sources():
        if part == "kernels":
            assert imported(file) <= {"kernels"}, file
            names = {
                name.split(".")[0]
                for node in ast.walk(ast.parse(file.read_text()))
                for name in (
                    [a.name for a in node.names] if isinstance(node, ast.Import)
                    else [node.module] if isinstance(node, ast.ImportFrom) else []
                )
            }  # fmt: skip
            assert names <= set(sys.stdlib_module_names) | {"torch", "triton", "numpy", "sparsetrain"}, file


def test_there_is_no_top_level_package_called_kernels():
    """It would shadow Hugging Face's `kernels`, and importing transformers would fail."""
    for folder in ("kernels", "analysis"):
        assert (ROOT / "sparsetrain" / folder).is_symlink()
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/").stdout.strip()
    assert not found.startswith(str(ROOT))


def test_importing_the_package_and_asking_for_help_need_no_torch():
    code = "import sys, sparsetrain, sparsetrain.cli; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_training_does_not_import_the_compiler_of_torch():
    code = "import sys, sparsetrain.train, sparsetrain.pruning.prune; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0, "it takes two seconds"
