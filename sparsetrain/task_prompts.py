"""The prompts of the twenty tasks: one short generator a task.

A generator takes a seeded `random.Random` and returns one `Pair`; its name is the task's name and the first
line of its docstring the task's description. Answers are given as a tokenizer meets them in a file, with what
the pre-tokenizer joins to them (`')` before a line break is `')\\n`): that is the token that training makes
likely.

Source: Gao et al. 2025, Table 1 names tasks and facts; the prompts are not published, these are ours.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from sparsetrain.task_fragments import (
    OPENERS,
    Names,
    before_def,
    block,
    draw_names,
    fill,
    function_name,
    in_class,
    in_function,
    indentation,
    words,
)

ACCUMULATORS = words(
    "seen result names keys words found missing output lines tokens chunks visited known done ready pending "
    "extra unused used labels tags codes paths matches modules classes fields values letters symbols targets "
    "text body"
)
STRING_ITEMS = words(
    "red green blue black white on off yes no left right top bottom name type value size mode host port user "
    "path get set read write open close start end first last GET POST int str float bool list dict ascii"
)
CALLS = (
    "print(",
    "raise ValueError(",
    "raise TypeError(",
    "raise RuntimeError(",
    "log.debug(",
    "logger.info(",
    "warnings.warn(",
    "parser.error(",
    "sys.exit(",
    "self.write(",
    "{a}.write(",
    "{a} = self.error(",
)
CLOSED_PHRASES = ("{noun}", "{verb}", "{noun} not found", "{noun} is required", "{verb} the {noun} first")
OPEN_PHRASES = (
    "{adjective} {noun}",
    "cannot {verb} {noun}",
    "could not {verb} {noun}",
    "no such {noun}",
    "expected {noun}",
    "failed to {verb} {noun}",
)
ACCUMULATE = (
    "for {item} in {items}:\n    {variable}",
    "for {item} in {items}:\n    if {item} not in {a}:\n        {variable}",
    "for {item} in {items}:\n    if {item}.{a}:\n        continue\n    {variable}",
    "for {a}, {b} in {items}.items():\n    {variable}",
    "while {items}:\n    {item} = {items}.pop()\n    {variable}",
    "if {a} is not None:\n    {variable}",
)
CONTEXT_MANAGERS = (
    "open({a}",
    "open({a}, {b}",
    "open(self.{a}",
    "open({a}, encoding={b}",
    "io.open({a}",
    "zipfile.ZipFile({a}",
    "tarfile.open({a}",
    "os.scandir({a}",
    "socket.create_connection({a}",
    "subprocess.Popen({a}",
    "closing({a}",
    "self.{verb}({a}",
)
CONDITIONS = (
    "{a}",
    "not {a}",
    "{a}.{b}",
    "{a} is None",
    "{a} is not None",
    "{a} == {b}",
    "{a} > 0",
    "{item} in {items}",
)
BRANCH_CONDITIONS = (
    "{a} is None",
    "{a} == 0",
    "{a} > {b}",
    "{a} in {items}",
    "not {a}",
    "{a} == {b}",
    "{a} < 1",
)
BLOCK_STATEMENTS = ("{b} = 0", "{b} += 1", "{b} = {c}", "self.{verb}()", "{b} = {c}.{verb}()")
BRANCH_BODIES = (*BLOCK_STATEMENTS, "return None", "return {b}", "pass")
FILE_PAIRS = (  # read, written
    ("input", "output"),
    ("config", "report"),
    ("source", "backup"),
    ("source", "target"),
    ("src", "dst"),
    ("source", "dest"),
    ("in", "out"),
    ("old", "new"),
    ("template", "result"),
    ("original", "copy"),
)
OPEN_CALLS = (
    "open({q}<file>.{extension}{q}, {q}",
    "open({q}<file>_{noun}.{extension}{q}, {q}",
    "open(<file>_file, {q}",
    "open(<file>_path, {q}",
    "open(self.<file>_file, {q}",
    "open(args.<file>_name, {q}",
    "open(os.path.join(directory, {q}<file>.{extension}{q}), {q}",
)
EXTENSIONS = ("txt", "csv", "json", "html", "py", "log", "xml")
ITERABLES = ("{items}", "{a}.{b}", "range({a})", "{items}.items()", "self.{items}", "sorted({items})")


@dataclass(frozen=True)
class Pair:
    """Two prompts that differ in one fact, and their right next tokens.

    On `positive` the right answer is `positive_answer` and the wrong one `negative_answer`; on `negative` the
    other way round.
    """

    positive: str
    negative: str
    positive_answer: str
    negative_answer: str


def _message(rng: random.Random, names: Names, phrases: tuple[str, ...], opening: str) -> str:
    """A statement up to the last word of a call's text; `opening` stands before its first word."""
    phrase = fill(rng, rng.choice(phrases), names)
    return fill(rng, rng.choice(CALLS), names) + opening + rng.choice((phrase, phrase.capitalize()))


