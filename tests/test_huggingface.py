"""Imported GPT-2 models: the same logits as in transformers, run directories like ours, and clear refusals."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import sparsetrain
from sparsetrain import checkpoint
from sparsetrain.checkpoint import CheckpointError
from sparsetrain.cli import main
from sparsetrain.config import ConfigError
from sparsetrain.data import DataError, train_tokenizer
from sparsetrain.interop.huggingface import import_gpt2
from sparsetrain.prune_config import AttributionOptions, ProbingOptions, PruneConfig
from sparsetrain.pruning.ablation import build_ablation
from sparsetrain.pruning.component_graph import ComponentGraph
from sparsetrain.pruning.edges import all_answer_logits
from sparsetrain.pruning.measures import full_model_logits, score_tasks
from sparsetrain.pruning.probing_run import probe_run
from sparsetrain.pruning.prune import prune
from sparsetrain.tasks import TASKS, encode_task

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

SMALL = {
    "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 24, "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SHAPES = {
    "small": SMALL,
    "untied": {**SMALL, "tie_word_embeddings": False},
    "wide-mlp": {**SMALL, "n_inner": 64, "n_head": 1, "activation_function": "gelu"},
    "relu": {**SMALL, "n_embd": 30, "n_head": 5, "n_layer": 3, "activation_function": "relu"},
    "epsilon": {**SMALL, "layer_norm_epsilon": 0.1, "vocab_size": 1001},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["for x in y: pass\nwhile x: return True\n" * 9]), 280)


def save(folder, tokenizer, options, **how):
    """A checkpoint as transformers writes it, of a model none of whose parameters is as it was at first."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, **how)
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


@pytest.fixture
def theirs(tmp_path, tokenizer):
    """A model, in the folder `theirs`."""
    return save(tmp_path / "theirs", tokenizer, SMALL)


