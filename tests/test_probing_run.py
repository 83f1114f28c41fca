"""Circuit probing of a run directory, from the corpus of equations to the saved result."""

import dataclasses

import pytest
import torch

from sparsetrain.config import RunConfig, load_config
from sparsetrain.prune_config import ProbingOptions
from sparsetrain.pruning import probing, probing_run
from sparsetrain.pruning.circuit import CircuitError
from sparsetrain.task_probing import write_squares
from sparsetrain.tasks import TaskError
from sparsetrain.train import train

OPTIONS = ProbingOptions(
    epochs=3, batch_size=40, train_pairs=60, heldout_pairs=60, random_sets=2, count_penalty=1e-4, ablation="mean_data"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of a^2 - b^2 mod 11 that is far from trained."""
    root = tmp_path_factory.mktemp("modular")
    write_squares(root, 11)
    config = load_config(RunConfig, [
        "configs/modular.yaml", f"data.paths=[{root / 'equations.jsonl'}]", f"data.tokenizer={root / 'tokenizer.json'}",
        f"data.cache={root / 'data'}", f"run.out={root / 'runs'}", "run.threads=1", "model.d_model=16",
        "model.d_head=4", "train.steps=5", "train.batch_size=16", "train.eval_batches=1", "train.checkpoint_every=5",
    ])  # fmt: skip
    return train(config)


def test_a_result_with_its_controls_is_saved_and_read_back(run):
    found = probing_run.probe_run(run, "squares_mod_11", OPTIONS)
    folder = run / "circuits" / "squares_mod_11" / "probing" / "a_squared.blocks.0.attn"
    assert sorted(f.name for f in folder.iterdir()) == ["masks.safetensors", "probing.json"]
    assert list(folder.parent.iterdir()) == [folder], "the states of the searches are gone"
    assert set(found.controls) == {"a_squared, shuffled", "sum", "difference"}
    assert found.measures["n_all"] == 64 and found.measures["n_neurons"] == len(found.neuron_names())
    assert found.measures["n_prompts"] > 40 and found.measures["knn_chance"] == pytest.approx(1 / 6)
    assert found.settings["probing"] == dataclasses.asdict(OPTIONS)
    again = probing_run.load_probing(folder)
    assert all(torch.equal(again.tau[site], found.tau[site]) for site in found.tau)
    assert dataclasses.replace(again, tau={}) == dataclasses.replace(found, tau={})


def test_a_control_whose_labels_are_of_no_use_is_skipped_and_says_why(run, caplog):
    found = probing_run.probe_run(run, "squares_mod_11", dataclasses.replace(OPTIONS, train_pairs=20, ablation="zero"))
    assert set(found.controls) == {"a_squared, shuffled", "sum", "difference"}
    assert "every value of sum must have at least 2 training prompts" in found.controls["sum"]["skipped"]
    assert "the control sum is skipped" in caplog.text
    assert "n_neurons" in found.controls["difference"], "another control is searched for all the same"


def test_a_run_of_searches_that_was_killed_goes_on(run, monkeypatch):
    options = dataclasses.replace(OPTIONS, variable="minus_b_squared", ablation="zero")
    whole = probing_run.probe_run(run, "squares_mod_11", options)
    save, saved = probing._Search.save, []

    def killed(self, path, identity):
        save(self, path, identity)
        saved.append(path.name)
        if len(saved) == 5:  # in the first control
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(probing._Search, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            probing_run.probe_run(run, "squares_mod_11", options)
    steps = []
    with monkeypatch.context() as m:
        m.setattr(probing._Search, "save", lambda self, path, identity: steps.append(path.name))
        resumed = probing_run.probe_run(run, "squares_mod_11", options)
    assert saved[:3] == ["search.safetensors"] * 3
    assert len(steps) == 4 * OPTIONS.epochs - 5
    assert dataclasses.replace(resumed, tau={}) == dataclasses.replace(whole, tau={})
    assert all(torch.equal(resumed.tau[site], whole.tau[site]) for site in whole.tau)


def test_an_unknown_task_and_a_damaged_result_say_so(run, tmp_path):
    with pytest.raises(TaskError, match="task must be one whose prompts have known variables"):
        probing_run.probe_run(run, "with_as", OPTIONS)
    with pytest.raises(CircuitError, match=r"must hold probing.json and masks.safetensors"):
        probing_run.load_probing(tmp_path)
    found = probing_run.Probing("t", "v", "blocks.0.mlp", {"blocks.0.mlp_act": torch.tensor([1.0, -1.0])}, {})
    probing_run.save_probing(tmp_path / "one", found)
    assert probing_run.load_probing(tmp_path / "one").neuron_names() == ["blocks.0.mlp_act:0"]
    (tmp_path / "one" / "probing.json").write_text('{"format": "sparsetrain-probing-1"}')
    with pytest.raises(CircuitError, match="holds a damaged result: KeyError"):
        probing_run.load_probing(tmp_path / "one")