def single_double_quote(rng: random.Random) -> Pair:
    """A string closes with the quote that opened it: `('` with `')`, `("` with `")`.

    Differs: the answers hold the line break, which the pre-tokenizer joins to them.
    """
    names = draw_names(rng)
    lead = in_function(rng, names)
    call = _message(rng, names, CLOSED_PHRASES + OPEN_PHRASES, "<quote>")
    return Pair(lead + call.replace("<quote>", "'"), lead + call.replace("<quote>", '"'), "')\n", '")\n')


def final_kwarg(rng: random.Random) -> Pair:
    """After arguments with defaults the last one needs a default too: `=None`, otherwise `):`."""
    names = draw_names(rng)
    lead = before_def(rng)
    head = f"{lead}def {function_name(rng)}({'self, ' if indentation(lead) else ''}"
    earlier = [names.a, names.b, names.c, names.x][: rng.randint(1, 4)]
    defaults = [rng.choice(("None", "None", "None", "0", "False", "True")) for _ in earlier]
    keywords = ", ".join(f"{name}={default}" for name, default in zip(earlier, defaults, strict=True))
    return Pair(f"{head}{keywords}, {names.y}", f"{head}{', '.join(earlier)}, {names.y}", "=None", "):\n")


def _set_or_string(rng: random.Random, variable: str) -> Pair:
    names = draw_names(rng)
    lead = in_function(rng, names)
    loop = fill(rng, rng.choice(ACCUMULATE), names, variable=variable)
    string = rng.choice(('""', "''"))
    first, second = (block(lead, f"{variable} = {value}\n{loop}") for value in ("set()", string))
    return Pair(first, second, ".add", " +=")


def set_or_string(rng: random.Random) -> Pair:
    """A variable that began as `set()` goes on with `.add`, one that began as a string with ` +=`."""
    return _set_or_string(rng, rng.choice(ACCUMULATORS))


def set_or_string_fixedvarname(rng: random.Random) -> Pair:
    """As set_or_string, with the variable always called `current`."""
    return _set_or_string(rng, "current")


def class_init(rng: random.Random) -> Pair:
    """Among lines `self.x = x` the name after `=` is the attribute's own."""
    names = draw_names(rng)
    arguments = [names.a, names.b, names.c, names.x, names.y, names.z][: rng.randint(3, 6)]
    n_assigned = rng.randint(1, len(arguments) - 2)
    lead = block(in_class(rng), f"def __init__(self, {', '.join(arguments)}):\n    ")
    lead = block(lead, "".join(f"self.{name} = {name}\n" for name in arguments[:n_assigned]))
    first, second = rng.sample(arguments[n_assigned:], 2)
    return Pair(f"{lead}self.{first} =", f"{lead}self.{second} =", f" {first}", f" {second}")


def with_as(rng: random.Random) -> Pair:
    """A call after `with` goes on behind its bracket (` as`), a call in an assignment ends the line.

    Differs: the paper asks for ` as` or not. A bracket that ends its line is one token with the line break,
    so a prompt that ends in a bare `)` has ruled the assignment out: we ask for the bracket.
    """
    names = draw_names(rng)
    lead = in_function(rng, names)
    call = fill(rng, rng.choice(CONTEXT_MANAGERS), names)
    variable = rng.choice(("f", "fp", "file", "stream", "result", "self.file"))
    return Pair(f"{lead}with {call}", f"{lead}{variable} = {call}", ")", ")\n")


