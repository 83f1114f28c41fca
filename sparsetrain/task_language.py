"""Four tasks on English text and a docstring, whose prompts have corrupted partners: one short generator a task.

They are made for GPT-2's tokenizer, and serve any other in which the names, numbers and words that a partner exchanges
are single tokens: a name with the blank before it, the two last digits of a year without. In GPT-2's all
names, arguments and numbers of two digits are; of the years it reads some otherwise (half of those that begin with 11),
and pairs with such a year are left out. A prompt begins with its first word; no end-of-text token stands before it.

Source: the tasks are published (named at each); sentences, words and names here are ours.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from sparsetrain.task_fragments import ADJECTIVES, COLLECTIONS, NAMES, NOUNS, VERBS, words
from sparsetrain.task_prompts import Pair

Both = tuple[tuple[str, ...], ...]  # for the positive and for the negative prompt

WOMEN = words(
    "Mary Linda Elizabeth Barbara Susan Jessica Sarah Karen Lisa Nancy Margaret Emily Donna Michelle Carol Amanda "
    "Laura Rebecca Amy Angela Anna Ruth Nicole Katherine Christine Emma Catherine Rachel Maria Diana Julia Grace "
    "Jane Alice Kate Claire"
)
MEN = words(
    "John James Robert Michael William David Richard Joseph Thomas Daniel Matthew Mark Steven Paul Andrew Kevin "
    "Brian George Edward Timothy Jason Ryan Eric Stephen Justin Scott Benjamin Samuel Frank Alexander Patrick "
    "Jack Henry Adam Peter Simon"
)
PLACES = words(
    "library market station harbour museum office kitchen school theatre stadium hotel bakery beach park church "
    "airport farm bridge castle workshop"
)
OBJECTS = words(
    "book letter ticket key basket lamp coat apple map coin ring camera newspaper bottle umbrella guitar blanket "
    "candle knife flower"
)
ARGUMENTS = [name for name in NAMES if len(name) > 1 and name != "cls"]
GIVING = (
    "After {a} and {b} came back from the {place}, {giver} handed the {object} to",
    "While {a} and {b} were waiting at the {place}, {giver} offered the {object} to",
    "Yesterday {a} and {b} met at the {place}, where {giver} lent the {object} to",
    "Once {a} and {b} had reached the {place}, {giver} passed the {object} to",
    "Last week {a} ran into {b} at the {place}, and {giver} returned the {object} to",
    "At the {place} {a} sat down beside {b}, and soon {giver} showed the {object} to",
    "Although {a} seldom talked with {b} at the {place}, {giver} sold the {object} to",
    "Before {a} and {b} left the {place}, {giver} threw the {object} to",
)
EVENTS = words(
    "siege expedition famine rebellion voyage trial drought crusade occupation truce plague campaign feud "
    "festival exile migration embargo uprising blockade restoration alliance dispute quarrel survey"
)
LASTING = (
    "The {event} began in {start} and ended in {century}",
    "The {event} that started in {start} was over in {century}",
    "Records of the {event} run from {start} until {century}",
    "People say the {event} went on from {start} till {century}",
)
CENTURIES = range(11, 18)
TWO_DIGITS = tuple(f"{number:02d}" for number in range(100))
OPENINGS = (
    "I am sure that",
    "Everybody says that",
    "As far as I know,",
    "To be honest,",
    "You told me that",
    "We all agree that",
    "My neighbour thinks that",
    "According to the teacher,",
    "It seems that",
)
STATEMENTS = (
    "is a careful driver, isn't",
    "is very good at chess, isn't",
    "is away until Monday, isn't",
    "was the first to arrive, wasn't",
    "was late again this morning, wasn't",
    "was born in this village, wasn't",
    "has worked here for years, hasn't",
    "has lost the keys again, hasn't",
    "will come back soon, won't",
    "will pay for the tickets, won't",
    "can repair almost anything, can't",
    "can speak four languages, can't",
    "likes long walks, doesn't",
    "knows the way home, doesn't",
    "plays the piano well, doesn't",
    "won the second prize, didn't",
    "forgot to lock the door, didn't",
    "wrote a long letter, didn't",
)


@dataclass(frozen=True)
class AlignedPair(Pair):
    """A pair whose prompts differ from their corrupted partners in whole tokens, and in these alone.

    Attributes:
        changed: the tokens of each prompt that its partner has others in place of, in order.
        partners: the corrupted partner of each prompt; None: the other prompt.
        right, wrong: all right and all wrong answers of each prompt, where there are several, each one token. The first
            of them stand for the others where one token is asked for.
    """

    changed: Both
    partners: tuple[str, str] | None = None
    right: Both | None = None
    wrong: Both | None = None


def ioi(rng: random.Random) -> AlignedPair:
    """Of two people one gives something; it goes to the other.

    The partner names the other person as the giver, so of the two one has the order ABBA, the other BABA.

    Source: Wang et al. 2022. Differs: their corrupted prompts have three other names (ABC), and ours the other answer.
    """
    a, b = rng.sample(WOMEN + MEN, 2)
    given = {"a": a, "b": b, "place": rng.choice(PLACES), "object": rng.choice(OBJECTS)}
    sentence = rng.choice(GIVING)
    first, second = rng.sample((a, b), 2)
    positive, negative = (sentence.format(giver=giver, **given) for giver in (first, second))
    return AlignedPair(positive, negative, f" {second}", f" {first}", ((f" {first}",), (f" {second}",)))


def greater_than(rng: random.Random) -> AlignedPair:
    """What began in a year ends in a later one: its two last digits are greater.

    Right are all greater numbers of two digits, wrong all others. The corrupted partner begins in the year 01.
    The two prompts of a pair begin in years y and 98 - y: a model that knows nothing of the year is right on one.

    Source: Hanna et al. 2023. Differs: they draw single prompts, and years from 02 to 98; ours go from 02 to 96.
    """
    sentence, event, century = rng.choice(LASTING), rng.choice(EVENTS), rng.choice(CENTURIES)
    year = rng.choice([year for year in range(2, 97) if year != 49])
    years = year, 98 - year
    positive, negative, partner = (
        sentence.format(event=event, start=f"{century}{TWO_DIGITS[year]}", century=century) for year in (*years, 1)
    )
    return AlignedPair(
        positive,
        negative,
        *(TWO_DIGITS[year + 1] for year in years),
        changed=tuple((TWO_DIGITS[year],) for year in years),
        partners=(partner, partner),
        right=tuple(TWO_DIGITS[year + 1 :] for year in years),
        wrong=tuple(TWO_DIGITS[year::-1] for year in years),
    )


def gendered_pronoun(rng: random.Random) -> AlignedPair:
    """A question after a statement takes ` she` for a woman's name and ` he` for a man's.

    Source: Mathwin et al. 2023.
    """
    opening, statement = rng.choice(OPENINGS), rng.choice(STATEMENTS)
    woman, man = rng.choice(WOMEN), rng.choice(MEN)
    positive, negative = (f"{opening} {name} {statement}" for name in (woman, man))
    return AlignedPair(positive, negative, " she", " he", ((f" {woman}",), (f" {man}",)))


def docstring(rng: random.Random) -> AlignedPair:
    """A docstring documents a function's arguments in their order.

    In the partner the next argument has changed places with a later one.

    Source: Heimersheim and Janiak 2023. Differs: their names and descriptions are random words, and their corrupted
    prompts have other random names in the definition, the docstring or both; ours exchange two names.
    """
    arguments = rng.sample(ARGUMENTS, rng.randint(4, 6))
    n_documented = rng.randint(1, min(3, len(arguments) - 2))
    later = rng.randrange(n_documented + 1, len(arguments))
    swapped = list(arguments)
    swapped[n_documented], swapped[later] = arguments[later], arguments[n_documented]
    nouns = [noun for noun in NOUNS if noun not in arguments]
    head = f"def {rng.choice(VERBS)}_{rng.choice(nouns)}(self, "
    summary = f"{rng.choice(VERBS).capitalize()} the {rng.choice(COLLECTIONS)}."
    documented = "".join(
        f"    :param {name}: {rng.choice(ADJECTIVES)} {rng.choice(nouns)}\n" for name in arguments[:n_documented]
    )
    positive, negative = (
        f'{head}{", ".join(order)}):\n    """{summary}\n\n{documented}    :param' for order in (arguments, swapped)
    )
    first, second = f" {arguments[n_documented]}", f" {arguments[later]}"
    return AlignedPair(positive, negative, first, second, ((first, second), (second, first)))


LANGUAGE_GENERATORS: tuple[Callable[[random.Random], AlignedPair], ...] = (
    ioi,
    greater_than,
    gendered_pronoun,
    docstring,
)
