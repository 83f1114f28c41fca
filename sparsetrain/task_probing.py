"""Tasks whose prompts have a known intermediate variable: modular arithmetic, agreement, reflexives.

A variable is a function from a prompt's text to its value, as text. The draws are pairs of prompts as in
`task_prompts`, so that the same tasks serve every method.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from sparsetrain.files import write_whole
from sparsetrain.task_fragments import words
from sparsetrain.task_prompts import Pair

Variable = Callable[[str], str]

# Singular and plural of nouns for people, by the gender of the reflexive pronoun; and of things.
PEOPLE = {
    "masculine": (("king", "kings"), ("boy", "boys"), ("man", "men"), ("father", "fathers"), ("son", "sons"),
                  ("brother", "brothers"), ("uncle", "uncles"), ("prince", "princes"), ("husband", "husbands"),
                  ("actor", "actors"), ("waiter", "waiters"), ("monk", "monks")),
    "feminine": (("queen", "queens"), ("girl", "girls"), ("woman", "women"), ("mother", "mothers"),
                 ("daughter", "daughters"), ("sister", "sisters"), ("aunt", "aunts"), ("princess", "princesses"),
                 ("wife", "wives"), ("actress", "actresses"), ("waitress", "waitresses"), ("nun", "nuns")),
}  # fmt: skip
THINGS = (("table", "tables"), ("car", "cars"), ("house", "houses"), ("tree", "trees"), ("door", "doors"),
          ("book", "books"), ("picture", "pictures"), ("window", "windows"), ("garden", "gardens"),
          ("bridge", "bridges"), ("church", "churches"), ("boat", "boats"))  # fmt: skip
NOUNS = {number: {forms[n] for forms in (*PEOPLE["masculine"], *PEOPLE["feminine"], *THINGS)}
         for n, number in enumerate(("singular", "plural"))}  # fmt: skip
GENDERS = {gender: {noun for forms in nouns for noun in forms} for gender, nouns in PEOPLE.items()}
PLACES = words("near behind beside above opposite")
# Past tense throughout: it is the same for one and for many.
SEEN = words("saw liked heard helped watched knew met found")
HURT = words("hurt blamed praised helped watched taught trusted surprised")
VERBS = ((" is", " are"), (" was", " were"), (" has", " have"))


@dataclass(frozen=True)
class ProbingTask:
    """Pairs of prompts with what is known of each prompt.

    Attributes:
        draw: one pair from a seeded source of chance; its docstring describes the task.
        variables: by name, what a model may compute on the way to its answer.
        absent: the names of variables that the answer does not depend on by themselves: controls.
    """

    draw: Callable[[random.Random], Pair]
    variables: dict[str, Variable]
    absent: tuple[str, ...] = ()


def subject_verb(rng: random.Random) -> Pair:
    """A verb agrees with its subject, not with the noun that stands between them: `is` against `are`."""
    subject, other = rng.sample((*PEOPLE["masculine"], *PEOPLE["feminine"], *THINGS), 2)
    between = _between(rng, rng.choice(other))
    one, many = rng.choice(VERBS)
    return Pair(f"The {subject[0]} {between}", f"The {subject[1]} {between}", one, many)


def reflexive(rng: random.Random) -> Pair:
    """A reflexive pronoun agrees with its antecedent: `himself`, `herself` or `themselves`."""
    (men, women), n = rng.sample((*PEOPLE.values(),), 2), rng.randrange(len(PEOPLE["masculine"]))
    pronouns = {"masculine": " himself", "feminine": " herself"}
    gender = next(g for g, nouns in PEOPLE.items() if nouns is men)
    other = rng.choice(rng.choice((*PEOPLE["masculine"], *PEOPLE["feminine"])))
    rest = f"{_between(rng, other)} {rng.choice(HURT)}"
    if rng.random() < 0.5:
        return Pair(f"The {men[n][0]} {rest}", f"The {men[n][1]} {rest}", pronouns[gender], " themselves")
    opposite = next(g for g in PEOPLE if g != gender)
    return Pair(f"The {men[n][0]} {rest}", f"The {women[n][0]} {rest}", pronouns[gender], pronouns[opposite])


def squares_mod(p: int) -> ProbingTask:
    """The task of a^2 - b^2 mod p, whose intermediate variables are a^2 and -b^2.

    Source: Lepori et al. 2023, where p is 113.
    """

    def draw(rng: random.Random) -> Pair:
        a, b, other = rng.randrange(p), rng.randrange(p), rng.randrange(p)
        while (a * a - other * other) % p == 0:
            other = rng.randrange(p)
        first, second = ((a, b), (other, b)) if rng.random() < 0.5 else ((b, a), (b, other))
        return Pair(equation(*first), equation(*second), str(_squares(*first, p)), str(_squares(*second, p)))

    draw.__name__ = f"squares_mod_{p}"
    draw.__doc__ = f"The difference of two squares modulo {p}: `3 2 =` with `{5 % p}`."
    values = {
        "a_squared": lambda a, b: a * a, "minus_b_squared": lambda a, b: -b * b,
        "sum": lambda a, b: a + b, "difference": lambda a, b: a - b,
    }  # fmt: skip
    variables = {name: _modular(value, p) for name, value in values.items()}
    return ProbingTask(draw, variables, absent=("sum", "difference"))


def equation(a: int, b: int) -> str:
    """The prompt that asks for a^2 - b^2; the answer's token follows."""
    return f"{a} {b} = "


