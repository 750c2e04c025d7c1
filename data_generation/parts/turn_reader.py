"""Take text in a chat template's format, such as a model writes when it plays both roles, apart into turns."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from parts.prompt_files import Turn
from parts.turn_markers import Literal, TurnMarkers

NEXT_ROLE = {"system": "user", "user": "assistant", "assistant": "user"}
QUOTED = 40  # characters of a text in messages


@dataclass(frozen=True)
class SplitText:
    """The turns of a text.

    Args:
        turns: The turns from the beginning as far as they are a well-formed alternation of user and assistant, after
            a system turn or none. A turn of which nothing but its header is there is left out.
        cut: Whether the last of them lacks its end.
        problem: Why the text was not read to its end; "" if it was.
    """

    turns: list[Turn]
    cut: bool
    problem: str = ""


def beginning(text: str) -> str:
    """Returns what a text begins with, quoted for a message."""
    return f"{text[:QUOTED]!r}" + ("..." if len(text) > QUOTED else "")


def any_of(*patterns: str) -> str:
    """Returns a regular expression for any of several, the first that fits; one that never fits if there is none."""
    return f"(?:{'|'.join(patterns)})" if patterns else "(?!)"


class TurnReader:
    """Reads texts in one format."""

    def __init__(self, markers: TurnMarkers) -> None:
        """Prepares the regular expressions."""
        self.markers = markers
        bos, eos = re.escape(markers.bos), re.escape(markers.eos)
        self.bos_pattern = re.compile(rf"(?:\s*{bos})*" if bos else "")
        self.gap_pattern = re.compile(rf"\s*(?:{eos})?\s*(?:{bos})?\s*")
        self.stops = {role: re.compile(self.stop_pattern(role)) for role in markers.boundaries}

    @cached_property
    def longest_mark(self) -> int:
        """Characters of the longest mark with what may stand before it."""
        literals = [begin for boundary in self.markers.boundaries.values() for begin in boundary.begins]
        literals += [head for head, _ in self.markers.heads]
        longest = max(len(literal.whole) for literal in literals)
        return longest + len(self.markers.bos) + len(self.markers.eos) + 1

    @cached_property
    def headers(self) -> list[str]:
        """The marks that belong into no content. Plain words are left out: a text may well speak of a "USER:"."""
        boundaries = self.markers.boundaries.values()
        cores = {core for boundary in boundaries for core in (boundary.end.core, *(b.core for b in boundary.begins))}
        return sorted((core for core in cores if core and not core[0].isalnum()), key=len, reverse=True)

    def stop_pattern(self, role: str) -> str:
        """Returns a regular expression for what a content runs up to: group `end` if the turn is over there."""
        boundary, eos = self.markers.boundaries[role], self.markers.eos
        ends = [re.escape(eos)] if eos else []
        if boundary.end.core:
            ends.insert(0, f"(?:{re.escape(boundary.end.lead)})?{re.escape(boundary.end.core)}")
        else:
            ends += [re.escape(begin.lead) + begin.pattern() for begin in boundary.begins]
        return f"(?P<end>{any_of(*ends)})|{any_of(*map(re.escape, self.headers))}"

    def read(self, text: str) -> SplitText:
        """Takes a text apart; never fails, but says in `problem` where it had to stop."""
        turns: list[Turn] = []
        role, position, problem = self.read_head(text)
        while role:
            stop = self.stops[role].search(text, position)
            content = text[position : stop.start()] if stop else self.without_torn_end(text[position:], role)
            cut = not (stop and stop["end"])
            if content.strip() or not cut:
                turns.append({"role": role, "content": content})
            if not stop:
                return SplitText(turns, cut and bool(content.strip()))
            if cut:
                problem = f"found {stop[0]!r} inside the turn of the {role}, expected its end before"
                return SplitText(turns, cut and bool(content.strip()), problem)
            # Where nothing but the next header ends the turn, that is still to be read.
            end = stop.end() if self.markers.boundaries[role].end.core else stop.start()
            position, problem = self.read_header(text, end, role)
            role = "" if position < 0 else NEXT_ROLE[role]
        return SplitText(turns, False, problem)

    def read_head(self, text: str) -> tuple[str, int, str]:
        """Returns the role of the first turn, where it begins, and what is wrong; no role if there is no turn."""
        start = self.bos_pattern.match(text).end()  # type: ignore[union-attr]
        rest = text[start:].lstrip()
        blanks = len(text) - start - len(rest)
        if self.is_torn(rest, [head for head, _ in self.markers.heads]):
            return "", -1, ""
        for head, role in self.markers.heads:
            found = re.match(head.pattern(self.markers.dates), rest)
            if head.core and found:
                return role, start + blanks + found.end(), ""
            if not head.core and (role == "user" or self.stops[role].search(text, start)):
                return role, start, ""
        known = " or ".join(beginning(head.core) for head, _ in self.markers.heads if head.core)
        return "", -1, f"found {beginning(rest)} at the beginning, expected {known}"

    def read_header(self, text: str, position: int, role: str) -> tuple[int, str]:
        """Returns where the turn after one of `role` begins, -1 if there is none, and what is wrong."""
        begins = self.markers.boundaries[role].begins
        if begins[0].core:
            position = self.gap_pattern.match(text, position).end()  # type: ignore[union-attr]
            if self.is_torn(text[position : position + self.longest_mark], begins):  # all of a long text is none
                return -1, ""
        for begin in begins:
            if found := re.compile(begin.pattern()).match(text, position):
                return found.end(), ""
        expected = f"expected {begins[-1].core!r}"
        return -1, f"found {beginning(text[position:])} after the turn of the {role}, {expected}"

    def is_torn(self, rest: str, literals: Iterable[Literal]) -> bool:
        """Returns whether the rest of a text is the beginning of one of the marks, of BOS or of EOS, and nothing more."""
        bos, eos = self.markers.bos, self.markers.eos
        marks = [text for mark in literals for text in (mark.core + mark.trail, bos + mark.core)]
        return any(mark.startswith(rest) for mark in (*marks, eos))

    def without_torn_end(self, content: str, role: str) -> str:
        """Returns a content that the text's end cuts, without a beginning of what would have ended the turn."""
        boundary = self.markers.boundaries[role]
        ends = [boundary.end.whole, boundary.end.core, self.markers.eos]
        if not boundary.end.core:
            ends += [begin.whole for begin in boundary.begins]
        torn = (end[:size] for end in ends for size in range(len(end), 0, -1))
        return content[: len(content) - max((len(start) for start in torn if content.endswith(start)), default=0)]
