"""The tasks: right answers complete valid Python, splits share nothing, answers are the tokenizer's."""

import json
import logging
import random
import re
import subprocess
import sys
import sysconfig
from dataclasses import asdict
from pathlib import Path
from statistics import median

import pytest
import torch
from tokenizers import Tokenizer

from sparsetrain.data import train_tokenizer
from sparsetrain.task_prompts import GENERATORS, Pair
from sparsetrain.tasks import PAD, TASKS, TaskError, _built_in, encode_task, load_task, nonsense

PAPER = list(TASKS)[:20]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A BPE of 2,048 tokens trained on the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "test", "tests", "idle_test"}
    files = sorted(p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts))
    return train_tokenizer((file.read_text(encoding="utf-8", errors="replace") for file in files), 2048)


@pytest.fixture(scope="session")
def small_tokenizer(tokenizer) -> Tokenizer:
    """The BPE of 1,024 tokens: training is greedy, so it is the start of the larger one."""
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"] = {text: token for text, token in state["model"]["vocab"].items() if token < 1024}
    state["model"]["merges"] = state["model"]["merges"][: 1024 - 257]
    return Tokenizer.from_str(json.dumps(state))


def write_pairs(path: Path, pairs: list[Pair]) -> str:
    path.write_text("".join(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    return str(path)


def numbered_pairs(n: int) -> list[Pair]:
    return [Pair(f"x{i} = (1", f"x{i} = [1", ")", "]") for i in range(n)]


@pytest.mark.parametrize("name", PAPER)
def test_rows_hold_prompts_answers_and_padding(name, tokenizer):
    data = encode_task(TASKS[name], tokenizer, 64, "train", 0, 256)
    assert len(data) == len(data.prompts) == len(data.tokens) == 128
    assert torch.equal(data.correct[0::2], data.wrong[1::2]) and torch.equal(data.wrong[0::2], data.correct[1::2])
    assert torch.equal(data.positive, data.correct[0::2].repeat_interleave(2))
    assert (data.correct != data.wrong).all()
    for row, prompt in enumerate(data.prompts):
        end = int(data.last[row]) + 1
        ids = tokenizer.encode(prompt).ids
        assert data.tokens[row, :end].tolist() == ids and (data.tokens[row, end:] == PAD).all()
        answer = tokenizer.decode([int(data.correct[row])])
        assert tokenizer.encode(prompt + answer).ids == [*ids, int(data.correct[row])]


@pytest.mark.parametrize("name", PAPER)
def test_prompts_vary_and_are_short(name, tokenizer):
    data = encode_task(TASKS[name], tokenizer, 128, "train", 0, 256)
    assert len(set(data.prompts)) >= 250
    lengths = (data.last + 1).tolist()
    assert len(set(lengths)) >= 20
    assert min(lengths) >= 5 and 15 <= median(lengths) <= 60 and max(lengths) <= 110


@pytest.mark.parametrize("name", PAPER)
def test_splits_share_no_prompt_whatever_the_seeds(name, tokenizer):
    train, heldout = (
        {p for seed in range(2) for p in encode_task(TASKS[name], tokenizer, 64, split, seed, 256).prompts}
        for split in ("train", "heldout")
    )
    assert len(train) > 200 and len(heldout) > 200
    assert not train & heldout


def test_splits_share_no_prompt_when_pairs_share_prompts(tokenizer):
    def draw_from_few(rng):
        """Two of twelve prompts."""
        first, second = rng.sample(range(12), 2)
        return Pair(f"x = {first}", f"x = {second}", "\n", ":\n")

    task = _built_in(draw_from_few)
    train, heldout = (set(encode_task(task, tokenizer, 4, split, 0, 99).prompts) for split in ("train", "heldout"))
    assert train and heldout and not train & heldout


def test_the_same_arguments_give_the_same_data(tokenizer):
    task = TASKS["class_init"]
    data, again, other = (encode_task(task, tokenizer, 16, "train", seed, 256) for seed in (3, 3, 4))
    assert data.prompts == again.prompts and torch.equal(data.tokens, again.tokens)
    assert data.prompts != other.prompts
    assert encode_task(task, tokenizer, 8, "train", 3, 256).prompts == data.prompts[:16]


def test_prompts_do_not_depend_on_the_process():
    code = """if True:
        import random
        from sparsetrain.task_prompts import GENERATORS
        print([generator(random.Random("7")) for generator in GENERATORS])
    """
    here = [generator(random.Random("7")) for generator in GENERATORS]
    for hash_seed in ("1", "2"):
        ran = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, cwd=Path(__file__).parents[1],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert ran.stdout.strip() == str(here)


@pytest.mark.parametrize("name", PAPER)
def test_a_vocabulary_of_1024_serves_every_task(name, small_tokenizer):
    for split in ("train", "heldout"):
        assert len(encode_task(TASKS[name], small_tokenizer, 32, split, 0, 256)) == 64


def test_names_are_asked_for_whole(small_tokenizer):
    data = encode_task(TASKS["class_init"], small_tokenizer, 32, "train", 0, 256)
    for prompt, answer in zip(data.prompts, data.correct.tolist(), strict=True):
        assert prompt.rpartition("\n")[2].strip() == f"self.{small_tokenizer.decode([answer]).strip()} ="


def test_an_answer_of_several_tokens_stands_for_its_first(tokenizer, caplog):
    caplog.set_level(logging.INFO, "sparsetrain.tasks")
    data = encode_task(TASKS["bracket_counting"], tokenizer, 4, "train", 0, 256)
    assert [tokenizer.decode([int(token)]) for token in data.correct[:2]] == ["]", "]\n"]
    assert re.search(r"bracket_counting: ']]\\n' is several tokens here; asking for the first, ']'", caplog.text)


def test_an_answer_that_is_one_token_is_asked_for_whole(tokenizer):
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"]["]]Ċ"] = len(state["model"]["vocab"])
    state["model"]["merges"].insert(0, ["]", "]Ċ"])
    state["model"]["merges"].insert(0, ["]", "Ċ"])
    merging = Tokenizer.from_str(json.dumps(state))
    data = encode_task(TASKS["bracket_counting"], merging, 4, "train", 0, 256)
    assert [merging.decode([int(token)]) for token in data.correct[:2]] == ["]]\n", "]\n"]