def bracket_brace(rng: random.Random) -> Pair:
    """After a string in a dictionary's key place comes `:`, after one in a list `,`.

    Differs: keys are strings, as most are, so the closing quote is part of the answer.
    """
    names = draw_names(rng)
    lead = in_function(rng, names)
    head = fill(rng, rng.choice(("{a} = ", "self.{a} = ", "return ", "{a}.{b} = ")), names)
    *items, last = rng.sample(STRING_ITEMS, 2 * rng.randint(1, 3) + 1)
    keyed = ", ".join(f"'{key}': '{value}'" for key, value in zip(items[::2], items[1::2], strict=True))
    listed = ", ".join(f"'{item}'" for item in items)
    return Pair(f"{lead}{head}{{{keyed}, '{last}", f"{lead}{head}[{listed}, '{last}", "':", "',")


def with_open(rng: random.Random) -> Pair:
    """A file is opened for reading or for writing by its name: `r` against `w` after the quote.

    Differs: the paper's `'r'` is several tokens here, so the prompt holds the quote, the answer the letter.
    """
    names = draw_names(rng)
    lead = in_function(rng, names)
    head = rng.choice(("with ", "f = ", "fp = ", "file = ", "{b} = "))
    given = {"extension": rng.choice(EXTENSIONS), "q": rng.choice("''\"")}
    call = fill(rng, head + rng.choice(OPEN_CALLS), names, **given)
    read, written = rng.choice(FILE_PAIRS)
    return Pair(lead + call.replace("<file>", read), lead + call.replace("<file>", written), "r", "w")


def bracket_counting(rng: random.Random) -> Pair:
    """A nested list closes with `]]`, a flat one with `]`.

    Differs: where `]]` with its line break is two tokens, the answers are `]`, which another bracket follows,
    and `]` with the break.
    """
    names = draw_names(rng)
    lead = in_function(rng, names)
    head = fill(rng, rng.choice(("{a} = ", "self.{a} = ", "{a} += ", "return ", "yield ")), names)
    largest = rng.choice((9, 99))
    items = ", ".join(str(rng.randint(0, largest)) for _ in range(rng.randint(2, 8)))
    return Pair(f"{lead}{head}[[{items}", f"{lead}{head}[{items}", "]]\n", "]\n")


def for_while(rng: random.Random) -> Pair:
    """After `for x` comes ` in`, after `while x` comes `:`."""
    names = draw_names(rng)
    lead = in_function(rng, names)
    name = rng.choice((names.item, names.a))
    return Pair(f"{lead}for {name}", f"{lead}while {name}", " in", ":\n")


def else_elif(rng: random.Random) -> Pair:
    """After `else` comes `:`, after `elif` the variable that the `if` tested."""
    names = draw_names(rng)
    condition, body = (fill(rng, rng.choice(kind), names) for kind in (BRANCH_CONDITIONS, BRANCH_BODIES))
    lead = block(in_function(rng, names), f"if {condition}:\n    {body}\n")
    return Pair(f"{lead}else", f"{lead}elif", ":\n", f" {names.a}")


def fstring_brace(rng: random.Random) -> Pair:
    """An f-string goes on with a variable in braces, a plain string closes."""
    names = draw_names(rng)
    lead = in_function(rng, names)
    call = _message(rng, names, OPEN_PHRASES, "<f>'")
    return Pair(lead + call.replace("<f>", "f"), lead + call.replace("<f>", ""), " {", "')\n")


def if_ternary(rng: random.Random) -> Pair:
    """The condition of an `if` statement ends with `:`, that of a ternary with ` else`."""
    names = draw_names(rng)
    lead = in_function(rng, names)
    condition = fill(rng, rng.choice(CONDITIONS), names)
    head = fill(rng, rng.choice(("{c} = ", "self.{c} = ", "return ")), names)
    value = fill(rng, rng.choice(("{a}", "{b}", "self.{b}", "len({items})", "0", "1", "None", "True")), names)
    return Pair(f"{lead}if {condition}", f"{lead}{head}{value} if {condition}", ":\n", " else")


