"""What a chain of drafts accepts on a given text, for the heads as they are and for ways in which a server can get them wrong.

Contract: pure functions of tokens; no model and no server. Place p of a chain is guessed by one head; the draft there is
right if it is the text's token and all before it are right too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_MOST_ORDERS = 720
"""Orders of heads that are looked at: all of up to six heads."""
_EXACT = 0.02
"""What vLLM's counting of drafts past the end of an answer, and near-ties, can change a share by."""
_ERRORS = 3.0
"""Standard errors of a share that a difference must exceed to be real."""


@dataclass(frozen=True)
class Text:
    """One continuation and what heads guess along it.

    Attributes:
        tokens: The continuation.
        drafts: `[positions][heads]`: at position i, whose newest token is `tokens[i]`, what each head guesses for
            `tokens[i + 1]`, `tokens[i + 2]`, ...
    """

    tokens: Sequence[int]
    drafts: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Shares:
    """How often a chain's places were right.

    Attributes:
        accepted: By place, the share of steps in which it was accepted.
        steps: Steps that had drafts.
    """

    accepted: tuple[float, ...]
    steps: float

    def tolerance(self, place: int, other: Shares) -> float:
        """By how much two measurements of a place may differ by chance."""
        share = (self.accepted[place] + other.accepted[place]) / 2
        return _EXACT + _ERRORS * math.sqrt(share * (1 - share) / max(1.0, min(self.steps, other.steps)))

    def fits(self, other: Shares) -> bool:
        """Whether both may be of the same chain."""
        return all(
            abs(own - shown) <= self.tolerance(place, other)
            for place, (own, shown) in enumerate(zip(self.accepted, other.accepted, strict=True))
        )

    def falls_short_of(self, other: Shares) -> bool:
        """Whether a place is accepted less often than in `other`, by more than chance explains."""
        return any(
            shown - own > self.tolerance(place, other)
            for place, (own, shown) in enumerate(zip(self.accepted, other.accepted, strict=True))
        )

    def distance(self, other: Shares) -> float:
        """The largest difference of a place."""
        return max(abs(own - shown) for own, shown in zip(self.accepted, other.accepted, strict=True))


def chain_shares(texts: Sequence[Text], order: Sequence[int]) -> Shares:
    """Walks through texts as a chain of drafts does, one verification after the other.

    Args:
        texts: Continuations with the heads' guesses.
        order: The head that guesses at each place.
    """
    steps, accepted = 0, [0] * len(order)
    for text in texts:
        position = 0
        while position + 1 < len(text.tokens):
            steps += 1
            right = 0
            while (
                right < len(order)
                and position + 1 + right < len(text.tokens)
                and text.drafts[position][order[right]] == text.tokens[position + 1 + right]
            ):
                accepted[right] += 1
                right += 1
            position += 1 + right
    return Shares(tuple(count / max(1, steps) for count in accepted), steps)


def other_orders(num_heads: int, places: int) -> Iterator[tuple[int, ...]]:
    """Every order of heads but the right one, up to `_MOST_ORDERS`."""
    orders = itertools.islice(itertools.permutations(range(num_heads), places), _MOST_ORDERS)
    return (order for order in orders if order != tuple(range(places)))