@torch.no_grad()
def check_logits(model, run, atol=1e-4):
    n_tokens, n_ctx = model.config.vocab_size, model.config.n_positions
    tokens = torch.randint(n_tokens, (3, n_ctx), generator=torch.Generator().manual_seed(1))
    expected = model(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(sparsetrain.load(run)[0](tokens), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(shape, tmp_path, tokenizer):
    model = save(tmp_path / "theirs", tokenizer, SHAPES[shape])
    check_logits(model, import_gpt2(tmp_path / "theirs", tmp_path / "run"))


def test_a_checkpoint_in_parts(tmp_path, tokenizer):
    model = save(tmp_path / "theirs", tokenizer, SMALL, max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    check_logits(model, import_gpt2(tmp_path / "theirs", tmp_path / "run"))


def test_an_older_file_has_bare_names_and_masks(theirs, tmp_path):
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    mask = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
    save_file({**tensors, "h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(-1e4)}, file)
    check_logits(theirs, import_gpt2(tmp_path / "theirs", tmp_path / "run"))


def test_half_precision_is_read_as_float32(theirs, tmp_path):
    theirs.half().save_pretrained(tmp_path / "theirs")
    check_logits(theirs.float(), import_gpt2(tmp_path / "theirs", tmp_path / "run"))


def test_a_name_is_looked_up_on_the_hub(theirs, tmp_path, monkeypatch):
    """In a cache such as the hub's client leaves; the tests have no network."""
    cached = tmp_path / "hub" / "models--some--model"
    shutil.copytree(tmp_path / "theirs", cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    check_logits(theirs, import_gpt2("some/model", tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"another/model must be a folder, or a Hugging Face repository that can"):
        import_gpt2("another/model", tmp_path / "other")


def test_a_run_has_a_dense_config_and_refuses_what_reads_a_corpus(theirs, tmp_path, tokenizer):
    run = import_gpt2(tmp_path / "theirs", tmp_path / "run")
    assert sorted(file.name for file in run.iterdir()) == ["config.yaml", "model.safetensors", "tokenizer.json"]
    assert checkpoint.read_notes(run / "model.safetensors")["imported_from"] == str(tmp_path / "theirs")
    model, read, config = checkpoint.load_run(run)
    assert read.get_vocab() == tokenizer.get_vocab() and config.run_dir == run
    assert not model.options.bigram and not model.options.sink and config.sparsity.density == 1
    assert {getattr(model.options.abs_topk, site) for site in vars(model.options.abs_topk)} == {1.0}
    with pytest.raises(
        DataError, match=r"data.source must name a corpus, got none.*mean_task, mean_position, zero, corru"
    ):
        checkpoint.run_corpus(run, config)
    (run / "model.safetensors").write_bytes(b"no weights, so that reading them fails otherwise")
    for kind in ("mean_data", "resample"):
        with pytest.raises(DataError, match="data.source must name a corpus"):
            prune(run, "ioi", PruneConfig(ablation=kind), "attribution")
    with pytest.raises(DataError, match="data.source must name a corpus"):
        probe_run(run, "subject_verb", ProbingOptions(ablation="mean_data"))
    with pytest.raises(ConfigError, match="must have a gradient at the full model, got zero from kl"):
        prune(
            run, "ioi", PruneConfig(ablation="zero", metric="kl", attribution=AttributionOptions("eap")), "attribution"
        )


@pytest.mark.parametrize("kind", ["zero", "mean_task", "mean_position", "corrupted"])
def test_circuits_of_a_run_need_no_corpus(kind, theirs, tmp_path):
    model, tokenizer, config = checkpoint.load_run(import_gpt2(tmp_path / "theirs", tmp_path / "run"))
    data = encode_task(TASKS["while_return_true"], tokenizer, 2, "train", 0, config.model.n_ctx, aligned=True)
    graph = ComponentGraph(model)
    ablation = build_ablation(graph.read, kind, [], data)
    kept = all_answer_logits(graph, data, graph.edges, ablation)
    torch.testing.assert_close(kept, full_model_logits(model, data), rtol=0, atol=1e-4)


def test_the_command_makes_a_run_whose_tasks_can_be_listed(theirs, tmp_path, capsys):
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "run")]) == 0
    first, advice = capsys.readouterr().out.splitlines()
    assert first == f"run directory: {tmp_path / 'run'}" and "no corpus came with it" in advice
    (score,) = score_tasks(tmp_path / "run", 2, names=["while_return_true"])
    assert score.loss > 0
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "run")]) == 1
    assert "error: the run directory must be a new one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False, got True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn must be False, got True"),
        ({"scale_attn_weights": False}, "scale_attn_weights must be True, got False"),
        ({"add_cross_attention": True}, "add_cross_attention must be False, got True"),
        ({"n_inner": 100}, "n_inner must be a multiple of n_embd = 32, got 100"),
        ({"n_head": 5}, "n_embd must be a multiple of n_head = 5, got 32"),
        ({"n_head": 0}, "n_head must be a whole number above 0, got 0"),
        ({"activation_function": "silu"}, "activation_function must be one of gelu_new, .*, got silu"),
        (
            {"model_type": "llama", "n_layer": "2"},
            "model_type must be gpt2, got llama\n  n_layer must be a whole number",
        ),
        ({"tie_word_embeddings": False}, "does not fit this model:\n  unembed.weight is missing there"),
        ({"n_layer": 1}, "blocks.1.attn.norm.resid.weight is unknown here"),
        ({"n_positions": 25}, r"positions.weight has shape \(24, 32\) there, \(25, 32\) here"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_imported_is_refused_and_leaves_nothing(change, words, theirs, tmp_path):
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=words):
        import_gpt2(tmp_path / "theirs", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "{", "config.json must be readable JSON"),
        ("config.json", "[1]", "config.json must hold a JSON object, got a list"),
        ("config.json", None, "must hold config.json, got none there"),
        ("tokenizer.json", "{}", "must be a readable tokenizer.json"),
        ("tokenizer.json", None, "must hold tokenizer.json, got none there; transformers' AutoTokenizer"),
        ("model.safetensors", "x", "must be a readable safetensors file"),
        ("model.safetensors", None, "must hold model.safetensors, got none there; pickles .* are not read"),
    ],
)
def test_missing_and_damaged_files_are_named(name, content, words, theirs, tmp_path):
    (tmp_path / "theirs" / "pytorch_model.bin").write_bytes(b"")
    file = tmp_path / "theirs" / name
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(CheckpointError, match=words):
        import_gpt2(tmp_path / "theirs", tmp_path / "run")


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path, tokenizer):
    save(tmp_path / "theirs", tokenizer, {**SMALL, "vocab_size": 270})
    with pytest.raises(CheckpointError, match="must have tokens below 270, the rows of the model's embedding, got 2"):
        import_gpt2(tmp_path / "theirs", tmp_path / "run")