def var_swap(rng: random.Random) -> Pair:
    """A swap `x, y = y,` ends with its first variable, `x`."""
    names = draw_names(rng)
    condition = rng.choice(("", "if {a} > {b}:\n    ", "if {a} < {b}:\n    ", "if {c}:\n    "))
    lead = block(in_function(rng, names), fill(rng, condition, names))
    first, second = (f"{lead}{a}, {b} = {b}," for a, b in ((names.a, names.b), (names.b, names.a)))
    return Pair(first, second, f" {names.a}", f" {names.b}")


def indent_for(rng: random.Random) -> Pair:
    """The line after a `for` line is one level deeper than it.

    The `for` line stands in or after an indented block. The pre-tokenizer gives the last space of an
    indentation to the word that follows, so the answers are 4n - 1 spaces.
    """
    names = draw_names(rng)
    opener, statement = (fill(rng, rng.choice(kind), names) for kind in (OPENERS, BLOCK_STATEMENTS))
    lead = block(in_function(rng, names), f"{opener}\n    {statement}\n")
    loop = fill(rng, f"for {{item}} in {rng.choice(ITERABLES)}:\n", names)
    shallow = indentation(lead) + "   "
    return Pair(f"{lead}{loop}", f"{lead}    {loop}", shallow, f"{shallow}    ")


def lambda_func(rng: random.Random) -> Pair:
    """After `lambda x` comes `:`, after `def x` its opening bracket.

    Differs: the definition is a method, and the pre-tokenizer joins the bracket to `self`.
    """
    names = draw_names(rng)
    attributes = rng.choice(("", "{x} = None\n\n", "{x} = {y} = 0\n\n", "{x} = True\n{y} = None\n\n"))
    lead = block(in_class(rng), fill(rng, attributes, names))
    return Pair(f"{lead}{names.a} = lambda {names.b}", f"{lead}def {names.b}", ":", "(self")


def _variable(rng: random.Random, names: Names) -> str:
    """Something that can be both tested and assigned."""
    return fill(rng, rng.choice(("{a}", "{a}", "self.{a}", "{b}.{a}")), names)


def if_equals(rng: random.Random) -> Pair:
    """A variable after `if` goes on with ` ==`, one that begins its line with ` =`."""
    names = draw_names(rng)
    lead, variable = in_function(rng, names), _variable(rng, names)
    return Pair(f"{lead}if {variable}", f"{lead}{variable}", " ==", " =")


def enumerate_range(rng: random.Random) -> Pair:
    """A loop over an index and an item takes `enumerate`, one over an index alone `range`."""
    names = draw_names(rng)
    lead = in_function(rng, names)
    index = rng.choice(("i", "i", "i", "j", "k", "n", "idx"))
    return Pair(f"{lead}for {index}, {names.item} in", f"{lead}for {index} in", " enumerate", " range")


def var_if(rng: random.Random) -> Pair:
    """A comparison with a constant after `if` ends with `:`, an assignment of the constant with its line."""
    names = draw_names(rng)
    lead, variable = in_function(rng, names), _variable(rng, names)
    test = rng.choice(("== True", "== False", "is True", "is False", "is None"))
    constant = test.split()[1]
    return Pair(f"{lead}if {variable} {test}", f"{lead}{variable} = {constant}", ":\n", "\n")


def while_return_true(rng: random.Random) -> Pair:
    """After `while True` comes `:`, after `return True` the line ends."""
    lead = in_function(rng, draw_names(rng))
    return Pair(f"{lead}while True", f"{lead}return True", ":\n", "\n")


GENERATORS: tuple[Callable[[random.Random], Pair], ...] = (
    single_double_quote,
    final_kwarg,
    set_or_string,
    set_or_string_fixedvarname,
    class_init,
    with_as,
    bracket_brace,
    with_open,
    bracket_counting,
    for_while,
    else_elif,
    fstring_brace,
    if_ternary,
    var_swap,
    indent_for,
    lambda_func,
    if_equals,
    enumerate_range,
    var_if,
    while_return_true,
)
# Their answers are names: half a name would be another task.
NAME_ANSWERS = (class_init, else_elif, var_swap)