def test_a_vocabulary_of_bytes_is_refused_with_the_reason():
    letters = train_tokenizer(iter(["a"]), 257)
    with pytest.raises(
        TaskError,
        match=r"task class_init must give 8 .*train.* 257 tokens, got 0; \d+ were refused, the first because "
        r"the answer ' \w+' is not one token but \[' ', '\w'.*train a tokenizer with a larger vocabulary",
    ):
        encode_task(TASKS["class_init"], letters, 8, "train", 0, 256)


def test_a_short_context_leaves_out_long_prompts(tokenizer):
    data = encode_task(TASKS["for_while"], tokenizer, 16, "train", 0, 24)
    assert data.tokens.shape[1] <= 23
    with pytest.raises(TaskError, match=r"a prompt has \d+ tokens, where n_ctx 5 allows 1 to 4"):
        encode_task(TASKS["for_while"], tokenizer, 16, "train", 0, 5)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("b", r"the answer 'b' merges with the end of its prompt, 'x\d = a'"),
        (") + self", r"the answer '\) \+ self' is not one token but \['\)', "),
    ],
)
def test_unfit_answers_of_a_file_are_refused_with_the_reason(answer, reason, tokenizer, tmp_path):
    pairs = [Pair(f"x{i} = a", f"y{i} = a", answer, "\n") for i in range(9)]
    task = load_task(write_pairs(tmp_path / "own.jsonl", pairs))
    with pytest.raises(TaskError, match=reason):
        encode_task(task, tokenizer, 8, "train", 0, 64)


def test_unfit_pairs_of_a_file_are_left_out_with_a_warning(tokenizer, tmp_path, caplog):
    unfit = [Pair(f"z{i} = a", f"y{i} = a", "b", "\n") for i in range(9)]
    task = load_task(write_pairs(tmp_path / "own.jsonl", [*numbered_pairs(9), *unfit]))
    data = encode_task(task, tokenizer, 64, "train", 0, 64)
    assert all(prompt.startswith("x") for prompt in data.prompts)
    assert re.search(r"64 asked for; \d were refused, the first because the answer 'b' merges", caplog.text)


@pytest.mark.parametrize(
    "pair",
    [Pair("x = (1", "y = [1", "]", "]"), Pair("x = (1", "x = (1", ")", "]")],
    ids=["answers", "prompts"],
)
def test_a_pair_that_does_not_differ_is_refused(pair, tmp_path):
    with pytest.raises(TaskError, match=r"own\.jsonl:1 must hold two prompts and two answers that differ"):
        load_task(write_pairs(tmp_path / "own.jsonl", [pair]))


