"""Files that are whole or absent, exact round trips, and refusals that say what is wrong."""

import json
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

import sparsetrain
from sparsetrain import checkpoint
from sparsetrain.checkpoint import CheckpointError, load_sparse, save_sparse


def test_sparse_tensors_are_stored_sparsely_and_read_back_exactly(tmp_path):
    sparse = torch.zeros(50, 40)
    sparse[3, 7], sparse[49, 39] = 1.5, -2e-30
    tensors = {"sparse": sparse, "dense": torch.randn(50, 40), "step": torch.tensor(3.0), "empty": torch.zeros(9, 9)}
    save_sparse(tmp_path / "t.safetensors", tensors)
    read = load_sparse(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert (tmp_path / "t.safetensors").stat().st_size < 50 * 40 * 4 + 1500


def test_equal_weights_make_equal_files_in_any_process(tmp_path):
    program = """
        import sys, torch
        from pathlib import Path
        from sparsetrain.checkpoint import save_sparse
        save_sparse(Path(sys.argv[1]), {"a": torch.ones(9), "b": torch.zeros(9)}, tokenizer="x", made="y", of="z")
    """
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for file in files:
        subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(file)], check=True)
    assert len({file.read_bytes() for file in files}) == 1


def test_a_truncated_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    save_sparse(path, {"a": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="must be a readable safetensors file"):
        load_sparse(path)
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="must have been written by this sparsetrain"):
        load_sparse(path)


def test_a_model_that_does_not_fit_lists_every_difference(tiny_run):
    model, _ = sparsetrain.load(tiny_run)
    tensors = model.state_dict()
    tensors["stranger"] = torch.zeros(1)
    tensors["norm.weight"] = torch.zeros(7)
    del tensors["bigram"]
    with pytest.raises(CheckpointError) as error:
        checkpoint.fill(model, tensors, tiny_run)
    for words in (
        "bigram is missing there",
        "stranger is unknown here",
        "norm.weight has shape (7,) there, (32,) here",
    ):
        assert words in str(error.value)


def test_load_gives_the_trained_model_from_the_run_or_a_copied_folder(tiny_run, tmp_path):
    model, tokenizer = sparsetrain.load(tiny_run)
    assert model.options.d_model == 32
    assert tokenizer.get_vocab_size() == model.vocab_size == 400
    shutil.copytree(tiny_run / "model", tmp_path / "elsewhere")
    again, _ = sparsetrain.load(tmp_path / "elsewhere")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_what_is_written_to_a_loaded_model_stays_out_of_its_file(tiny_run):
    model, _ = sparsetrain.load(tiny_run)
    before = (tiny_run / "model" / "model.safetensors").read_bytes()
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert (tiny_run / "model" / "model.safetensors").read_bytes() == before
    again, _ = sparsetrain.load(tiny_run)
    assert not (again.norm.weight == 7.0).any()


def test_load_falls_back_on_the_newest_checkpoint(tiny_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    shutil.rmtree(copy / "model")
    model, _ = sparsetrain.load(copy)
    finished, _ = sparsetrain.load(tiny_run)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), finished.parameters(), strict=True))
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(CheckpointError, match="must be a run directory with a model or a checkpoint"):
        sparsetrain.load(copy)


def test_a_damaged_checkpoint_is_refused_with_the_remedy(tiny_run, tmp_path):
    folder = tmp_path / "step"
    for damage in (
        lambda: (folder / "optimizer.safetensors").write_bytes(b"x" * 10),
        lambda: (folder / "model.safetensors").unlink(),
        lambda: (folder / "state.json").write_text("{"),
    ):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(checkpoint.latest_checkpoint(tiny_run), folder)
        damage()
        with pytest.raises(CheckpointError, match="delete .* to resume from the checkpoint before it"):
            checkpoint.read_state(folder)


def test_a_full_disk_leaves_the_last_checkpoint_and_no_debris(tiny, tmp_path):
    """A limit on file size makes real writes fail half way, as a full disk does."""
    program = f"""
        import resource, signal
        from sparsetrain.config import RunConfig, load_config
        from sparsetrain.train import train
        import sparsetrain.train as t
        arguments = {tiny!r} + ["run.name=full", "run.out={tmp_path}"]
        save, saved = t.checkpoint.save_checkpoint, []
        def save_once_then_fill(*args, **kwargs):
            if saved:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            saved.append(save(*args, **kwargs))
        t.checkpoint.save_checkpoint = save_once_then_fill
        train(load_config(RunConfig, arguments))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert "CheckpointError: could not write" in done.stderr
    left = sorted(p.name for p in (tmp_path / "full" / "checkpoints").iterdir())
    assert left == ["step_00000010"]
    state = json.loads((tmp_path / "full" / "checkpoints" / "step_00000010" / "state.json").read_text())
    assert state["step"] == 10


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "x"
    with checkpoint.whole_folder(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), checkpoint.whole_folder(target) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError
    assert (target / "a").read_text() == "old"
    with checkpoint.whole_folder(target) as folder:
        (folder / "b").write_text("new")
    assert [p.name for p in tmp_path.rglob("*")] == ["x", "b"]


def test_an_exchanged_tokenizer_is_refused(tiny_run, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(tiny_run / "model", copy)
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    with pytest.raises(CheckpointError, match="tokenizer.json is not the one .* was trained with"):
        sparsetrain.load(copy)


def test_the_package_offers_its_names_before_they_are_imported():
    assert set(sparsetrain.__all__) <= set(dir(sparsetrain))
