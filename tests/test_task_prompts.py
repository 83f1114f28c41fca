"""The prompts of the tasks: right answers complete valid Python, wrong ones do not."""

import ast
import random
import re
from itertools import islice

import pytest

from sparsetrain.task_prompts import Pair
from sparsetrain.tasks import TASKS, load_task

PAPER = (
    "single_double_quote final_kwarg set_or_string set_or_string_fixedvarname class_init with_as "
    "bracket_brace with_open bracket_counting for_while else_elif fstring_brace if_ternary var_swap "
    "indent_for lambda_func if_equals enumerate_range var_if while_return_true"
)
# What may follow the right answer on the positive and on the negative prompt, then what makes the best of the
# wrong one, or None where that can be made valid. BODY is an indented `pass`.
BODY = "<body>"
TAILS = {
    "single_double_quote": ("", "", "", ""),
    "final_kwarg": (f"):\n{BODY}", BODY, BODY, None),
    "set_or_string": ("(1)\n", " 1\n", None, None),
    "set_or_string_fixedvarname": ("(1)\n", " 1\n", None, None),
    "class_init": ("\n", "\n", None, None),
    "with_as": (f" as f:\n{BODY}", "", BODY, f" as f:\n{BODY}"),
    "bracket_brace": (" 1}\n", " 1]\n", " 1}\n", " 1]\n"),
    "bracket_counting": ("", "", "", ""),
    "for_while": (f" x:\n{BODY}", BODY, BODY, None),
    "else_elif": (BODY, f":\n{BODY}", f":\n{BODY}", BODY),
    "fstring_brace": ("x}')\n", "", None, None),
    "if_ternary": (BODY, " 1\n", " 1\n", BODY),
    "var_swap": ("\n", "\n", None, None),
    "indent_for": (" pass\n", " pass\n", None, " pass\n"),
    "lambda_func": (" None\n", f"):\n{BODY}", f"):\n{BODY}", " None\n"),
    "if_equals": (f" 1:\n{BODY}", " 1\n", f" 1:\n{BODY}", None),
    "enumerate_range": (f"(x):\n{BODY}", f"(3):\n{BODY}", None, None),
    "var_if": (BODY, "", BODY, BODY),
    "while_return_true": (BODY, "", BODY, BODY),
}
READ = {"input", "source", "src", "in", "old", "template", "original", "config"}
WRITTEN = {"output", "target", "dst", "dest", "out", "new", "result", "copy", "report", "backup"}


def draw(name: str, n: int, seed: int = 0) -> list[Pair]:
    return list(islice(TASKS[name].candidates("train", random.Random(seed)), n))


def is_valid(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def completed(prompt: str, answer: str, tail: str) -> str:
    last_line = prompt.rstrip("\n").rpartition("\n")[2]
    body = " " * (len(last_line) - len(last_line.lstrip()) + 4) + "pass\n"
    return prompt + answer + tail.replace(BODY, body)


def last_line(prompt: str) -> str:
    return prompt.rpartition("\n")[2].strip()


def test_the_twenty_tasks_of_the_paper():
    assert list(TASKS) == [*PAPER.split(), "ioi", "greater_than", "gendered_pronoun", "docstring"]
    assert all(load_task(name) is task and task.description for name, task in TASKS.items())


@pytest.mark.parametrize("name", TAILS)
def test_right_answers_make_valid_python_and_wrong_ones_do_not(name):
    right_first, right_second, wrong_first, wrong_second = TAILS[name]
    for pair in draw(name, 100):
        assert is_valid(completed(pair.positive, pair.positive_answer, right_first)), pair
        assert is_valid(completed(pair.negative, pair.negative_answer, right_second)), pair
        if wrong_first is not None:
            assert not is_valid(completed(pair.positive, pair.negative_answer, wrong_first)), pair
        if wrong_second is not None:
            assert not is_valid(completed(pair.negative, pair.positive_answer, wrong_second)), pair


@pytest.mark.parametrize("name", ["set_or_string", "set_or_string_fixedvarname"])
def test_the_initial_value_has_the_method(name):
    for pair in draw(name, 50):
        for prompt, method in ((pair.positive, "add"), (pair.negative, "strip")):
            variable = last_line(prompt)
            value = re.findall(rf"^ *{variable} = (.*)$", prompt, flags=re.MULTILINE)[-1]
            assert hasattr(ast.literal_eval(value) if value != "set()" else set(), method)
            assert variable == "current" or name == "set_or_string"


def test_class_init_copies_an_argument():
    for pair in draw("class_init", 50):
        for prompt, right, wrong in (
            (pair.positive, pair.positive_answer, pair.negative_answer),
            (pair.negative, pair.negative_answer, pair.positive_answer),
        ):
            assert last_line(prompt) == f"self.{right.strip()} ="
            arguments = re.search(r"__init__\(self, (.*)\)", prompt)[1].split(", ")
            assert {right.strip(), wrong.strip()} <= set(arguments)
            assert not {f"self.{right} =", f"self.{wrong} ="} & set(prompt.splitlines()[:-1])


def test_with_open_reads_sources_and_writes_targets():
    for pair in draw("with_open", 100):
        first, second = (re.findall(r"[a-z]+", last_line(p)) for p in (pair.positive, pair.negative))
        ((read, written),) = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
        assert read in READ and written in WRITTEN
        assert (pair.positive_answer, pair.negative_answer) == ("r", "w")
        manages = last_line(pair.positive).startswith("with")
        assert is_valid(pair.positive + "r" + pair.positive[-1] + (") as f: pass" if manages else ")"))


def test_an_f_string_inserts_and_a_plain_string_does_not():
    for pair in draw("fstring_brace", 50):
        trees = [ast.parse(prompt + pair.positive_answer + "x}')") for prompt in (pair.positive, pair.negative)]
        inserts = [any(isinstance(node, ast.FormattedValue) for node in ast.walk(tree)) for tree in trees]
        assert inserts == [True, False]


def test_var_swap_swaps():
    for pair in draw("var_swap", 50):
        for prompt, answer in ((pair.positive, pair.positive_answer), (pair.negative, pair.negative_answer)):
            values = {pair.positive_answer.strip(): 1, pair.negative_answer.strip(): 2}
            before = dict(values)
            exec(last_line(prompt) + answer, {}, values)
            assert values == {name: 3 - value for name, value in before.items()}


def test_indent_for_asks_for_one_level_less_the_last_space():
    for pair in draw("indent_for", 50):
        for prompt, answer in ((pair.positive, pair.positive_answer), (pair.negative, pair.negative_answer)):
            loop = prompt.splitlines()[-1]
            assert loop.strip().startswith("for ") and prompt.endswith(":\n")
            assert len(answer) == len(loop) - len(loop.lstrip()) + 3


def test_enumerate_has_two_loop_variables():
    for pair in draw("enumerate_range", 50):
        assert re.fullmatch(r"for \w+, \w+ in", last_line(pair.positive))
        assert re.fullmatch(r"for \w+ in", last_line(pair.negative))


@pytest.mark.parametrize("name", PAPER.split())
def test_prompts_of_a_pair_differ_in_one_line(name):
    for pair in draw(name, 50):
        first, second = pair.positive.split("\n"), pair.negative.split("\n")
        assert sum(a != b for a, b in zip(first, second, strict=True)) == 1
        assert not re.search(r"[ \t]+\n|\t|\{[a-z]|<", pair.positive.replace(" < ", "")), "stray blank or field"
