"""Learn what a chat template writes around each turn.

Knows no format by name: conversations of marker words are rendered, and what stands between the words is the format.
Knows nothing about files, tokenizers or servers.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from parts.prompt_files import InputError, Turn

Render = Callable[[Sequence[Turn]], str]
PROBE_ROUNDS = 3
SYSTEM_WORD = "systemProbeWord"
WORDS = tuple(f"{role}Probe{count}Word" for count in range(PROBE_ROUNDS) for role in ("user", "assistant"))
CHAT = tuple({"role": word.partition("Probe")[0], "content": word} for word in WORDS)
A_DATE = r"[^\n]{1,64}?"
MOST_DATES = 3  # in one mark: a day, a time and a year


@dataclass(frozen=True)
class Literal:
    """Text that a template writes: a core, and the blanks around it, which models and tokenizers change easily."""

    lead: str
    core: str
    trail: str

    @classmethod
    def of(cls, text: str, bos: str = "") -> "Literal":
        """Takes text apart; a BOS token at its beginning is left out, since servers and models add or drop it."""
        stripped = text.strip()
        core = stripped.removeprefix(bos).lstrip()
        lead = text[: len(text) - len(text.lstrip())] if core == stripped else ""
        return cls(lead if core else "", core, text[len(text.rstrip()) :])

    @property
    def whole(self) -> str:
        """Returns the text as the template writes it."""
        return self.lead + self.core + self.trail

    def pattern(self, dates: Collection[str] = ()) -> str:
        """Returns a regular expression for core and trail; other dates may stand in place of the given ones."""
        core, trail = re.escape(self.core), re.escape(self.trail)
        known = "|".join(re.escape(date) for date in sorted(dates, key=len, reverse=True))
        parts = re.split(known, self.core) if known else []
        if 1 < len(parts) <= MOST_DATES + 1:  # each more multiplies the ways to read a text
            core = A_DATE.join(map(re.escape, parts))
        ends_in_word = self.core[-1:].isalnum()  # "user" is not to be found in "users"
        return core + (rf"(?:{trail}|\Z)" if ends_in_word else f"(?:{trail})?")


@dataclass(frozen=True)
class Boundary:
    """What stands between a turn and the next one.

    Args:
        end: What closes the turn; its core is empty if nothing but the next header does.
        begins: What opens the next turn, the longest first. There are several where the template puts more into some
            headers than into others, such as an empty <think></think>, which is then no part of the answer.
    """

    end: Literal
    begins: tuple[Literal, ...]

    @property
    def stop(self) -> str:
        """Returns the shortest text that shows that the turn is over."""
        return self.end.core or self.begins[-1].core


def between(text: str, words: Sequence[str]) -> list[str]:
    """Returns what stands before, between and after words, or raises InputError if one is not there in its turn."""
    pieces = []
    for word in words:
        piece, found, text = text.partition(word)
        if not found:
            role = word.partition("Probe")[0]
            raise InputError(f"the chat template drops or moves the text of the {role}, expected every turn in order")
        pieces.append(piece)
    return [*pieces, text]


def boundary_of(ends: Collection[str], mids: Collection[str], bos: str) -> Boundary:
    """Learns a boundary.

    Args:
        ends: What may close the turn; the shortest with which all of `mids` begin does.
        mids: What was found between such a turn and the next one.
        bos: The BOS token.
    """
    candidates = sorted({end.rstrip() for end in ends}, key=len)
    end = next((end for end in candidates if end and all(mid.startswith(end) for mid in mids)), "")
    begins = {Literal.of(mid[len(end) :], bos) for mid in mids}
    return Boundary(Literal.of(end), tuple(sorted(begins, key=lambda begin: len(begin.whole), reverse=True)))


@dataclass(frozen=True)
class TurnMarkers:
    """The format of one chat template.

    Args:
        bos: The BOS token if it begins texts; "" if there is none, or if it is a part of every header.
        eos: The EOS token, "" if there is none; it ends a turn of any role.
        boundaries: What follows a turn, by the turn's role; "system" is missing if the template has no system turn
            that can be told from the user's text.
        heads: What a text may begin with, and the role of the turn that it opens; the longest first, and of equals
            that of the user: such a template writes no mark before the system text.
        dates: What the template wrote of the current date.
    """

    bos: str
    eos: str
    boundaries: dict[str, Boundary]
    heads: tuple[tuple[Literal, str], ...]
    dates: Collection[str]

    @classmethod
    def learn(cls, render: Render, bos: str, eos: str, dates: Collection[str]) -> "TurnMarkers":
        """Learns a format.

        Args:
            render: Renders a conversation; raises InputError if the template refuses it.
            bos: The BOS token, "" if there is none.
            eos: The EOS token, "" if there is none.
            dates: A collection that `render` fills.

        Raises:
            InputError: If the template refuses a conversation of several rounds, or writes nothing between turns.
        """
        head, *mids, assistant_tail = between(render(CHAT), WORDS)
        *_, user_tail = between(render(CHAT[:-1]), WORDS[:-1])
        user_mids, assistant_mids = set(mids[::2]), set(mids[1::2])
        if any(bos in mid for mid in user_mids):
            bos = ""  # it opens the answers too: a header, and not the beginning of a sequence
        ends = {assistant_tail, assistant_tail.rstrip().removesuffix(eos)}
        assistant = boundary_of(ends, assistant_mids, bos)
        user = boundary_of({*ends, user_tail}, user_mids, bos)
        if not (user.stop and assistant.stop):
            raise InputError("the chat template writes nothing between turns, expected headers or end marks")
        boundaries = {"user": user, "assistant": assistant}
        heads = [(Literal.of(head, bos), "user"), (assistant.begins[-1], "user")]
        try:
            rendered = render([{"role": "system", "content": SYSTEM_WORD}, *CHAT])
            head, mid, *_ = between(rendered, [SYSTEM_WORD, *WORDS])
        except InputError:
            pass  # a template without system turns
        else:
            after = boundary_of([assistant.end.core], [mid], bos)
            if after.stop:
                boundaries["system"] = after
                heads.append((Literal.of(head, bos), "system"))
        heads.sort(key=lambda found: len(found[0].core), reverse=True)
        return cls(bos, eos, boundaries, tuple(heads), dates)
