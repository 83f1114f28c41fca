"""Dense models as they are loaded, and whether two models have the same tokens."""

import logging
import sys

import pytest
import torch
from dense_models import close, random_tokens, theirs
from tokenizers import AddedToken, Tokenizer, normalizers

from sparsetrain.bridging.dense import OwnModel, load_dense
from sparsetrain.bridging.residuals import BridgeError
from sparsetrain.bridging.same_tokens import same_tokens
from sparsetrain.checkpoint import CheckpointError
from sparsetrain.config import ModelOptions
from sparsetrain.data import train_tokenizer
from sparsetrain.model import Transformer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["for x in y: pass\nwhile x: return True\n" * 9]), 280)


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A folder as transformers writes it, with a tokenizer."""
    theirs("llama").save_pretrained(tmp_path / "theirs")
    tokenizer.save(str(tmp_path / "theirs" / "tokenizer.json"))
    return tmp_path / "theirs"


def test_a_folder_of_transformers_is_loaded(folder, tokenizer):
    model = load_dense(folder)
    tokens = random_tokens(2)
    close(model.run(tokens)[1], theirs("llama")(tokens).logits.detach())
    assert model.tokenizer.get_vocab() == tokenizer.get_vocab() and model.n_ctx == 40


def test_half_precision_files_are_loaded_as_float32_and_it_is_said(folder, caplog):
    with caplog.at_level(logging.INFO, "sparsetrain"):
        load_dense(folder)
        assert "float32" not in caplog.text
        theirs("llama").bfloat16().save_pretrained(folder)
        assert {p.dtype for p in load_dense(folder).model.parameters()} == {torch.float32}
    assert f"{folder} is in bfloat16; it is loaded as float32" in caplog.text


def test_a_run_of_ours_is_loaded_frozen(tiny_run):
    for source in (tiny_run, tiny_run / "model"):
        model = load_dense(source)
        assert isinstance(model, OwnModel) and not any(p.requires_grad for p in model.model.parameters())
    assert model.vocab_size == 400 and model.n_ctx == 32


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("tokenizer.json", CheckpointError, "must hold tokenizer.json, got none there; transformers' AutoTokenizer"),
        ("model.safetensors", BridgeError, "must hold a causal language model of Hugging Face in safetensors, got: "),
        ("config.json", BridgeError, "must hold a causal language model of Hugging Face in safetensors, got: "),
    ],
)
def test_missing_files_are_named(name, error, words, folder):
    (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(error, match=words):
        load_dense(folder)


def test_missing_weights_are_not_drawn_at_random(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BridgeError, match="must hold all weights of LlamaForCausalLM, got none of model.layers.1.mlp"):
        load_dense(folder)


def test_transformers_is_asked_for_by_its_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BridgeError, match=r"needs transformers, got .*; pip install 'sparsetrain\[hf\]'"):
        load_dense(folder)


def own_with(tokenizer: Tokenizer, n_logits: int) -> OwnModel:
    options = ModelOptions(n_layers=1, d_model=8, d_head=8, n_ctx=8)
    return OwnModel(Transformer(options, n_logits, torch.Generator().manual_seed(0)), tokenizer)


def copy_of(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer.to_str())


def test_the_same_tokens_and_their_common_logits(tokenizer):
    a = own_with(tokenizer, 280)
    assert same_tokens(a, own_with(copy_of(tokenizer), 280)) == 280
    assert same_tokens(a, own_with(copy_of(tokenizer), 384)) == 280
    assert same_tokens(own_with(tokenizer, 288), own_with(copy_of(tokenizer), 384)) == 288
    with pytest.raises(BridgeError, match="a logit for each of the tokenizer's 280 tokens, got 280 and 279 logits"):
        same_tokens(a, own_with(copy_of(tokenizer), 279))


def test_other_tokens_are_told_apart(tokenizer):
    a = own_with(tokenizer, 400)
    added = copy_of(tokenizer)
    added.add_tokens([AddedToken("whole")])
    with pytest.raises(BridgeError, match=r"got 280 and 281 tokens, 1 with other ids: 'whole' \(none and 280\)"):
        same_tokens(a, own_with(added, 400))
    other = train_tokenizer(iter(["another text altogether, of other words\n" * 9]), 280)
    with pytest.raises(BridgeError, match=r"280 and 280 tokens, \d+ with other ids: '\S+' \(none and 25\d\), "):
        same_tokens(a, own_with(other, 400))
    lower = copy_of(tokenizer)
    lower.normalizer = normalizers.Lowercase()
    with pytest.raises(BridgeError, match=r"must encode alike, got \[.*\] and \[.*\] from token 0 of 'Alice"):
        same_tokens(a, own_with(lower, 400))
