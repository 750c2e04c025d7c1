r"""A grammar of prompts, read from text files and expanded by a random source. Knows nothing about rows or outputs.

A file has sections. `=== NAME rows=N talk=GROUP` opens a family of prompts, one template a line; `--- NAME` opens a list of
words for templates, several in a line with ` | ` between them. Lines that begin with `#` are comments, `\n` is a line
break, and `\{`, `\}`, `\|` and `\#` are the characters themselves. In braces stand

- `{name}`: one of a list; all of a list are drawn before one comes again. `{^name}`: with a capital letter.
- `{name@2}`: the same wherever it stands in one prompt, and another than `{name@1}`.
- `{3..90}`, `{5..90:5}`, `{3..90@n}`: a whole number, in steps of 5, remembered.
- `{one|another}`, `{| at the end}`: one of what stands there.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shorten

from parts.raw_rows import InputError

ESCAPED = {"\\n": "\n", "\\{": "\ue000", "\\}": "\ue001", "\\|": "\ue002", "\\#": "\ue003"}
LITERALS = str.maketrans({"\ue000": "{", "\ue001": "}", "\ue002": "|", "\ue003": "#"})
INNERMOST = re.compile(r"\{([^{}]*)\}")
NUMBER = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})(?::([0-9]{1,9}))?")
FAMILY = re.compile(r"=== (\S+) rows=([0-9]{1,9}) talk=(\S+)")
A_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeiou])(?!uni|use|usu|eu|one\b|once|u[kt])")
ANY = "any"  # in place of a kind of talk: fits every one
REDRAWS = 20
DEPTH = 20  # lists within lists; more is a circle


@dataclass
class Family:
    """Prompts of one kind.

    Args:
        name: Its name.
        rows: How many prompts of it are wanted.
        talk: What kind of talk it begins, which decides over what follows and which system prompts fit.
        templates: Its templates.
    """

    name: str
    rows: int
    talk: str
    templates: list[str] = field(default_factory=list)


@dataclass
class Grammar:
    """Families by their name, and lists."""

    families: dict[str, Family] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)


class Draws:
    """Random choices that are the same for the same seed, on every version of Python."""

    def __init__(self, seed: str) -> None:
        """`random()` is all that is used of the source: Python promises the same numbers for a seed."""
        self.source = random.Random(seed)
        self.decks: dict[str, list[str]] = {}

    def below(self, count: int) -> int:
        """Returns a whole number from 0 to count - 1."""
        return int(self.source.random() * count)

    def chance(self, share: float) -> bool:
        """Returns true in this share of calls."""
        return self.source.random() < share

    def shuffled(self, items: Sequence[str]) -> list[str]:
        """Returns the items in another order."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def draw(self, name: str, items: Sequence[str]) -> str:
        """Returns one of the items; each comes once before one comes again."""
        deck = self.decks.get(name)
        if not deck:
            deck = self.decks[name] = self.shuffled(items)
        return deck.pop()


def read_grammar(paths: Sequence[Path]) -> Grammar:
    """Reads the files of a grammar.

    Raises:
        InputError: If a line or a name in braces cannot be understood; file and line are named.
    """
    grammar = Grammar()
    places: dict[str, str] = {}
    for path in paths:
        opened: list[str] | None = None
        splits = False
        for count, line in enumerate(_lines(path), 1):
            where, text = f"{path}:{count}", line.strip()
            if not text or text.startswith("#"):
                continue
            if text.startswith(("=== ", "--- ")):
                opened, splits = _section(grammar, text, where), text.startswith("---")
                continue
            if opened is None:
                raise InputError(f"{where}: found {shorten(text)} before any section, expected === or --- above it")
            for escape, character in ESCAPED.items():
                text = text.replace(escape, character)
            for item in text.split(" | ") if splits else [text]:
                opened.append(item.strip(" "))
                places.setdefault(item.strip(" "), where)
    _check(grammar, places)
    return grammar


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found bytes that are no UTF-8, expected text; save it as UTF-8") from error