def write_squares(folder: str | Path, p: int) -> None:
    """Write a corpus of all p^2 equations and its tokenizer: what `configs/modular.yaml` trains on.

    With its end-of-text each equation is 5 tokens: sequences that begin at multiples of 5 begin with a.

    Args:
        folder: gets `equations.jsonl`, one document an equation, and `tokenizer.json`, one token a word.
        p: the modulus, at least 3.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(a, b) for a in range(p) for b in range(p)]
    rows = [json.dumps({"text": f"{equation(a, b)}{_squares(a, b, p)}"}) + "\n" for a, b in pairs]
    write_whole(folder / "equations.jsonl", "".join(rows).encode())
    names = ["<|endoftext|>", "=", *map(str, range(p))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    write_whole(folder / "tokenizer.json", tokenizer.to_str().encode())


def probing_task(name: str) -> ProbingTask | None:
    """The task of this name, if there is one: `subject_verb`, `reflexive`, or `squares_mod_` with a number from 3."""
    if modulus := re.fullmatch(r"squares_mod_(\d{1,3})", name):
        return squares_mod(int(modulus[1])) if int(modulus[1]) >= 3 else None
    return PROBING_TASKS.get(name)


def _between(rng: random.Random, noun: str) -> str:
    return rng.choice((f"{rng.choice(PLACES)} the {noun}", f"that the {noun} {rng.choice(SEEN)}"))


def _squares(a: int, b: int, p: int) -> int:
    return (a * a - b * b) % p


def _modular(value: Callable[[int, int], int], p: int) -> Variable:
    return lambda prompt: str(value(*map(int, re.findall(r"\d+", prompt))) % p)


def _noun(order: int, classes: dict[str, set[str]]) -> Variable:
    """Which class the first noun of a prompt is in (order 0), or the second."""
    every = set().union(*classes.values())

    def value(prompt: str) -> str:
        noun = [word for word in prompt.split() if word in every][order]
        return next(name for name, members in classes.items() if noun in members)

    return value


PROBING_TASKS = {
    "subject_verb": ProbingTask(
        subject_verb, {"number": _noun(0, NOUNS), "number_of_the_other": _noun(1, NOUNS)}, ("number_of_the_other",)
    ),
    "reflexive": ProbingTask(
        reflexive,
        {"number": _noun(0, NOUNS), "gender": _noun(0, GENDERS), "number_of_the_other": _noun(1, NOUNS)},
        ("number_of_the_other",),
    ),
}
