"""How fast a server is with and without heads, by load: every setting in turn, several times.

Contract: measures and returns; what is written and printed is the caller's. Settings take turns, and every round begins with
another one, so that a machine that gets slower or busier slows all of them alike. A setting's server is started anew in
every round, and asked a little before it counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from axolotl_medusa.live.load import Load, Question, run_load
from axolotl_medusa.live.server import Server

PLAIN, ADAPTIVE = "plain", "adaptive"
CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
REPEATS = 3
_LEAST_REQUESTS = 8
"""Requests of a load at least; at more than half as many at a time, two for every place."""
_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Setting:
    """One way to serve.

    Attributes:
        name: `plain`, `k = 2`, `adaptive`, ...
        start: Starts its server, or names the one that runs; yields the address without `/v1`.
    """

    name: str
    start: Callable[[], AbstractContextManager[str]]


@dataclass
class Figures:
    """What was measured of one setting at one load, one value for every round.

    Attributes:
        tokens_per_s: Generated tokens per second.
        first_token_s: Median seconds to a first token.
        per_token_s: Median seconds per token after the first; None in rounds without such tokens.
        acceptance_length: Tokens per verified draft; None in rounds without drafts.
        texts: The answers of the first round.
        same_texts: Share of answers that are those of the first setting, in the first round.
    """

    tokens_per_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    per_token_s: list[float | None] = field(default_factory=list)
    acceptance_length: list[float | None] = field(default_factory=list)
    texts: tuple[str, ...] = ()
    same_texts: float = 1.0

    def add(self, load: Load, acceptance_length: float | None) -> None:
        """Takes a round in."""
        self.tokens_per_s.append(load.tokens_per_s)
        self.first_token_s.append(load.first_token_s)
        self.per_token_s.append(load.per_token_s)
        self.acceptance_length.append(acceptance_length)
        self.texts = self.texts or tuple(answer.text for answer in load.answers)

    @property
    def median_tokens_per_s(self) -> float:
        """The median over rounds."""
        return statistics.median(self.tokens_per_s)

    @property
    def spread(self) -> float:
        """Difference of the fastest and the slowest round, in medians."""
        return (max(self.tokens_per_s) - min(self.tokens_per_s)) / self.median_tokens_per_s

    def to_json(self) -> dict[str, Any]:
        """Medians, spread and every round."""
        return {
            "tokens_per_s": round(self.median_tokens_per_s, 2),
            "spread": round(self.spread, 4),
            "first_token_s": round(statistics.median(self.first_token_s), 4),
            "per_token_s": _median(self.per_token_s, 5),
            "acceptance_length": _median(self.acceptance_length, 3),
            "same_texts": round(self.same_texts, 4),
            "rounds_tokens_per_s": [round(value, 2) for value in self.tokens_per_s],
        }


def _median(values: Sequence[float | None], digits: int) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), digits) if known else None


Measured = dict[str, dict[int, Figures]]
"""By setting and by requests at a time."""


def measure(
    settings: Sequence[Setting],
    questions: Sequence[Question],
    concurrency: Sequence[int],
    max_tokens: int,
    repeats: int,
    say: Callable[[str], None],
    after_first_round_of: Callable[[str], None] = lambda name: None,
) -> Measured:
    """Measures every setting under every load, in `repeats` rounds.

    Args:
        settings: In the order of the first round; every later round begins with the next one.
        questions: What is asked, from the beginning again where a load takes more of them.
        concurrency: Requests at a time, one load each.
        max_tokens: Tokens per answer at most.
        repeats: Rounds.
        say: Told every figure as it is measured.
        after_first_round_of: Called with a setting's name once its server of the first round is gone.

    Raises:
        ServerError: A server does not start or does not answer.
    """
    measured: Measured = {setting.name: {requests: Figures() for requests in concurrency} for setting in settings}
    for round_ in range(repeats):
        first = round_ % len(settings)
        for setting in [*settings[first:], *settings[:first]]:
            with setting.start() as url:
                _measure_server(Server(url), setting.name, measured[setting.name], questions, max_tokens, say, round_)
            if round_ == 0:
                after_first_round_of(setting.name)
    _compare_texts(measured)
    return measured


def _measure_server(
    server: Server,
    name: str,
    figures: dict[int, Figures],
    questions: Sequence[Question],
    max_tokens: int,
    say: Callable[[str], None],
    round_: int,
) -> None:
    for requests in (1, max(figures)):
        run_load(server.url, server.model, _asked(questions, requests, requests), requests, _WARM_UP_TOKENS)
    for requests, found in figures.items():
        before = server.counters()
        count = max(_LEAST_REQUESTS, 2 * requests)
        load = run_load(server.url, server.model, _asked(questions, count, 0), requests, max_tokens)
        length = server.counters().since(before).acceptance_length
        found.add(load, length)
        accepted = "" if length is None else f", acceptance length {length:.2f}"
        say(f"round {round_ + 1}, {name}, {requests} at a time: {load.tokens_per_s:.1f} tokens/s{accepted}")


def _asked(questions: Sequence[Question], count: int, first: int) -> list[Question]:
    return [questions[(first + number) % len(questions)] for number in range(count)]


def _compare_texts(measured: Measured) -> None:
    """Greedy text is that of plain serving, but for near-ties in half precision."""
    reference = next(iter(measured.values()))
    for figures in measured.values():
        for requests, found in figures.items():
            pairs = list(zip(found.texts, reference[requests].texts, strict=True))
            found.same_texts = sum(own == other for own, other in pairs) / len(pairs)