def test_first_tokens_that_agree_are_refused(tokenizer):
    def draw_alike(rng):
        """Answers that begin alike."""
        return Pair(f"x = {rng.random()}", f"y = {rng.random()}", "\n", "\n    pass")

    with pytest.raises(TaskError, match=r"the answers '\\n' and '\\n    pass' begin with the same token, '\\n'"):
        encode_task(_built_in(draw_alike), tokenizer, 2, "train", 0, 64)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((4, "test", 0, 64), r"split must be one of train, heldout, got 'test'"),
        ((0, "train", 0, 64), r"n_pairs must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, words, tokenizer):
    with pytest.raises(TaskError, match=words):
        encode_task(TASKS["with_as"], tokenizer, *arguments)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(TaskError, match=r"\.jsonl file, got 'bracket_count'; the nearest names are bracket_counting"):
        load_task("bracket_count")
    with pytest.raises(TaskError, match=r"nearest names are single_double_quote, .*while_return_true"):
        load_task("???")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"own\.jsonl must hold one pair a line, got an empty file; give each line the keys positive, "),
        ("\n{oops\n", r"own\.jsonl:2 must be a JSON object on one line, got '\{oops' "),
        ("[1]", r"own\.jsonl:1 must be a JSON object, got '\[1\]'"),
        (
            '{"positive": "a", "x": "b", "negative": 3}',
            r":1 .*got no positive_answer, no negative_answer, an unknown key x, negative 3; give each line",
        ),
    ],
)
def test_malformed_files_are_named_with_their_line(text, words, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(text)
    with pytest.raises(TaskError, match=words):
        load_task(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TaskError, match=r"a task file must be readable .*No such file.*own\.jsonl"):
        load_task(str(tmp_path / "own.jsonl"))


def test_a_file_gives_each_of_its_pairs_once(tokenizer, tmp_path, caplog):
    pairs = numbered_pairs(40)
    task = load_task(write_pairs(tmp_path / "own.jsonl", [*pairs, *pairs]))
    assert task.name == "own"
    train, heldout = (encode_task(task, tokenizer, 64, split, 0, 64) for split in ("train", "heldout"))
    assert re.search(r"task own: \d+ pairs for train, 64 asked for", caplog.text)
    prompts = [prompt for pair in pairs for prompt in (pair.positive, pair.negative)]
    assert sorted(train.prompts + heldout.prompts) == sorted(prompts)
    assert 20 <= len(train) <= 60
    assert len(encode_task(task, tokenizer, 3, "train", 1, 64)) == 6


def test_linked_pairs_of_a_file_stay_on_one_side(tokenizer, tmp_path):
    chain = [Pair(f"x{i} = (1", f"x{i + 1} = (1", ")", "]") for i in range(0, 20)]
    random.Random(0).shuffle(chain)
    task = load_task(write_pairs(tmp_path / "own.jsonl", [*chain, *numbered_pairs(100)[30:]]))
    train, heldout = (encode_task(task, tokenizer, 200, split, 0, 64).prompts for split in ("train", "heldout"))
    assert not set(train) & set(heldout)
    assert any({pair.positive for pair in chain} <= set(side) for side in (train, heldout))


def test_a_file_may_hold_line_separators_in_its_prompts(tokenizer, tmp_path):
    pairs = [Pair(f"# \u2028{i}\nx = (1", f"# \u2028{i}\nx = [1", ")", "]") for i in range(20)]
    task = load_task(write_pairs(tmp_path / "own.jsonl", pairs))
    assert "\u2028" in encode_task(task, tokenizer, 2, "train", 0, 64).prompts[0]


def test_a_file_with_too_few_pairs_on_a_side_is_refused(tokenizer, tmp_path):
    task = load_task(write_pairs(tmp_path / "own.jsonl", numbered_pairs(1)))
    with pytest.raises(TaskError, match=r"task own must give 2 different pairs for \w+ .*, or add pairs to the file"):
        for split in ("train", "heldout"):
            encode_task(task, tokenizer, 8, split, 0, 64)


@pytest.mark.parametrize("name", ["with_as", "class_init"])
def test_nonsense_asks_for_two_words_that_are_no_answers(name, tokenizer):
    data = encode_task(TASKS[name], tokenizer, 16, "train", 0, 256)
    (control,) = nonsense([data], tokenizer, 0)
    assert control.prompts == data.prompts and torch.equal(control.tokens, data.tokens)
    first, second = control.correct[0], control.wrong[0]
    assert (control.correct[0::2] == first).all() and (control.correct[1::2] == second).all()
    assert (control.wrong[0::2] == second).all() and (control.wrong[1::2] == first).all()
    assert (control.positive == first).all() and first != second
    assert not {int(first), int(second)} & set(data.correct.tolist())
    assert all(re.fullmatch(" [a-z]{2,}", tokenizer.decode([int(token)])) for token in (first, second))
    assert torch.equal(nonsense([data], tokenizer, 0)[0].correct, control.correct)
    assert not torch.equal(nonsense([data], tokenizer, 1)[0].correct, control.correct)


def test_take_and_to_keep_rows_together(tokenizer):
    data = encode_task(TASKS["var_if"], tokenizer, 8, "train", 0, 256)
    for part, rows in ((data.take(slice(4, 8)), [4, 5, 6, 7]), (data.take([9, 2]), [9, 2])):
        assert part.prompts == tuple(data.prompts[row] for row in rows)
        for name in ("tokens", "last", "correct", "wrong", "positive"):
            assert torch.equal(getattr(part, name), getattr(data, name)[rows])
    assert data.to("meta").tokens.device.type == "meta" and data.to("cpu").prompts == data.prompts


def test_all_parts_of_a_nonsense_task_ask_for_the_same_two_words(tokenizer):
    parts = [encode_task(TASKS["else_elif"], tokenizer, 16, split, 0, 256) for split in ("train", "heldout")]
    assert set(parts[0].wrong.tolist()) != set(parts[1].wrong.tolist()), "the parts must differ in their answers"
    controls = nonsense(parts, tokenizer, 0)
    asked = [set(c.correct.tolist()) | set(c.wrong.tolist()) for c in controls]
    assert asked[0] == asked[1]
    assert not asked[0] & {t for part in parts for t in (*part.correct.tolist(), *part.wrong.tolist())}
