"""run.py: which layout a run has, and the run whose weights are in its order."""

import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sparsetrain
from sparsetrain import checkpoint
from sparsetrain.config import RunConfig, load_config
from sparsetrain.locality.measures import block_fill, mean_length
from sparsetrain.locality.positions import LocalityError, identity, plan_of, random_layout
from sparsetrain.locality.run import export_run, open_run
from sparsetrain.train import train


@pytest.fixture(scope="module")
def local_run(tiny, tmp_path_factory):
    """A run that was trained with locality."""
    out = tmp_path_factory.mktemp("local")
    on = ["locality.pressure=selection", "locality.relayout_every=5", "sparsity.anneal_stop=0.3"]
    return train(load_config(RunConfig, [*tiny, f"run.out={out}", "run.name=local", *on]))


def without_stops(run, at):
    """A copy of a run without checkpoints."""
    return shutil.copytree(run, at, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))


def test_a_finished_run_keeps_the_layout_it_was_trained_with(local_run, tmp_path):
    alone = open_run(without_stops(local_run, tmp_path / "alone"))
    last = checkpoint.load_sparse(checkpoint.latest_checkpoint(local_run) / "layout.safetensors")
    assert alone.kept is not None and alone.layout is alone.kept
    for name, slots in alone.kept.tensors().items():
        assert torch.equal(slots, last[name])
    assert mean_length(alone.edges, alone.layout) == pytest.approx(mean_length(alone.edges, open_run(local_run).layout))


def test_a_run_that_is_not_done_has_that_of_its_checkpoint(local_run, tmp_path):
    stopped = shutil.copytree(local_run, tmp_path / "stopped", ignore=shutil.ignore_patterns("model"))
    assert open_run(stopped).kept is not None


def test_a_run_without_locality_is_laid_out_afterwards_the_same_each_time(tiny_run):
    one, other = open_run(tiny_run), open_run(tiny_run)
    assert one.kept is None and not (tiny_run / "model" / "layout.safetensors").exists()
    assert mean_length(one.edges, one.layout) < 0.9 * mean_length(one.edges, identity(one.plan))
    assert all(torch.equal(t, other.layout.tensors()[name]) for name, t in one.layout.tensors().items())


def test_a_layout_of_another_architecture_or_a_damaged_one_is_refused(local_run, tmp_path):
    copied = without_stops(local_run, tmp_path / "copied")
    file = copied / "model" / "layout.safetensors"
    options = load_config(RunConfig, [str(copied / "config.yaml"), "model.d_model=48"]).model
    checkpoint.save_sparse(file, random_layout(plan_of(options, 400), 0).tensors())
    with pytest.raises(LocalityError, match=r"layout.safetensors: the layout does not fit.*\n.*residual must be"):
        open_run(copied)
    file.write_bytes(b"no tensors")
    with pytest.raises(checkpoint.CheckpointError, match="layout.safetensors must be a readable safetensors file"):
        open_run(copied)


@pytest.mark.parametrize("name", ["local_run", "tiny_run"])
def test_an_exported_run_is_the_same_function(name, request, tmp_path):
    run = request.getfixturevalue(name)
    folder = export_run(run, tmp_path / "exported")
    (before, tokenizer), (after, same_tokenizer) = sparsetrain.load(run), sparsetrain.load(folder)
    assert tokenizer.to_str() == same_tokenizer.to_str()
    tokens = torch.randint(before.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gap = (before.double()(tokens) - after.double()(tokens)).abs().max().item()
    assert gap < 1e-10
    assert not all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    laid, exported = open_run(run), open_run(folder)
    assert mean_length(exported.edges, exported.layout) == pytest.approx(mean_length(laid.edges, laid.layout))
    assert block_fill(exported.edges, identity(exported.plan), 4, 0.2) > block_fill(
        laid.edges, identity(laid.plan), 4, 0.2
    )
    assert (folder / "config.yaml").exists() and not (folder / "circuits").exists()


def test_an_export_replaces_nothing(tiny_run, tmp_path):
    with pytest.raises(LocalityError, match="must be a new one, got .*; name another"):
        export_run(tiny_run, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_training_draws_the_sheet_once_it_is_sparse(local_run, tiny_run):
    found = {}
    for run in (local_run, tiny_run):
        events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
        events.Reload()
        tags = events.Tags()["images"]
        found[run] = {tag: [(e.step, e.height > 300, e.width) for e in events.Images(tag)] for tag in tags}
    assert found[local_run] == {"locality/sheet": [(10, True, 480), (20, True, 480)]}
    assert found[tiny_run] == {}
