"""Fragments of ordinary Python that the tasks' prompts share: words, statements, and the code around a line.

Everything here draws from a seeded `random.Random`. A *lead* is source text that ends where the next
statement begins: in its indentation.
"""

import random
import re
from dataclasses import dataclass, replace


def words(text: str) -> list[str]:
    """The words of a text: long lists are easier to read so."""
    return text.split()


NAMES = words(
    "name path data value key line text file mode code size count index offset length start end pos state "
    "status type kind level flag version prefix suffix encoding errors buffer chunk message msg header "
    "host port address url user timeout limit width height depth parent child node root left right token "
    "tag field method module package target source default option parser reader writer stream handler "
    "callback event queue lock thread process request response filename directory pattern match group "
    "result obj cls func context config string number other x y a b n"
)
ITEMS = words("item line key name value field arg entry word node file token path row match option child part x")
COLLECTIONS = words(
    "items lines keys names values fields args entries words nodes files tokens paths rows matches "
    "options children parts data results"
)
NOUNS = words(
    "file name value key path header type argument option mode format encoding line module field message "
    "address version command token socket buffer directory pattern attribute number index"
)
VERBS = words(
    "read write open close get set add remove parse format load save find check update send handle run "
    "start stop reset flush build make create process copy merge split join encode decode"
)
ADJECTIVES = words("invalid missing unknown unexpected unsupported bad empty duplicate")
CLASSES = words(
    "Reader Writer Parser Handler Server Client Request Message Token Node Scanner Queue Worker Config "
    "Record Formatter Stream Entry Field Option Package Cache Table Task Event"
)
BASES = ("", "", "", "(object)", "(Base)", "(Exception)", "(threading.Thread)")
MODULES = words("os sys re io time socket struct types functools itertools collections logging")

# Neither quotes nor open brackets: several tasks ask for the one that is open.
STATEMENTS = (
    "{x} = None",
    "{x} = 0",
    "{x} = {y}.{z}",
    "{x} = {y}.get({z})",
    "{x} = len({items})",
    "{x} = {y} + 1",
    "{x} = {items}[0]",
    "{x} = {items}[{y}]",
    "{x} = [{y}, {z}]",
    "{x} = {y}.{verb}({z})",
    "{x} = {y} or {z}",
    "{x} = os.path.join({y}, {z})",
    "{x} = list({items})",
    "{x} = int({y})",
    "{items}.append({x})",
    "{x}.update({y})",
    "{x}.{verb}()",
    "{x}.{y} = {z}",
    "{verb}_{noun}({x}, {y})",
    "assert {x}",
    "# {Verb} the {noun}.",
    "# The {noun} comes before the {x}.",
    "if {x} is None:\n    {x} = {y}",
    "if not {items}:\n    {x} = {y}",
)
OPENERS = (
    "if {x}:",
    "if not {x}:",
    "if {x} is not None:",
    "for {x} in {items}:",
    "while {items}:",
    "with self.{x}:",
)
FUNCTION_NAMES = ("{verb}", "{verb}_{noun}", "{noun}", "_{verb}", "_{verb}_{noun}")
DOCSTRINGS = ('"""{Verb} the {noun}."""', '"""Return the {noun} of the {x}."""')
METHOD_BODIES = ("return self.{x}", "self.{x}.{verb}()", "return self.{x}.{y}", "return self._{x}")


@dataclass(frozen=True)
class Names:
    """Distinct names for one prompt: a, b, c for its deciding line, x, y, z for others, two for a loop."""

    a: str
    b: str
    c: str
    x: str
    y: str
    z: str
    item: str
    items: str

    def around_shuffled(self, rng: random.Random) -> "Names":
        """The same names with x, y and z in another order."""
        x, y, z = rng.sample((self.x, self.y, self.z), 3)
        return replace(self, x=x, y=y, z=z)


def draw_names(rng: random.Random) -> Names:
    """Draw the names of one prompt."""
    item, items = rng.choice(ITEMS), rng.choice(COLLECTIONS)
    return Names(*rng.sample([name for name in NAMES if name not in (item, items)], 6), item, items)


def fill(rng: random.Random, template: str, names: Names, **given: str) -> str:
    """Put names, and words drawn for each kind, into a template."""
    verb = rng.choice(VERBS)
    words = {"verb": verb, "Verb": verb.capitalize(), "noun": rng.choice(NOUNS)}
    return template.format(**vars(names), **words, adjective=rng.choice(ADJECTIVES), **given)


def indentation(lead: str) -> str:
    """The indentation that a lead ends in."""
    return lead[lead.rfind("\n") + 1 :]


def block(lead: str, code: str) -> str:
    """Append lines of code at the indentation that the lead ends in; blank lines stay empty."""
    indented = code.replace("\n", "\n" + indentation(lead))
    return re.sub(" +\n", "\n", lead + indented)


def in_class(rng: random.Random) -> str:
    """A lead in a class: its head and at times a docstring."""
    lead = f"class {rng.choice(CLASSES)}{rng.choice(BASES)}:\n    "
    return block(lead, _docstring(rng) + "\n")


def at_top(rng: random.Random) -> str:
    """A lead at the top of a file: nothing, imports or a constant."""
    imports = "".join(f"import {module}\n" for module in rng.sample(MODULES, rng.randint(1, 2)))
    constant = f"{rng.choice(NAMES).upper()} = {rng.randint(0, 100)}\n"
    return rng.choice(("", imports + "\n\n", constant + "\n\n"))


def before_def(rng: random.Random) -> str:
    """A lead where a `def` may follow: in a class, at times after a short method, or at the top of a file."""
    if rng.random() < 0.5:
        return at_top(rng)
    lead = in_class(rng)
    if rng.random() < 0.7:
        return lead
    statement = fill(rng, rng.choice(METHOD_BODIES), draw_names(rng))
    return block(lead, f"def {function_name(rng)}(self):\n    {statement}\n\n")


def function_name(rng: random.Random) -> str:
    """A function's name in lower case, such as `_read_file`."""
    return fill(rng, rng.choice(FUNCTION_NAMES), draw_names(rng))


def in_function(rng: random.Random, names: Names) -> str:
    """A lead in a function or method, after up to two statements and perhaps the head of a block.

    Args:
        rng: the source of choices.
        names: some of them become arguments; the statements use x, y, z and items alone.
    """
    lead = before_def(rng)
    lines = [rng.choice(STATEMENTS) + "\n" for _ in range(rng.choice((0, 0, 0, 1, 1, 2)))]
    if rng.random() < 0.2:
        lines.append(rng.choice(OPENERS) + "\n    ")
    body = "".join(fill(rng, line, names.around_shuffled(rng)) for line in lines)
    arguments = ["self"] * bool(indentation(lead)) + _arguments(rng, names, body)
    head = block(lead, f"def {function_name(rng)}({', '.join(arguments)}):\n    ")
    return block(head, _docstring(rng) + body)


def _arguments(rng: random.Random, names: Names, body: str) -> list[str]:
    """A function's arguments: the names that its body uses, and at times the deciding line's."""
    used = re.findall(r"\w+", body)
    chosen = [name for name in (names.x, names.y, names.z, names.items) if name in used]
    chosen += [name for name, odds in ((names.a, 0.6), (names.b, 0.3)) if rng.random() < odds]
    return rng.sample(chosen, len(chosen))


def _docstring(rng: random.Random) -> str:
    """A line with a docstring one time in five, otherwise nothing."""
    return fill(rng, rng.choice(DOCSTRINGS), draw_names(rng)) + "\n" if rng.random() < 0.2 else ""
