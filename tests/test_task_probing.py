"""Tasks with known variables: what their prompts say, on a tokenizer of words."""

import itertools
import json
import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from sparsetrain.config import RunConfig, load_config
from sparsetrain.data import prepare
from sparsetrain.pruning.probing_data import probe_data
from sparsetrain.task_probing import PROBING_TASKS, probing_task, squares_mod, write_squares
from sparsetrain.tasks import TaskError, encode_task, load_task


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    write_squares(folder, 7)
    return folder


@pytest.fixture(scope="module")
def numbers(corpus) -> Tokenizer:
    return Tokenizer.from_file(str(corpus / "tokenizer.json"))


@pytest.fixture(scope="module")
def english() -> Tokenizer:
    """A token for each word of the agreement tasks, with the space before it."""
    rng = random.Random(0)
    pairs = [task.draw(rng) for task in PROBING_TASKS.values() for _ in range(3000)]
    texts = itertools.chain.from_iterable(
        (p.positive + p.positive_answer, p.negative + p.negative_answer) for p in pairs
    )
    found = sorted({word for text in texts for word in text.replace(" ", "@ ").split("@")})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *found])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    return tokenizer


def test_the_equations_are_true_and_all_there(corpus, numbers):
    lines = (corpus / "equations.jsonl").read_text().splitlines()
    read = [[int(x) for x in json.loads(line)["text"].replace("=", "").split()] for line in lines]
    assert sorted((a, b) for a, b, _ in read) == sorted(itertools.product(range(7), repeat=2))
    assert all((a * a - b * b - c) % 7 == 0 and 0 <= c < 7 for a, b, c in read)
    assert [5, 0, 4] in read
    assert numbers.encode("3 2 = 5").tokens == ["3", "2", "=", "5"]


def test_sequences_of_the_config_are_equations(corpus, tmp_path):
    config = load_config(RunConfig, [
        "configs/modular.yaml", f"data.paths=[{corpus / 'equations.jsonl'}]", f"data.cache={tmp_path}",
        f"data.tokenizer={corpus / 'tokenizer.json'}",
    ])  # fmt: skip
    tokens = prepare(config.data).tokens("train").reshape(-1, config.train.stride)
    assert (tokens[:, 2] == 1).all() and (tokens[:, 4] == 0).all()
    assert config.model.n_ctx == 4, "a, b, = and the answer, which end-of-text follows"


def test_variables_of_an_equation_by_hand():
    values = {name: variable("3 5 = ") for name, variable in squares_mod(7).variables.items()}
    assert values == {"a_squared": "2", "minus_b_squared": "3", "sum": "1", "difference": "5"}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("The queens near the boy hurt", ["plural", "feminine", "singular"]),
        ("The actor that the tables saw taught", ["singular", "masculine", "plural"]),
    ],
)
def test_variables_of_a_reflexive_by_hand(prompt, expected):
    assert [variable(prompt) for variable in PROBING_TASKS["reflexive"].variables.values()] == expected


def test_answers_follow_from_the_variables():
    rng = random.Random(1)
    reflexive, verb = PROBING_TASKS["reflexive"], PROBING_TASKS["subject_verb"]
    for _ in range(300):
        pair = reflexive.draw(rng)
        for prompt, answer in ((pair.positive, pair.positive_answer), (pair.negative, pair.negative_answer)):
            number, gender = (reflexive.variables[name](prompt) for name in ("number", "gender"))
            pronoun = {"masculine": " himself", "feminine": " herself"}[gender]
            assert answer == (" themselves" if number == "plural" else pronoun)
        pair = verb.draw(rng)
        for prompt, answer in ((pair.positive, pair.positive_answer), (pair.negative, pair.negative_answer)):
            plural = answer in (" are", " were", " have")
            assert verb.variables["number"](prompt) == ("plural" if plural else "singular")


def test_the_prompts_of_a_pair_differ_in_one_word():
    rng = random.Random(2)
    for draw in (PROBING_TASKS["subject_verb"].draw, PROBING_TASKS["reflexive"].draw, squares_mod(7).draw):
        for _ in range(200):
            pair = draw(rng)
            words = list(zip(pair.positive.split(), pair.negative.split(), strict=True))
            assert sum(a != b for a, b in words) == 1, pair
            assert pair.positive_answer != pair.negative_answer


@pytest.mark.parametrize("name", ["subject_verb", "reflexive", "squares_mod_7"])
def test_they_are_pair_tasks_with_corrupted_partners(name, numbers, english):
    tokenizer = numbers if name.startswith("squares") else english
    data = encode_task(load_task(name), tokenizer, 16, "train", 0, 12, aligned=True)
    assert data.corrupted is not None and (data.corrupted != data.tokens).any(1).all()


def test_labels_travel_with_different_prompts(english, numbers):
    train, heldout = probe_data("subject_verb", None, english, (100, 100), 0, 12)
    assert train.variable == "number" and train.classes == ("plural", "singular")
    both = [*train.prompts.prompts, *heldout.prompts.prompts]
    assert len(set(both)) == len(both), "no prompt twice, on either side"
    for data in (train, heldout):
        for i, prompt in enumerate(data.prompts.prompts):
            assert data.classes[data.label[i]] == PROBING_TASKS["subject_verb"].variables["number"](prompt)
    train, _ = probe_data("squares_mod_7", "minus_b_squared", numbers, (100, 100), 0, 4, position=-2)
    assert train.classes == ("0", "3", "5", "6")
    assert (train.position == 1).all() and (train.prompts.last == 2).all()
    shuffled = train.shuffled(0)
    assert shuffled.label.bincount().tolist() == train.label.bincount().tolist()
    assert (shuffled.label != train.label).any() and shuffled.variable == "minus_b_squared, shuffled"


def test_what_cannot_be_probed_says_why(numbers):
    with pytest.raises(TaskError, match="known variables .subject_verb, reflexive, squares_mod_113 .*'lambda_func'"):
        probe_data("lambda_func", None, numbers, (8, 8), 0, 4)
    with pytest.raises(TaskError, match="of squares_mod_7 must be one of a_squared, .*difference, got 'cubes'"):
        probe_data("squares_mod_7", "cubes", numbers, (8, 8), 0, 4)
    with pytest.raises(TaskError, match="position must be within every prompt, got -9"):
        probe_data("squares_mod_7", None, numbers, (8, 8), 0, 4, position=-9)
    assert probing_task("squares_mod_2") is None
    with pytest.raises(TaskError, match="nearest names are .*reflexive"):
        load_task("reflexives")
