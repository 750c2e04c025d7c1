"""Requests at a server, a fixed number of them at a time: tokens per second, time to the first token, time per token.

Contract: talks HTTP; aiohttp is imported when it is asked. Every request streams; tokens are the server's own count. A worker
sends its next request when its last one is answered, so that the load stays what it is called.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from axolotl_medusa.errors import first_line
from axolotl_medusa.live.server import GREEDY, ServerError

Question = Sequence[Mapping[str, str]] | str
"""A chat, or a text to be continued."""

_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Answer:
    """One answered request.

    Attributes:
        text: What the server wrote.
        tokens: Its tokens.
        first_s: Seconds to the first of them.
        seconds: Seconds to the last one.
    """

    text: str
    tokens: int
    first_s: float
    seconds: float

    @property
    def per_token_s(self) -> float | None:
        """Seconds per token after the first, None where there is none."""
        return (self.seconds - self.first_s) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True)
class Load:
    """What a server did under a load.

    Attributes:
        concurrency: Requests at a time.
        answers: One for every request, in their order.
        seconds: From the first request to the last answer.
    """

    concurrency: int
    answers: tuple[Answer, ...]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second, all requests together."""
        return sum(answer.tokens for answer in self.answers) / self.seconds

    @property
    def first_token_s(self) -> float:
        """Median seconds to a request's first token."""
        return statistics.median(answer.first_s for answer in self.answers)

    @property
    def per_token_s(self) -> float | None:
        """Median seconds per token after the first, None where no answer had two."""
        found = [answer.per_token_s for answer in self.answers if answer.per_token_s is not None]
        return statistics.median(found) if found else None


def run_load(url: str, model: str, questions: Sequence[Question], concurrency: int, max_tokens: int) -> Load:
    """Asks questions, `concurrency` at a time, greedily.

    Args:
        url: The server's address without `/v1`.
        model: What it calls its model.
        questions: One for every request.
        concurrency: Requests at a time.
        max_tokens: Tokens per answer at most.

    Raises:
        ServerError: A request was not answered as it should be.
        RuntimeError: aiohttp is missing.
    """
    check_aiohttp()
    return asyncio.run(_load(url, model, questions, concurrency, max_tokens))


def check_aiohttp() -> None:
    """Checks that a load can be made, before a server is started.

    Raises:
        RuntimeError: aiohttp is missing.
    """
    try:
        import aiohttp  # noqa: F401
    except ImportError as error:
        raise RuntimeError("measuring a server needs aiohttp, which is not installed: pip install aiohttp") from error


async def _load(url: str, model: str, questions: Sequence[Question], concurrency: int, max_tokens: int) -> Load:
    import aiohttp

    answers: list[Answer | None] = [None] * len(questions)
    waiting = iter(enumerate(questions))
    options = {"model": model, "max_tokens": max_tokens, "stream": True, "seed": 0, **GREEDY}
    options["stream_options"] = {"include_usage": True}
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def work() -> None:
            for number, question in waiting:
                answers[number] = await _answer(session, url, question, options)

        begun = time.perf_counter()
        workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(questions)))]
        try:
            await asyncio.gather(*workers)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ServerError(f"{url} stopped answering ({first_line(repr(error))}): see what it printed") from error
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        seconds = time.perf_counter() - begun
    return Load(concurrency, tuple(answer for answer in answers if answer is not None), seconds)


async def _answer(session: Any, url: str, question: Question, options: Mapping[str, Any]) -> Answer:
    is_text = isinstance(question, str)
    path, asked = (
        ("/v1/completions", {"prompt": question}) if is_text else ("/v1/chat/completions", {"messages": question})
    )
    begun = time.perf_counter()
    first_s = last_s = 0.0
    text, tokens = [], 0
    async with session.post(f"{url}{path}", json={**options, **asked}) as answer:
        if answer.status != 200:
            said = " ".join((await answer.text()).split())
            raise ServerError(f"{url}{path} answers with status {answer.status}: {first_line(said)}")
        async for line in answer.content:
            event = _event(line, url)
            for piece in _pieces(event):
                last_s = time.perf_counter() - begun
                first_s = first_s or last_s
                text.append(piece)
            usage = event.get("usage")
            tokens = usage["completion_tokens"] if isinstance(usage, dict) else tokens
    if not tokens:
        raise ServerError(f"{url}{path} ended without counting its tokens, expected usage at the end of its stream")
    seconds = last_s or time.perf_counter() - begun
    return Answer("".join(text), tokens, first_s or seconds, seconds)


def _event(line: bytes, url: str) -> dict[str, Any]:
    """What a line of a stream says; empty for lines that say nothing."""
    head, _, data = line.decode().strip().partition(":")
    if head != "data" or data.strip() in ("", "[DONE]"):
        return {}
    try:
        event = json.loads(data)
    except ValueError as error:
        raise ServerError(f"{url} streams what is not JSON: {first_line(data)}") from error
    if not isinstance(event, dict) or "error" in event:
        raise ServerError(f"{url} ended an answer with an error: {first_line(data)}")
    return event


def _pieces(event: Mapping[str, Any]) -> Iterator[str]:
    for choice in event.get("choices") or ():
        piece = choice.get("text") or (choice.get("delta") or {}).get("content")
        if piece:
            yield piece
