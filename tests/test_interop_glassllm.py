"""glassllm's models, imported: the logits and tokens of the package itself, and a bridge's interface on them."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetrain.bridging.dense import load_dense
from sparsetrain.checkpoint import CheckpointError
from sparsetrain.cli import main
from sparsetrain.interop.glassllm import LANGUAGES, build_tokenizer, import_glassllm

TEXTS = (
    "Alice was beginning to get very tired", "  two  spaces\n\n\tand a tab ", "naïve \u2018quotes\u2019 — “and” _more_",
    "e\u0301 is normalised", "漢字 unknown 🙂", "<eos> is no token in a text", "", " ", "\n", "▁ itself",
)  # fmt: skip


@pytest.fixture(scope="module")
def glassllm():
    return pytest.importorskip("glassllm")


@pytest.fixture(scope="module", params=LANGUAGES)
def language(request, glassllm) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(language, tmp_path_factory):
    return import_glassllm(language, tmp_path_factory.mktemp("glassllm") / language)


def test_logits_are_those_of_the_package(language, folder, glassllm):
    theirs, _ = glassllm.load_pretrained(language)
    tokens = torch.randint(theirs.cfg.vocab_size, (3, 128), generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(np.asarray(theirs.forward(tokens.numpy()).data)).float()
    found = load_dense(folder).run(tokens)[1]
    assert expected.abs().max() > 10
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_tokens_are_those_of_the_package(language, folder, glassllm):
    _, theirs = glassllm.load_pretrained(language)
    ours = load_dense(folder).tokenizer
    assert ours.get_vocab() == theirs.token_to_id
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text).ids == ids, text
        if "<unk>" not in theirs.tokens(ids):
            assert ours.decode(ids) == theirs.decode(ids)


def test_tokens_of_any_text_are_those_of_the_package(glassllm):
    theirs = glassllm.load_pretrained("en")[1]
    ours = build_tokenizer({"alphabet": theirs.alphabet, "merges": theirs.merges})

    @settings(deadline=None, derandomize=True)
    @given(text=st.text(alphabet="ab▁ \n\t.,thine'é\u0301<>_漢", max_size=40))
    def check(text):
        assert ours.encode(text).ids == theirs.encode(text)

    check()


def test_the_model_can_be_bridged_to_at_every_sublayer(folder):
    model = load_dense(folder)
    assert len(model.sites) == 9 and model.width == 128 and model.vocab_size == 1024 and model.n_ctx == 128


def test_the_command_writes_a_folder(glassllm, tmp_path, capsys):
    assert main(["import", "glassllm:en", str(tmp_path / "glass")]) == 0
    assert sorted(f.name for f in (tmp_path / "glass").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert "data.end_of_text='<eos>'" in capsys.readouterr().out
    assert main(["import", "glassllm:en", str(tmp_path / "glass")]) == 1
    assert "error: the folder must be a new one" in capsys.readouterr().err
    assert main(["import", "glassllm:de", str(tmp_path / "other")]) == 1
    assert "error: glassllm's language must be one of en, pt, got 'de'" in capsys.readouterr().err


def test_a_package_that_is_not_there_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "glassllm", None)
    with pytest.raises(CheckpointError, match="glassllm must be installed .*; pip install glassllm"):
        import_glassllm("en", tmp_path / "glass")
    assert not (tmp_path / "glass").exists()
