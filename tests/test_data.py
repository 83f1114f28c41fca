"""From files to batches."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from sparsetrain.config import DataOptions
from sparsetrain.data import DataError, batch, evaluation_batches, prepare, train_tokenizer
from sparsetrain.files import WriteError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text files of many kinds, most of them usable."""
    root = tmp_path_factory.mktemp("texts")
    for i in range(40):
        (root / f"m{i:02}.py").write_text(f"def f{i}(x):\n    return x + {i}\n\n\nprint(f{i}({i}), 'é')\n" * 5)
    (root / "latin.py").write_bytes("x = 'é'\n".encode("latin-1"))
    (root / "binary.txt").write_bytes(b"ab\0cd")
    (root / "empty.py").write_text("")
    (root / "picture.png").write_bytes(b"\x89PNG")
    (root / ".git").mkdir()
    (root / ".git" / "hidden.md").write_text("not part of the corpus\n")
    return root


def options(folder, tmp_path, **changes) -> DataOptions:
    values = {"source": "text", "paths": [str(folder)], "vocab_size": 300, "val_fraction": 0.3, "cache": str(tmp_path)}
    return DataOptions(**{**values, **changes})


def test_a_cache_that_cannot_be_written_is_an_error(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="could not make .*file"):
        prepare(options(folder, tmp_path / "file" / "cache"))


def test_what_is_no_text_is_skipped_and_counted(folder, tmp_path):
    manifest = prepare(options(folder, tmp_path)).manifest
    assert manifest["skipped"] == {"not UTF-8": 1, "binary": 1, "empty": 1}
    assert len(manifest["files"]) == 40
    assert all(len(digest) == 64 for _, digest in manifest["files"])


def test_tokens_decode_to_the_documents_and_the_split_is_by_document(folder, tmp_path):
    corpus = prepare(options(folder, tmp_path))
    texts = {}
    for split in ("train", "val"):
        ids = corpus.tokens(split)
        assert ids.dtype == np.uint16
        assert len(ids) == corpus.manifest["tokens"][split]
        text = corpus.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        texts[split] = set(text.split("<|endoftext|>")) - {""}
    assert texts["train"] | texts["val"] == {(folder / f"m{i:02}.py").read_text() for i in range(40)}
    assert not texts["train"] & texts["val"]


def test_a_prepared_corpus_is_found_again_and_a_changed_one_is_not(folder, tmp_path):
    first = prepare(options(folder, tmp_path))
    stamp = (first.folder / "train.bin").stat().st_mtime_ns
    assert prepare(options(folder, tmp_path)).folder == first.folder
    assert (first.folder / "train.bin").stat().st_mtime_ns == stamp
    assert prepare(options(folder, tmp_path, vocab_size=301)).folder != first.folder


def test_json_lines_and_parquet_give_the_same_tokens(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"code": f"value_{i} = {i}\n" * 9} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    tokens = []
    for source, name in (("json", "rows.jsonl"), ("parquet", "rows.parquet")):
        made = prepare(options(tmp_path / name, tmp_path / "cache", source=source, text_column="code"))
        tokens.append(made.tokens("train").tolist())
    assert tokens[0] == tokens[1]
    with pytest.raises(DataError, match="data.text_column must be one of .*'code'.*, got 'text'"):
        prepare(options(tmp_path / "rows.jsonl", tmp_path / "cache", source="json"))


def test_a_tokenizer_file_can_be_given(folder, tmp_path):
    first = prepare(options(folder, tmp_path))
    again = prepare(options(folder, tmp_path, tokenizer=str(first.folder / "tokenizer.json")))
    assert again.tokens("train").tolist() == first.tokens("train").tolist()


def test_max_tokens_ends_reading(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"a_{i} = {i}\n" * 3}) + "\n" for i in range(1000)))
    totals = [
        sum(prepare(options(rows, tmp_path / "cache", source="json", max_tokens=n)).manifest["tokens"].values())
        for n in (None, 2000)
    ]
    assert 2000 <= totals[1] < totals[0] / 2


