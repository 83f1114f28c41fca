"""The config of a sweep: what it reads, and the answers to what it cannot use."""

import pytest

from sparsetrain.config import ConfigError
from sparsetrain.sweeping.points import expand
from sparsetrain.sweeping.sweep_config import load_sweep, sweep_to_yaml

TPE = ["samples.optim.lr=[uniform,0,1]", "n_samples=2", "search.sampler=tpe", "search.objective=val_loss"]


def test_files_and_overrides_give_grid_arms_and_samples(tmp_path):
    (tmp_path / "s.yaml").write_text(
        "base: configs/quickstart.yaml\n"
        "grid: {model: {d_model: [64, 128]}, sparsity.density: [0.1]}\n"
        "arms: {plain: [], far: [optim.lr=0.1]}\n"
        "samples: {optim.lr: [log_uniform, 1e-3, 1e-1]}\n"
        "n_samples: 2\n"
        "prune: [target_loss=0.3]\n"
    )
    read = load_sweep([str(tmp_path / "s.yaml"), "grid.sparsity.density=[0.2,0.4]", "arms.far=null", "name=mine"])
    assert read.options.name == "mine"
    assert read.options.base == ["configs/quickstart.yaml"]
    assert read.grid == {"model.d_model": [64, 128], "sparsity.density": [0.2, 0.4]}
    assert read.arms == {"plain": []}
    assert read.samples == {"optim.lr": ("log_uniform", 0.001, 0.1)}
    assert read.prune.target_loss == 0.3