def _section(grammar: Grammar, text: str, where: str) -> list[str]:
    """Opens a section and returns what its lines go to."""
    found = FAMILY.fullmatch(text)
    name = found[1] if found else text.removeprefix("--- ")
    known = grammar.families if found else grammar.lists
    if name in known or (text.startswith("===") and not found):
        raise InputError(f"{where}: found {text}, expected a new name: === NAME rows=N talk=GROUP, or --- NAME")
    if found:
        grammar.families[name] = Family(name, int(found[2]), found[3])
        return grammar.families[name].templates
    return grammar.lists.setdefault(name, [])


def _check(grammar: Grammar, places: dict[str, str]) -> None:
    """Raises InputError if a section is empty, a name in braces is no list's, or a list goes with no family's talk."""
    talks = {family.talk for family in grammar.families.values()} | {ANY}
    for name in grammar.lists:
        place, dot, talk = name.partition(".")
        if grammar.families and dot and (place not in ("then", "system") or talk not in talks):
            raise InputError(f"found the list {name}, expected then.TALK or system.TALK of a family; correct its name")
    for name, items in [*grammar.lists.items(), *((each.name, each.templates) for each in grammar.families.values())]:
        if not items:
            raise InputError(f"found the section {name} without lines, expected at least one")
        for item in items:
            for inner in INNERMOST.findall(item):
                slot = inner.removeprefix("^").partition("@")[0]
                number = NUMBER.fullmatch(slot)
                if number and (int(number[1]) > int(number[2]) or int(number[3] or 1) == 0):
                    raise InputError(
                        f"{places[item]}: found {{{inner}}}, expected numbers upwards, as {{1..9}} or {{1..9:2}}"
                    )
                if "|" not in inner and not number and slot not in grammar.lists:
                    raise InputError(f"{places[item]}: found {{{inner}}}, expected the name of a list; correct it")


class Writer:
    """Expands templates of one family."""

    def __init__(self, grammar: Grammar, seed: str, english: bool = True) -> None:
        """Each seed gives other prompts; English ones have "an" before a vowel."""
        self.grammar, self.draws, self.english = grammar, Draws(seed), english

    def prompts(self, name: str, templates: Sequence[str]) -> Iterator[str]:
        """Streams prompts from the templates, without end."""
        while True:
            yield self.written(self.draws.draw(f"template of {name}", templates))

    def written(self, template: str) -> str:
        """Returns one prompt from a template, beginning with a capital letter."""
        text = self.expanded(template, {}, DEPTH).translate(LITERALS)
        text = re.sub(r" +(?=\n|$)", "", text.strip())
        if not text:
            raise InputError(
                f"found nothing where {shorten(template)} was filled in, expected text; leave no choice empty"
            )
        if self.english:
            text = A_BEFORE_VOWEL.sub(r"\1n ", text)
        return text[0].upper() + text[1:]

    def expanded(self, text: str, remembered: dict[str, str], depth: int) -> str:
        """Replaces what stands in braces, from the inside to the outside."""
        if not depth:
            raise InputError(f"found lists that name each other in a circle at {shorten(text)}, expected none")
        while found := INNERMOST.search(text):
            filled = self.filled(found[1], remembered, depth)
            text = text[: found.start()] + filled + text[found.end() :]
        return text

    def filled(self, inner: str, remembered: dict[str, str], depth: int) -> str:
        """Returns what takes the place of one pair of braces."""
        if "|" in inner:
            choices = inner.split("|")
            return choices[self.draws.below(len(choices))]
        name, _, key = inner.removeprefix("^").partition("@")
        full_key = f"{name}@{key}"
        if key and full_key in remembered:
            value = remembered[full_key]
        else:
            taken = {value for kept, value in remembered.items() if kept.startswith(f"{name}@")}
            value = self.drawn(name, remembered, depth)
            for _ in range(REDRAWS):
                if value not in taken:
                    break
                value = self.drawn(name, remembered, depth)
            if key:
                remembered[full_key] = value
        return value[:1].upper() + value[1:] if inner.startswith("^") else value

    def drawn(self, name: str, remembered: dict[str, str], depth: int) -> str:
        """Returns a number, or one of a list with its own braces replaced."""
        if number := NUMBER.fullmatch(name):
            low, high, step = int(number[1]), int(number[2]), int(number[3] or 1)
            return str(low + step * self.draws.below((high - low) // step + 1))
        return self.expanded(self.draws.draw(name, self.grammar.lists[name]), remembered, depth - 1)
