"""The points of a sweep: which there are, where they live, and which are refused."""

import pytest

from sparsetrain import train
from sparsetrain.config import ConfigError, RunConfig, load_config
from sparsetrain.sweeping.identity import FREE, identity
from sparsetrain.sweeping.points import expand, with_values
from sparsetrain.sweeping.sweep_config import load_sweep

SMALL = "base=[model.d_model=32,model.d_head=8,sparsity.density=0.25]"


def expanded(*arguments):
    return expand(load_sweep([SMALL, *arguments]))


def test_the_grid_is_crossed_with_arms_and_seeds_seed_by_seed():
    found = expanded("grid.model.d_model=[32,64]", "grid.sparsity.density=[0.25,0.5]", "arms.a=[]",
                     "arms.b=[optim.lr=0.1]", "seeds=[3,4]")  # fmt: skip
    assert len(found) == 16 == len({p.folder for p in found})
    assert [p.seed for p in found] == [3] * 8 + [4] * 8
    one = found[7]
    assert (one.arm, one.values) == ("b", {"model.d_model": 64, "sparsity.density": 0.5})
    assert (one.config.model.d_model, one.config.sparsity.density, one.config.optim.lr) == (64, 0.5, 0.1)
    assert one.id.startswith("b_d_model-64_density-0.5_seed-3_")
    assert one.folder.parent.as_posix() == "sweeps/sweep/points"
    assert one.group == found[15].group != found[6].group


def test_values_have_the_type_of_their_key():
    (one,) = expanded("grid.sparsity.density=[1]", "seeds=[0]")
    assert isinstance(one.config.sparsity.density, float)
    assert one.config == load_config(RunConfig, [*_arguments(one), "sparsity.density=1"])


def _arguments(point):
    run = point.config.run
    return ["model.d_model=32", "model.d_head=8", f"run.name={run.name}", f"run.out={run.out}"]


def test_an_arm_that_sets_a_key_of_the_grid_is_not_crossed_with_it():
    found = expanded("grid.sparsity.density=[0.25,0.5]", "grid.model.d_model=[32,64]", "arms.a=[]",
                     "arms.dense=[sparsity.density=1]")  # fmt: skip
    assert [(p.arm, *p.values.values()) for p in found] == [
        ("a", 0.25, 32), ("a", 0.25, 64), ("a", 0.5, 32), ("a", 0.5, 64), ("dense", 1.0, 32), ("dense", 1.0, 64)
    ]  # fmt: skip


def test_dense_baselines_have_the_width_and_depth_of_their_arms_and_settings_of_their_own():
    found = expanded("grid.sparsity.density=[0.25,0.5]", "grid.model.d_model=[32,64]", "grid.model.abs_topk.q=[0.5]",
                     "arms.a=[model.n_layers=3]", "dense=[optim.lr=0.01]")  # fmt: skip
    dense = [p for p in found if p.arm == "a-dense"]
    assert len(found) == 6
    assert [p.config.model.d_model for p in dense] == [32, 64]
    for config in (p.config for p in dense):
        assert (config.model.n_layers, config.sparsity.density, config.optim.lr) == (3, 1, 0.01)
        assert config.model.abs_topk == load_config(RunConfig, ["model.abs_topk=1"]).model.abs_topk


def test_arms_that_differ_in_what_makes_them_sparse_share_their_dense_baselines():
    found = expanded("grid.model.d_model=[32,64]", "arms.plain=[]", "arms.local=[locality.pressure=proximal]",
                     "arms.deep=[model.n_layers=3]", "dense=[]")  # fmt: skip
    assert [p.arm for p in found] == [arm for arm in ("plain", "plain-dense", "local", "deep", "deep-dense")
                                      for _ in range(2)]  # fmt: skip


def test_dense_baselines_may_have_widths_of_their_own():
    """So that their losses overlap with those of sparse models, which are worse at equal width."""
    dense = "dense=['grid.model.d_model=[16,32]']"
    found = expanded("grid.sparsity.density=[0.25,0.5]", "grid.model.d_model=[64]", dense)
    assert [(p.arm, p.config.model.d_model) for p in found] == [("", 64), ("", 64), ("dense", 16), ("dense", 32)]
    assert found[2].values == {"sparsity.density": 1.0, "model.d_model": 16}


def test_the_share_of_all_sites_is_varied_as_one_key():
    found = expanded("grid.model.abs_topk=[0.5,0.25]", "arms.a=[]", "arms.one=[model.abs_topk=1]", "dense=[]")
    told = [(p.arm, p.values, *{*vars(p.config.model.abs_topk).values()}) for p in found]
    assert told == [("a", {"model.abs_topk": 0.5}, 0.5), ("a", {"model.abs_topk": 0.25}, 0.25),
                    ("a-dense", {"model.abs_topk": 1.0}, 1.0), ("one", {"model.abs_topk": 1.0}, 1.0)]  # fmt: skip
    assert found[0].id.startswith("a_abs_topk-0.5_seed-0_")
    [drawn] = expanded("samples.model.abs_topk=[uniform,0.2,0.4]", "n_samples=1")
    assert {*vars(drawn.config.model.abs_topk).values()} == {drawn.values["model.abs_topk"]}