def test_a_written_config_needs_none_of_the_files_that_it_was_made_of(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {d_model: 64}\noptim: {lr: 1e-05}\ndata: {paths: [a b, 'c=\"d']}\n")
    (tmp_path / "arm.yaml").write_text("locality: {pressure: loss}\n")
    given = [
        f"base=[{tmp_path}/base.yaml,run.threads=null]", f"arms.far=[{tmp_path}/arm.yaml]", "dense=[optim.lr=1e-2]",
        "grid.sparsity.density=[0.1,2e-1]", "samples.optim.eps=[log_uniform,1e-9,1e-1]", "n_samples=2",
    ]  # fmt: skip
    read = load_sweep(given)
    points = expand(read)
    written = tmp_path / "sweep.yaml"
    written.write_text(sweep_to_yaml(read))
    for file in ("base.yaml", "arm.yaml"):
        (tmp_path / file).unlink()
    again = load_sweep([str(written)])
    assert expand(again) == points and len(points) == 6
    assert sweep_to_yaml(again) == written.read_text()


def test_all_problems_are_told_at_once():
    arguments = [
        "grid.model.d_model=64", "grid.sparsity.density=[]", "arms.a.optim.lr=0.1", "arms.b=[[1]]", "sedes=[1]",
        "samples.optim.lr=[uniform,2,1]", "samples.optim.eps=[log_uniform,0,1]",
        "samples.model.d_model=[integer,1.5,3]", "samples.model.norm=[choice,rms,rms]", "samples.model.bias=[choice]",
    ]  # fmt: skip
    with pytest.raises(ConfigError) as error:
        load_sweep(arguments)
    told = str(error.value)
    assert "grid.model.d_model must be a list of at least one value, got 64" in told
    assert "grid.sparsity.density must be a list of at least one value, got []" in told
    assert "arms.a.optim.lr must be a list of FILE.yaml and KEY=VALUE, got 0.1; write an arm as NAME:" in told
    assert "arms.b must be a list of FILE.yaml and KEY=VALUE, got [[1]]" in told
    assert "unknown key sedes = [1]; did you mean seeds?" in told
    assert all(f"samples.{key} must be [uniform|" in told for key in
               ("optim.lr", "optim.eps", "model.d_model", "model.norm", "model.bias"))  # fmt: skip


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "a sweep must vary something"),
        (["grid={}", "seeds=[0,1]"], "grid must be a list of at least one value, got {}; name a key of a run"),
        (["seeds=[]"], "seeds must be different numbers"),
        (["seeds=[1,1]"], "seeds must be different numbers"),
        (["seeds=[0,1]", "name=a/b"], "name must be a folder's name"),
        (["seeds=[0,1]", "name=.."], "name must be a folder's name without a path, got '..'"),
        (["seeds=[0,1]", "out=a=b"], "out and name must be without ="),
        (["seeds=[0,1]", "tasks=[for_wile]"], "tasks must be built-in names"),
        (["seeds=[0,1]", "tasks=[lambdafunc]"], "the nearest names are lambda_func"),
        (["seeds=[0,1]", "tasks=[nowhere.jsonl]"], "got 'nowhere.jsonl'"),
        (["seeds=[0,1]", "tasks=[for_while,for_while]"], "got for_while twice"),
        (["seeds=[0,1]", "tasks=[all,FOLDER/for_while.jsonl]"], "got for_while twice"),
        ([*TPE, "arms.a=[optim.lr=0.1]"], "samples.optim.lr must not be set by an arm too"),
        (["seeds=[0,1]", "measures=[wiring]"], "measures must be written MODULE:FUNCTION, got 'wiring'"),
        (["seeds=[0,1]", "measures=[':']"], "measures must be written MODULE:FUNCTION, got ':'"),
        (["samples.optim.lr=[log_uniform,1e-3,.inf]", "n_samples=2"], "samples.optim.lr must be [uniform|"),
        (["seeds=[0,1]", "n_samples=2"], "n_samples must be at least 1 with samples and 0 without"),
        (["samples.optim.lr=[uniform,0,1]"], "n_samples must be at least 1"),
        (["seeds=[0,1]", "prune=[target_los=1]"], "prune: unknown key target_los = 1; did you mean target_loss?"),
        (["seeds=[0,1]", "train.steps=3"], "train.steps must be in the sweep's base: base=[..., train.steps=3]"),
        (["seeds=[0,1]", "target_loss=1"], "target_loss must be in the sweep's prune: prune=[..., target_loss=1]"),
        (["seeds=0,1"], "got '0,1'"),
        (["seeds=0,1"], "; write seeds=[A, B]"),
        (
            ["grid.optim.lr=[1]", "dense=['grid.model.norm=[rms]']"],
            "dense: grid.model.norm must be in the sweep's grid",
        ),
        (["grid.optim.lr=[1]", "dense=[grid.optim.lr=2]"], "dense: grid.optim.lr must be a list of at least one value"),
        (["seeds=[0,1]", "engine.cpus=0"], "engine.cpus must be at least 1, got 0"),
        (["seeds=[0,1]", "engine.memory=0"], "engine.memory must be at least 0.1, got 0.0"),
        (["seeds=[0,1]", "engine.kind=rya"], "engine.kind must be serial|ray|slurm, got 'rya'"),
        (["seeds=[0,1]", "engine.at_ones=2"], "did you mean engine.at_once?"),
        (["seeds=[0,1]", "engine.kind=ray", "engine.gpus=2"], "engine.gpus must be in [0, 1], got 2"),
        (["seeds=[0,1]", "engine.kind=slurm", "engine.gpus=0.5"], "engine.gpus must be 0 or 1 with slurm, got 0.5"),
        (["seeds=[0,1]", "engine.address=ray://host"], "engine.address must be HOST:PORT, got 'ray://host'"),
        (["seeds=[0,1]", "engine.address=host"], "engine.address must be HOST:PORT, got 'host'"),
        (["seeds=[0,1]", "engine.sbatch=[exclusive]"], "engine.sbatch must be KEY=VALUE, got 'exclusive'"),
        (["nowhere.yaml"], "cannot read the config nowhere.yaml"),
    ],
)
def test_what_cannot_be_used_is_named(arguments, words, tmp_path):
    (tmp_path / "for_while.jsonl").touch()
    with pytest.raises(ConfigError) as error:
        load_sweep([argument.replace("FOLDER", str(tmp_path)) for argument in arguments])
    assert words in str(error.value)


def test_tasks_may_be_named_besides_all_and_be_made_for_any_modulus():
    assert load_sweep(["seeds=[0,1]", "tasks=[all,for_while,squares_mod_113]"]).options.tasks[2] == "squares_mod_113"


def test_a_dense_baseline_has_no_locality():
    points = expand(load_sweep(["base=[locality.pressure=proximal]", "grid.locality.strength=[1,2]", "dense=[]"]))
    assert [(p.arm, p.config.locality.pressure) for p in points] == [("", "proximal")] * 2 + [("dense", "none")]


def test_one_value_is_a_list_of_one():
    config = load_sweep(["seeds=3", "tasks=for_while", "base=train.steps=5", "grid.optim.lr=[1]"])
    assert (config.options.seeds, config.options.tasks, config.options.base) == ([3], ["for_while"], ["train.steps=5"])