def test_folders_with_the_characters_of_patterns_are_read(folder, tmp_path):
    odd = tmp_path / "odd [1]*"
    odd.mkdir()
    for i in range(20):
        (odd / f"m{i}?.py").write_text((folder / f"m{i:02}.py").read_text())
    corpus = prepare(options(odd, tmp_path / "cache", val_fraction=0.4))
    text = "".join(corpus.tokenizer.decode(corpus.tokens(s).tolist()) for s in ("train", "val"))
    assert all(f"def f{i}(x)" in text for i in range(20))


def test_a_moved_corpus_is_the_same_corpus(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "moved")
    first = prepare(options(folder, tmp_path / "cache"))
    assert prepare(options(tmp_path / "moved", tmp_path / "cache")).folder == first.folder


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"paths": ["/nowhere/at/all"]}, "data.paths must name files, folders or globs that exist"),
        ({"paths": ["{folder}/empty.py"]}, "data must hold at least one readable file, got none"),
        ({"paths": ["{folder}/m00.py"]}, "both sides of the split must hold text"),
    ],
)
def test_an_unusable_corpus_is_refused_and_leaves_nothing(folder, tmp_path, changes, words):
    changes = {"paths": [p.format(folder=folder) for p in changes["paths"]]}
    with pytest.raises(DataError, match=words):
        prepare(options(folder, tmp_path, **changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "source, content, words",
    [
        ("json", b'{"text": "a"}\n{"text": \n', "could not read the json files"),
        ("json", b'{"text": 3}\n{"text": 4}\n', "the column text must hold text, got 3"),
        ("parquet", b"PAR1 but no more", "could not read the parquet files"),
        ("parquet", b"nothing like it", r"at least one readable file.*'not parquet': 1"),
        ("json", "{'text': 'é'}".encode("latin-1"), "at least one readable file.*'not UTF-8': 1"),
    ],
)
def test_damaged_files_are_refused_in_words(tmp_path, source, content, words):
    file = tmp_path / f"rows.{source}"
    file.write_bytes(content)
    with pytest.raises(DataError, match=words):
        prepare(options(file, tmp_path / "cache", source=source))


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_an_unusable_tokenizer_file_is_refused(folder, tmp_path, content):
    file = tmp_path / "t.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match="data.tokenizer must be a readable tokenizer.json, got .*t.json"):
        prepare(options(folder, tmp_path / "cache", tokenizer=str(file)))


def test_another_token_ends_documents(folder, tmp_path):
    """As in tokenizers of other models; one that is trained here gets it too."""
    trained = prepare(options(folder, tmp_path / "cache", end_of_text="</s>"))
    given = str(trained.folder / "tokenizer.json")
    again = prepare(options(folder, tmp_path / "cache", end_of_text="</s>", tokenizer=given))
    tokenizer = trained.tokenizer
    assert tokenizer.token_to_id("</s>") == 0 and tokenizer.token_to_id("<|endoftext|>") is None
    for corpus in (trained, again):
        assert corpus.tokens("train")[-1] == 0 and corpus.manifest["tokens"] == trained.manifest["tokens"]
    with pytest.raises(DataError, match=r"must have the token <\|endoftext\|>, got none; name its own in data.end_of"):
        prepare(options(folder, tmp_path / "cache", tokenizer=given))


def test_a_tokenizer_that_cuts_or_fills_up_texts_does_neither_here(folder, tmp_path):
    """As those do that were saved while they served batches of one length."""
    trained = prepare(options(folder, tmp_path / "cache"))
    tokenizer = trained.tokenizer
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(tmp_path / "t.json"))
    again = prepare(options(folder, tmp_path / "cache", tokenizer=str(tmp_path / "t.json")))
    assert again.manifest["tokens"] == trained.manifest["tokens"]


def large_tokenizer(file, n):
    """A tokenizer of n tokens: nothing but words, every one that is given last in it."""
    words = ["<|endoftext|>", *(f"w{i}" for i in range(1, n))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(file))
    return str(file)


