"""The config: round trips, overrides, and errors that name the key."""

from pathlib import Path

import pytest

from sparsetrain.config import (
    ConfigError,
    RunConfig,
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    describe_keys,
    known_keys,
    load_config,
)  # fmt: skip
from sparsetrain.prune_config import PruneConfig


def test_files_and_overrides_apply_in_order(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model:\n  d_model: 64\noptim:\n  lr: 1e-3\n")
    config = load_config(RunConfig, ["model.d_model=512", str(file), "model.abs_topk.q=0.5", "data.paths=[a, b]"])
    assert config.model.d_model == 64
    assert config.optim.lr == 1e-3
    assert config.model.abs_topk.q == 0.5
    assert config.data.paths == ["a", "b"]


def test_one_share_for_all_sites_applies_in_order_too(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model: {abs_topk: 0.5}\n")
    shares = vars(load_config(RunConfig, ["model.abs_topk.q=0.1", str(file), "model.abs_topk.k=0.75"]).model.abs_topk)
    assert {site: share for site, share in shares.items() if share != 0.5} == {"k": 0.75} and len(shares) == 8


@pytest.mark.parametrize("kind", [RunConfig, PruneConfig])
def test_yaml_and_dict_read_back_to_the_same_config(kind, tmp_path):
    config = load_config(kind, ["run.seed=3"] if kind is RunConfig else ["seed=3"])
    (tmp_path / "c.yaml").write_text(config_to_yaml(config))
    assert load_config(kind, [str(tmp_path / "c.yaml")]) == config
    assert config_from_dict(kind, config_to_dict(config)) == config


def test_choices_are_listed_once():
    with pytest.raises(ConfigError) as error:
        load_config(PruneConfig, ["metric=klx"])
    assert str(error.value).endswith("|projection, got 'klx'")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["model.d_modle=3"], "unknown key model.d_modle = 3; did you mean model.d_model?"),
        (["d_model=3"], "unknown key d_model = 3; did you mean model.d_model?"),
        (["optim.lr=abc"], "optim.lr must be float, got 'abc'"),
        (["model.activation=silu"], "model.activation must be gelu|gelu_tanh|relu, got 'silu'"),
        (["model.d_head=0"], "model.d_head must be at least 1, got 0"),
        (["model.abs_topk.q=1.5"], "model.abs_topk.q must be in [0, 1], got 1.5"),
        (["model.d_model=100"], "model.d_model must be a multiple of model.d_head = 16, got 100"),
        (["sparsity.density=0.001"], "sparsity.min_alive must be at most density x d_model = 0.256, got 4"),
        (["sparsity.anneal_start=0.9"], "sparsity.anneal_stop must be at least sparsity.anneal_start = 0.9, got 0.5"),
        (["data.source=hub"], "data.hub must name a Hugging Face data set"),
        (["data.source=text"], "data.paths must list files, folders or globs when data.source is text"),
        (["train.accumulate=7"], "train.batch_size must be a multiple of train.accumulate = 7, got 64"),
        (["train.steps=[1"], "train.steps must be a YAML value"),
        (["run.name=${foo}"], "run.name: Interpolation key 'foo' not found"),
        (["run.name=${foo"], "run.name must be a YAML value, got '${foo'"),
        (["train.steps=???"], "train.steps: "),
        (["model.abs_topk.q=0.001"], "model.abs_topk.q must keep at least one of 256 channels, got 0.001"),
        (["missing.yaml"], "cannot read the config missing.yaml"),
    ],
)
def test_errors_name_the_key_the_value_and_the_remedy(arguments, words):
    with pytest.raises(ConfigError) as error:
        load_config(RunConfig, arguments)
    assert words in str(error.value)


def test_an_interpolation_that_is_not_closed_is_an_error_of_its_file(tmp_path):
    (tmp_path / "half.yaml").write_text('model: {d_model: "${oc.env:X"}')
    with pytest.raises(ConfigError, match="cannot read the config .*half.yaml"):
        load_config(RunConfig, [str(tmp_path / "half.yaml")])


def test_every_config_of_the_repository_loads():
    folder = Path(__file__).parents[1] / "configs"
    assert load_config(PruneConfig, [str(folder / "quickstart-prune.yaml")]).target_loss == 0.05
    quickstart = str(folder / "quickstart.yaml")
    dense = load_config(RunConfig, [quickstart, str(folder / "quickstart-dense.yaml")])
    assert dense.model.abs_topk.mlp_act == dense.sparsity.density == 1
    assert dense.model.d_model == load_config(RunConfig, [quickstart]).model.d_model
    paper = load_config(RunConfig, [str(folder / "paper.yaml")])
    assert paper.train.steps * paper.train.batch_size * paper.model.n_ctx == pytest.approx(32e9, rel=1e-5)


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as error:
        load_config(RunConfig, ["model.d_modle=3", "optim.lr=abc", "train.steps=0"])
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("kind", [RunConfig, PruneConfig])
def test_help_describes_every_key(kind):
    text = describe_keys(kind)
    for key, f in known_keys(kind):
        assert f"  {key}=" in text
        assert f.metadata["help"] in text


def test_a_file_whose_path_has_an_equals_sign_is_a_file(tmp_path):
    file = tmp_path / "run.seed=1" / "x.yaml"
    file.parent.mkdir()
    file.write_text("run: {seed: 7}")
    assert load_config(RunConfig, [str(file)]).run.seed == 7


def test_an_override_may_be_longer_than_a_path_can_be():
    paths = [f"folder/{i}.py" for i in range(1000)]
    assert load_config(RunConfig, [f"data.paths=[{','.join(paths)}]"]).data.paths == paths
