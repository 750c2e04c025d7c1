"""What a library's error says, for the one line that a user gets.

Contract: imports nothing.
"""

from __future__ import annotations

LONGEST = 200
"""Characters of a library's message that fit into a line beside our own words."""


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message, cut to `LONGEST` characters."""
    return str(error).strip().split("\n")[0][:LONGEST]
