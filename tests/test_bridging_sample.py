"""Text sampled from a dense model: the model's own distribution, in tokens it reads as it wrote them."""

import json
import warnings

import pytest
import torch

from sparsetrain.bridging.dense import OwnModel, load_dense
from sparsetrain.bridging.residuals import BridgeError
from sparsetrain.bridging.sample import lengthen, readable, sample
from sparsetrain.cli import main
from sparsetrain.config import ConfigError, ModelOptions, RunConfig, load_config
from sparsetrain.data import prepare, train_tokenizer
from sparsetrain.model import Transformer


def texts(file):
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_same_seed_writes_the_same_file_and_another_does_not(tiny_run, tmp_path):
    made = [sample(tiny_run, tmp_path / f"{i}.jsonl", 100, seed, length=8) for i, seed in enumerate((0, 0, 1))]
    files = [(tmp_path / f"{i}.jsonl").read_bytes() for i in range(3)]
    assert files[0] == files[1] != files[2] and made[0] == made[1]
    assert len(texts(tmp_path / "0.jsonl")) == made[0].n_documents == 13 and made[0].n_tokens_each == 8


def test_a_corpus_of_it_has_one_sample_every_stride(tiny_run, tmp_path):
    file, end = tmp_path / "c.jsonl", "<|endoftext|>"
    made = sample(tiny_run, file, 1000, length=10, start=end)
    assert made.n_tokens_each == 9 and made.n_drawn >= made.n_documents == 112  # special tokens are no text
    tokenizer = tmp_path / "tokenizer.json"
    load_dense(tiny_run).tokenizer.save(str(tokenizer))
    where = ["data.source=json", f"data.paths=[{file}]", f"data.cache={tmp_path}", f"data.tokenizer={tokenizer}"]
    corpus = prepare(load_config(RunConfig, where).data)
    for side in ("train", "val"):
        tokens = corpus.tokens(side)
        assert (tokens[9::10] == corpus.tokenizer.token_to_id(end)).all() and len(tokens) % 10 == 0


def small() -> OwnModel:
    """A model of nine tokens with steep predictions."""
    model = Transformer(ModelOptions(n_layers=1, d_model=8, d_head=8, n_ctx=8), 9, seeded())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=seeded(1)))
    return OwnModel(model.requires_grad_(False), None)


def test_what_follows_is_drawn_from_all_the_model_predicts():
    model, n = small(), 20_000
    drawn = lengthen(model, torch.tensor([[3, 5]] * n), 4, seeded())
    assert drawn.shape == (n, 4) and (drawn[:, :2] == torch.tensor([3, 5])).all()
    for at in (2, 3):
        begun = drawn[(drawn[:, 2] == drawn[0, 2]) | (at == 2)]
        wanted = model.run(begun[:1, :at])[1][0, -1].softmax(-1)
        found = torch.bincount(begun[:, at], minlength=9) / len(begun)
        error = (wanted * (1 - wanted) / len(begun)).sqrt()
        assert ((found - wanted).abs() < 4 * error).all()


def test_a_model_of_hugging_face_goes_on_from_its_cache_as_from_the_whole(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
    tokenizer = train_tokenizer(iter(["for x in y: pass\n" * 9]), 280)
    common = {"vocab_size": 280, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 40}
    configs = {
        "gpt2": transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=280, n_positions=40),
        "gemma2": transformers.Gemma2Config(
            hidden_size=16, head_dim=8, num_key_value_heads=1, intermediate_size=32, sliding_window=4, **common
        ),
        "mamba": transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=280),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        made.save_pretrained(tmp_path / name)
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        model = load_dense(tmp_path / name)
        tokens = torch.tensor([[3], [4]])
        found = lengthen(model, tokens, 12, seeded())
        generator = seeded()
        while tokens.shape[1] < 12:
            following = torch.multinomial(model.run(tokens)[1][:, -1].softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, following], 1)
        assert torch.equal(found, tokens), name


def test_samples_that_would_be_read_as_other_tokens_are_left_out():
    tokenizer = train_tokenizer(iter(["while x: return True\n" * 9]), 300)
    spelt = tokenizer.encode("while True").ids
    letters = [tokenizer.token_to_id(letter) for letter in "while"]
    broken = [tokenizer.token_to_id("Ã")]  # half a character
    special = [*spelt, tokenizer.token_to_id("<|endoftext|>"), *spelt]
    assert readable(tokenizer, [spelt, letters, broken, special]) == ["while True"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--length", "33"], "--length must be above the 1 tokens of --start and at most the model's 32, got 33"),
        (["--length", "1"], "--length must be above the 1 tokens of --start and at most the model's 32, got 1"),
        (["--start", ""], "--start must be text of at least one token, got ''"),
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_sampled_is_refused(arguments, words, tiny_run, tmp_path, capsys):
    file = tmp_path / "c.jsonl"
    assert main(["sample", str(tiny_run), str(file), "--tokens", "10", "--length", "8", *arguments]) == 1
    assert f"error: {words}" in capsys.readouterr().err
    assert not file.exists()


def test_a_file_that_exists_is_left_alone(tiny_run, tmp_path):
    (tmp_path / "c.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="the file must be a new one, got .*c.jsonl, which exists; name another"):
        sample(tiny_run, tmp_path / "c.jsonl", 10)
    assert (tmp_path / "c.jsonl").read_text() == "mine"


def test_a_start_that_no_sample_survives_is_refused(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsetrain.bridging.sample.BATCH", 2)
    with pytest.raises(BridgeError, match="encode back to the tokens that were drawn, got none of 2 of 32 tokens"):
        sample(tiny_run, tmp_path / "c.jsonl", 10, length=32, start="é")
    assert not (tmp_path / "c.jsonl").exists()


def test_the_command_says_how_to_use_what_it_wrote(tiny_run, tmp_path, capsys):
    file = tmp_path / "new" / "c.jsonl"
    assert main(["sample", str(tiny_run), str(file), "--tokens", "20", "--length", "8"]) == 0
    out = capsys.readouterr().out
    assert f"{file}: 3 samples of 8 tokens, of 256 that were drawn" in out
    assert f"data.source=json data.paths=[{file}]; a sample at a time: model.n_ctx=7 train.stride=9" in out