def test_samples_are_drawn_from_their_seed_and_more_of_them_begin_alike():
    draw = ["samples.optim.lr=[log_uniform,1e-3,1e-1]", "samples.model.n_layers=[integer,1,9]"]
    three, five = (expanded(*draw, f"n_samples={n}") for n in (3, 5))
    assert [p.id for p in five[:3]] == [p.id for p in three]
    assert len({p.config.optim.lr for p in five}) == 5
    assert all(1e-3 <= p.config.optim.lr <= 1e-1 and 1 <= p.config.model.n_layers <= 9 for p in five)
    assert expanded(*draw, "n_samples=3", "sample_seed=1")[0].id != three[0].id


def test_draws_that_come_again_make_one_point_and_choices_are_of_the_values_given():
    found = expanded("samples.model.n_layers=[integer,1,3]", "n_samples=10")
    assert sorted(p.config.model.n_layers for p in found) == [1, 2, 3]
    found = expanded("samples.model.d_model=[choice,32,64,256]", "samples.sparsity.gradient=[choice,dense,candidates]",
                     "n_samples=30")  # fmt: skip
    assert len(found) == 6 == len({(p.config.model.d_model, p.config.sparsity.gradient) for p in found})


def test_a_point_is_found_again_however_it_is_written_and_wherever_it_is_computed():
    there = expanded("grid.optim.lr=[0.5]")[0].id
    assert expanded("grid.optim.lr=[0.5,0.7]", "out=elsewhere")[0].id == there
    assert expand(load_sweep([f"{SMALL[:-1]},run.device=cpu,run.threads=2]", "grid.optim.lr=[0.5]"]))[0].id == there
    assert expanded("grid.optim.lr=[0.50001]")[0].id != there


def test_threads_follow_the_cpus_of_a_point_where_they_are_not_set():
    many = ["grid.optim.lr=[0.5]", "engine.cpus=4"]
    assert expanded(*many)[0].config.run.threads is None  # serial: as it goes
    assert expanded(*many, "engine.kind=ray")[0].config.run.threads == 4
    set_by_hand = load_sweep([f"{SMALL[:-1]},run.threads=2]", *many, "engine.kind=slurm"])
    assert expand(set_by_hand)[0].config.run.threads == 2
    assert expand(set_by_hand)[0].id == expanded(*many)[0].id


def test_free_keys_are_those_that_a_resumed_run_may_change_but_for_evaluation():
    evaluation = {"train.eval_every", "train.eval_batches"}  # what val_loss is taken from
    assert set(FREE) == {"run.name", *train.FREE_ON_RESUME} - evaluation


def test_identity_says_what_is_not_default():
    config = with_values(RunConfig(), {"optim.lr": 0.5, "run.threads": 2})
    assert identity(config) == {"optim.lr": 0.5}


def test_the_base_may_need_what_varies():
    base = "base=[model.d_model=32,model.d_head=16,sparsity.density=0.1]"  # 3.2 weights, where min_alive is 4
    points = expand(load_sweep([base, "grid.sparsity.density=[0.25,0.5]", "dense=[]"]))
    assert [point.config.sparsity.density for point in points] == [0.25, 0.5, 1]
    with pytest.raises(ConfigError, match="density-0.05: sparsity.min_alive must be at most"):
        expand(load_sweep([base, "grid.sparsity.density=[0.05,0.5]"]))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["grid.model.d_modle=[1]"], "grid: unknown key model.d_modle = 1; did you mean model.d_model?"),
        (["grid.model.d_model=[0,x]"], "grid: model.d_model must be at least 1, got 0"),
        (["grid.model.d_model=[32,x]"], "grid: model.d_model must be int, got 'x'"),
        (["grid.model=[{d_model: 64},{d_model: 128}]"], "grid: model must be a single key of a run, got a section; wr"),
        (["grid.run.seed=[1]"], "run.seed must not be varied; use seeds"),
        (["arms.a=[model.d_head=7]"], "arms.a: model.d_model must be a multiple of model.d_head = 7, got 32"),
        (["grid.model.d_head=[7]"], "d_head-7: model.d_model must be a multiple of model.d_head = 7, got 32"),
        (["grid.optim.lr=[1]", "base=[nowhere.yaml]"], "base: cannot read the config nowhere.yaml"),
        (["arms.a=[]", "arms.b=[optim.beta1=0.9]"], "must differ from a_seed-0_"),
        (["grid.optim.lr=[1,1.0]"], "grid: optim.lr must have different values, got 1.0 twice"),
        (["arms.a b=[]", "arms.a_b=[]"], "two points must not share the directory"),
        (["grid.optim.lr=[1]", "samples.optim.lr=[uniform,0,1]", "n_samples=1"], "samples.optim.lr must not be in the"),
        (["grid.model.abs_topk=[0.5,2]"], "grid: model.abs_topk.attn_in must be in [0, 1], got 2"),
        (["grid.model.abs_topk=[0.5]", "grid.model.abs_topk.q=[1]"], "abs_topk.q must not be varied beside model.abs_"),
        (
            ["grid.model.abs_topk=[0.5]", "arms.a=[model.abs_topk.q=1]"],
            "arms.a: model.abs_topk must be set as a whole where it is varied, got its sites at [0.25, 1.0]",
        ),
    ],
)
def test_what_cannot_be_made_is_named(arguments, words):
    with pytest.raises(ConfigError) as error:
        expanded(*arguments)
    assert words in str(error.value)
