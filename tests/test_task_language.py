"""Tasks with corrupted partners: answers that follow from the text, and partners that differ where they shall alone."""

import random
import re
from itertools import islice

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sparsetrain.data import train_tokenizer
from sparsetrain.pruning.evaluate import right_and_wrong
from sparsetrain.task_language import CENTURIES, MEN, WOMEN
from sparsetrain.tasks import TASKS, TaskData, TaskError, encode_task, load_task, nonsense

NAMES = ("ioi", "greater_than", "gendered_pronoun", "docstring")
N_CHANGED = {"ioi": 1, "greater_than": 1, "gendered_pronoun": 1, "docstring": 2}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE as GPT-2's is, in which the tasks' names and words, centuries and two digits are single tokens.

    Centuries come first among the merges, as they do in GPT-2's: 1732 is read as 17 and 32, not as 1, 73 and 2.
    """
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    prompts = [pair.positive for name in NAMES if name != "greater_than" for pair in draw(name, 300)]
    sentences = [re.sub(r"\d+", "", pair.positive) for pair in draw("greater_than", 300)]
    words = [f" {word}" for word in (*WOMEN, *MEN, "she", "he")] * 20
    numbers = [f" {century}" for century in CENTURIES] * 1000 + [f"{n:02d}" for n in range(100)] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([*prompts, *sentences, *words, *numbers], trainer)
    return made


def draw(name: str, n: int, seed: int = 0) -> list:
    return list(islice(TASKS[name].candidates("train", random.Random(seed)), n))


def encoded(name: str, tokenizer: Tokenizer, split: str = "train", seed: int = 0) -> TaskData:
    return encode_task(load_task(name), tokenizer, 64, split, seed, 128, aligned=True)


def people(prompt: str) -> list[str]:
    return [word for word in re.findall(r"\w+", prompt) if word in WOMEN + MEN]


def expected_answers(name: str, prompt: str) -> tuple[list[str], list[str]]:
    """All right and all wrong answers, read off the prompt."""
    if name == "ioi":
        first, second, giver = people(prompt)
        return [f" {second if giver == first else first}"], [f" {giver}"]
    if name == "greater_than":
        century, year, again = re.fullmatch(r"\D+(\d\d)(\d\d)\D+(\d\d)", prompt).groups()
        assert again == century
        return [f"{y:02d}" for y in range(int(year) + 1, 100)], [f"{y:02d}" for y in range(int(year) + 1)]
    if name == "gendered_pronoun":
        (found,) = people(prompt)
        return ([" she"], [" he"]) if found in WOMEN else ([" he"], [" she"])
    arguments = re.search(r"\(self, (.*)\):", prompt)[1].split(", ")
    documented = re.findall(r":param (\w+):", prompt)
    assert documented == arguments[: len(documented)] and len(set(arguments)) == len(arguments)
    return [f" {arguments[len(documented)]}"], [f" {name}" for name in arguments[len(documented) + 1 :]]


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_follow_from_the_text(name, tokenizer):
    data = encoded(name, tokenizer)
    assert len(data) == 128
    for row, prompt in enumerate(data.prompts):
        right, wrong = expected_answers(name, prompt)
        if name == "greater_than":
            found = (tokenizer.decode([t]) for t in data.correct_set[row].nonzero().flatten().tolist())
            assert sorted(found) == right
            found = (tokenizer.decode([t]) for t in data.wrong_set[row].nonzero().flatten().tolist())
            assert sorted(found) == wrong
            assert data.correct_set[row, data.correct[row]] and data.wrong_set[row, data.wrong[row]]
        assert tokenizer.decode([int(data.correct[row])]) == right[0]
        assert tokenizer.decode([int(data.wrong[row])]) in wrong
        end = int(data.last[row]) + 1
        assert tokenizer.encode(prompt + right[0]).ids == [*data.tokens[row, :end], data.correct[row]]


@pytest.mark.parametrize("name", NAMES)
def test_a_partner_is_as_long_and_differs_in_whole_words_alone(name, tokenizer):
    data = encoded(name, tokenizer)
    for row, prompt in enumerate(data.prompts):
        end = int(data.last[row]) + 1
        partner = tokenizer.decode(data.corrupted[row, :end].tolist())
        assert tokenizer.encode(partner).ids == data.corrupted[row, :end].tolist()
        assert not data.corrupted[row, end:].any()
        places = (data.tokens[row] != data.corrupted[row]).nonzero().flatten().tolist()
        assert len(places) == N_CHANGED[name]
        before, after = ([tokenizer.decode([int(t[row, p])]) for p in places] for t in (data.tokens, data.corrupted))
        if name == "greater_than":
            assert after == ["01"] and re.sub(r"(\d\d)\d\d", r"\g<1>01", prompt) == partner
        else:
            assert partner == data.prompts[row + 1 - 2 * (row % 2)], "the other prompt of the pair"
            assert expected_answers(name, partner)[0] != expected_answers(name, prompt)[0]
        assert all(re.fullmatch(r" \w+|\d\d", word) for word in before + after)
    assert encode_task(load_task(name), tokenizer, 4, "train", 0, 128).corrupted is None, "unless it is asked for"


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_prompt_and_a_seed_gives_the_same_prompts(name, tokenizer):
    train, heldout = (
        {prompt for seed in range(2) for prompt in encoded(name, tokenizer, split, seed).prompts}
        for split in ("train", "heldout")
    )
    assert len(train) > 200 and len(heldout) > 200 and not train & heldout
    data, again, other = (encoded(name, tokenizer, seed=seed) for seed in (3, 3, 4))
    assert data.prompts == again.prompts != other.prompts
    assert torch.equal(data.corrupted, again.corrupted)


def test_names_are_repeated_in_both_orders(tokenizer):
    """ABBA and BABA are equally common on each side of a pair, and either of the two people is the first."""
    orders = []
    for prompt in encoded("ioi", tokenizer).prompts[::2]:
        first, _, giver = people(prompt)
        orders.append(giver == first)
    assert 0.3 < sum(orders) / len(orders) < 0.7


def test_a_model_that_ignores_the_year_is_right_on_one_prompt_of_a_pair(tokenizer):
    data = encoded("greater_than", tokenizer)
    right, wrong = right_and_wrong(torch.zeros(len(data), tokenizer.get_vocab_size()), data)
    odds = (right - wrong).view(-1, 2)
    torch.testing.assert_close(odds[:, 0], -odds[:, 1])
    assert (odds[:, 0] != 0).all()
    assert torch.equal(right.exp().round() + wrong.exp().round(), torch.full((len(data),), 100.0))


def test_years_in_other_tokens_are_refused_in_plain_words():
    in_threes = train_tokenizer(iter([f" {n:03d}\n{n:02d}\n" for n in range(1000)] * 3), 2500)
    with pytest.raises(TaskError, match=r"must give 4 .* from 1\d\d\d .* must have the tokens \['\d\d'\], got"):
        encode_task(TASKS["greater_than"], in_threes, 4, "train", 0, 64)


@pytest.mark.parametrize(
    ("name", "word"), [("ioi", r"' [A-Z]\w+'"), ("docstring", r"' \w+'"), ("greater_than", r"'\d\d'")]
)
def test_a_vocabulary_without_the_words_is_refused_with_a_short_reason(name, word):
    letters = train_tokenizer(iter(["a"]), 257)
    with pytest.raises(TaskError, match=r"train a tokenizer with a larger vocabulary") as error:
        encode_task(TASKS[name], letters, 4, "train", 0, 512)
    assert re.fullmatch(word + r" must be one token, got \[.*\]", error.value.reason)


def test_nonsense_words_stand_in_for_sets_of_answers(tokenizer):
    data = encoded("greater_than", tokenizer)
    (control,) = nonsense([data], tokenizer, 0)
    assert control.correct_set is None and control.wrong_set is None
    assert torch.equal(control.corrupted, data.corrupted)
    assert all(re.fullmatch(" [a-z]{2,}", tokenizer.decode([t])) for t in {*control.correct.tolist()})


def test_sets_go_with_their_rows(tokenizer):
    data = encoded("greater_than", tokenizer)
    part = data.take([5, 2])
    assert torch.equal(part.correct_set, data.correct_set[[5, 2]]) and torch.equal(
        part.wrong_set, data.wrong_set[[5, 2]]
    )
    assert part.to("meta").correct_set.device.type == "meta"
    assert part.trimmed().correct_set.shape == part.correct_set.shape


def test_prompts_that_cannot_have_as_many_tokens_are_told_to_take_another_ablation(tokenizer):
    words = r"have \d+ and \d+ tokens, where ablation=corrupted needs equally many; take another ablation, as mean_task"
    with pytest.raises(TaskError, match=words):
        encode_task(load_task("enumerate_range"), tokenizer, 4, "train", 0, 128, aligned=True)