@pytest.mark.parametrize("n, stored", [(65536, "uint16"), (65537, "uint32")])
def test_a_vocabulary_may_be_too_large_for_two_bytes(tmp_path, n, stored):
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"w{n - 1} w{i + 1} w{n - 2}")
    given = large_tokenizer(tmp_path / "t.json", n)
    corpus = prepare(options(tmp_path / "texts", tmp_path / "cache", tokenizer=given))
    assert corpus.manifest["dtype"] == stored
    for split in ("train", "val"):
        tokens = corpus.tokens(split)
        assert tokens.dtype == stored and len(tokens) == corpus.manifest["tokens"][split]
        assert (tokens.reshape(-1, 4)[:, [0, 2, 3]] == [n - 1, n - 2, 0]).all()
    x, y = batch(corpus.tokens("train"), 0, 0, 0, 3, 3)
    assert x.max() == n - 1 and (x[:, 1:] == y[:, :-1]).all()


def test_a_corpus_of_before_is_read_as_its_manifest_says(folder, tmp_path):
    """What is on disk stays valid: two bytes a token, as the manifest has said since the first one."""
    made = prepare(options(folder, tmp_path))
    assert made.manifest["dtype"] == "uint16"
    assert (made.folder / "val.bin").stat().st_size == 2 * made.manifest["tokens"]["val"]


def test_a_hub_that_cannot_be_reached_is_said_so(tmp_path):
    with pytest.raises(DataError, match="could not read nobody/nothing: "):
        prepare(DataOptions(source="hub", hub="nobody/nothing", cache=str(tmp_path)))


def test_a_hub_data_set_is_streamed(tmp_path):
    """A folder is a data set to `datasets`, read by the same call as one on the hub."""
    (tmp_path / "set").mkdir()
    rows = [json.dumps({"content": f"value_{i} = {i}\n" * 9}) + "\n" for i in range(60)]
    (tmp_path / "set" / "train.jsonl").write_text("".join(rows))
    made = prepare(
        options(tmp_path, tmp_path / "cache", source="hub", hub=str(tmp_path / "set"), text_column="content")
    )
    assert "value_7 = 7" in made.tokenizer.decode(made.tokens("train").tolist() + made.tokens("val").tolist())


def test_batches_are_a_pure_function_of_seed_index_and_rank():
    tokens = np.arange(5000, dtype=np.uint16)
    x, y = batch(tokens, 1, 7, 0, 8, 16)
    again, _ = batch(tokens, 1, 7, 0, 8, 16)
    assert x.equal(again)
    assert y.equal(x + 1), "targets are the next tokens"
    others = [batch(tokens, *at, 8, 16)[0] for at in ((2, 7, 0), (1, 8, 0), (1, 7, 1))]
    assert not any(x.equal(other) for other in others)


def test_evaluation_windows_do_not_overlap_and_cover_the_end():
    tokens = np.arange(1000, dtype=np.uint16)
    parts = [x for x, _ in evaluation_batches(tokens, 5, 4, 32)]
    assert [len(p) for p in parts] == [4] * 5
    seen = [t for p in parts for t in p.flatten().tolist()]
    assert len(seen) == len(set(seen))
    assert max(seen) == 998


def test_the_tokenizer_round_trips_any_text_and_follows_the_papers_pieces():
    tokenizer = train_tokenizer(iter(["def f(x):\n    return x1234\n" * 20]), 300)
    text = "class Ä:\n\tπ = 12345  # naïve\r\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    pieces = [p for p, _ in tokenizer.pre_tokenizer.pre_tokenize_str("f(12345):\n  x")]
    assert pieces == ["f", "(", "123", "45", "):Ċ", "Ġ", "Ġx"]
    assert tokenizer.token_to_id("<|endoftext|>") == 0


def test_windows_start_at_multiples_of_the_stride():
    tokens = np.arange(51, dtype=np.uint16)
    drawn = torch.cat([batch(tokens, 0, i, 0, 64, 3, stride=5)[0][:, 0] for i in range(8)])
    assert sorted(drawn.unique().tolist()) == list(range(0, 50, 5)), "every multiple that leaves room, and no other"
    spread = torch.cat([x for x, _ in evaluation_batches(tokens, 9, 4, 3, stride=5)])
    assert spread[:, 0].tolist() == list(range(0, 50, 5))
