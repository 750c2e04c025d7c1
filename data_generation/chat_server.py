"""Ask an OpenAI-compatible server for chat completions: model name, whole answers, retries with backoff.

Knows nothing about files. The API key is never part of an error's text.
"""

import asyncio
import math
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from reprlib import repr as shorten
from typing import Any

import httpx

RETRIED_STATUSES = frozenset({408, 409, 425, 429, *range(500, 600)})
BROKEN_OFF = frozenset({"abort", "content_filter", "error"})  # finish reasons of an answer that is not whole
MAX_BACKOFF_S = 60.0
DEFAULT_API_KEY_ENV = "OPENAI_API_KEY"


class ServerError(RuntimeError):
    """A server that cannot be used at all; the user sees the text as it is."""


class RowError(Exception):
    """A request that got no whole answer; the text is the reason that is recorded."""


@dataclass(frozen=True)
class Answer:
    """One answer of the server; token counts are 0 where the server does not report them."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int


def retry_wait_s(attempt: int, backoff_s: float, retry_after: str | None) -> float:
    """Returns the wait before another try: what the server asks for, plus exponential backoff with jitter.

    Args:
        attempt: Number of tries so far, less one.
        backoff_s: Longest own wait after the first try; doubled after each further one, up to MAX_BACKOFF_S.
        retry_after: The server's Retry-After header (seconds or an HTTP date), if it sent one.
    """
    own_s = min(backoff_s * 2.0**attempt, MAX_BACKOFF_S)
    return asked_wait_s(retry_after) + random.uniform(own_s / 2, own_s)


def asked_wait_s(retry_after: str | None) -> float:
    """Returns the wait that a Retry-After header asks for, 0 if it is missing, past or unreadable."""
    if retry_after is None:
        return 0.0
    try:
        wait_s = float(retry_after)
    except ValueError:
        try:
            wait_s = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return 0.0
    return wait_s if 0 < wait_s < math.inf else 0.0


def read_api_key(variable: str) -> str:
    """Returns the API key in an environment variable, "" if the default variable is not set.

    Raises:
        ServerError: If a variable chosen by the user is not set, or holds what cannot be a key.
    """
    key = os.environ.get(variable, "").strip()
    if not key and variable != DEFAULT_API_KEY_ENV:
        raise ServerError(f"found no environment variable {variable}, expected it to hold an API key")
    if not (key.isascii() and key.isprintable()):
        raise ServerError(f"found characters in the environment variable {variable} that no API key has")
    return key


class ChatServer:
    """One OpenAI-compatible server; use as `async with`."""

    def __init__(
        self,
        url: str,
        model: str | None,
        api_key: str = "",
        *,
        max_connections: int = 32,
        timeout_s: float = 600.0,
        max_retries: int = 5,
        backoff_s: float = 1.0,
    ) -> None:
        """Opens a client; connects to nothing yet.

        Args:
            url: Base URL without a slash at its end, such as http://127.0.0.1:8000/v1.
            model: Name of the model to ask for; None for the only one that the server lists.
            api_key: Sent as a bearer token unless empty.
            max_connections: Requests that may be in flight at a time.
            timeout_s: Longest wait for one answer.
            max_retries: Further tries after a failure that may pass.
            backoff_s: See retry_wait_s.
        """
        self.url, self.model, self.api_key = url, model or "", api_key
        self.max_retries, self.backoff_s = max_retries, backoff_s
        self.client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
        )

    async def __aenter__(self) -> "ChatServer":
        """Connects.

        Raises:
            ServerError: If the server is out of reach, refuses the key, or leaves open which model to ask.
        """
        try:
            await self.connect()
        except BaseException:
            await self.client.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes the connections."""
        await self.client.aclose()

    async def connect(self) -> None:
        """Checks that the server is there and settles the model; raises ServerError."""
        url = f"{self.url}/models"
        try:
            response = await self.client.get(url)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise ServerError(f"cannot reach {url} ({type(error).__name__}: {error}); is the server up?") from error
        if self.model and response.status_code not in (401, 403):
            return  # some servers list no models but answer
        if not response.is_success:
            hint = "check the URL and the API key, and name the model with --model if the server lists none"
            raise ServerError(f"{url}: found HTTP {response.status_code}, expected a list of models; {hint}")
        try:
            names = [str(entry["id"]) for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{url}: found {self.quote(response)!r}, expected a list of models") from error
        if len(names) != 1:
            raise ServerError(f"{url}: found {len(names)} models {shorten(names)}, expected one; choose with --model")
        self.model = names[0]

    async def answer(self, request: Mapping[str, Any]) -> Answer:
        """Asks for one chat completion, again after failures that may pass.

        Args:
            request: Body of the request without the model: messages and sampling settings.

        Raises:
            RowError: If no try gives a whole answer.
        """
        body = {"model": self.model, **request}
        reason, retry_after = "", None
        for attempt in range(self.max_retries + 1):
            if attempt:
                await asyncio.sleep(retry_wait_s(attempt - 1, self.backoff_s, retry_after))
            retry_after = None
            try:
                response = await self.client.post(f"{self.url}/chat/completions", json=body)
            except httpx.RequestError as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            if response.is_success:
                return self.parse_answer(response)
            reason = f"HTTP {response.status_code}: {self.quote(response)}"
            if response.status_code not in RETRIED_STATUSES:
                raise RowError(reason)
            retry_after = response.headers.get("retry-after")
        raise RowError(f"{reason} (tries: {self.max_retries + 1})")

    def parse_answer(self, response: httpx.Response) -> Answer:
        """Reads a chat completion, or raises RowError if it holds no whole answer."""
        try:
            body = response.json()
            choice = body["choices"][0]
            text, finish_reason = choice["message"].get("content"), choice.get("finish_reason")
            usage = body.get("usage") or {}
            tokens = [int(usage.get(key) or 0) for key in ("prompt_tokens", "completion_tokens")]
            f"{text}{finish_reason}".encode()  # half of a surrogate pair could not be written
            if not isinstance(finish_reason, str | None):
                raise TypeError("finish_reason is no string")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
            raise RowError(f"found {self.quote(response)!r}, expected a chat completion") from error
        if not isinstance(text, str) or not text.strip():
            raise RowError(f"found an empty answer (finish_reason {finish_reason!r}), expected text")
        if finish_reason in BROKEN_OFF:
            raise RowError(f"found the finish_reason {finish_reason!r}, expected a whole answer")
        return Answer(text, finish_reason, *tokens)

    def quote(self, response: httpx.Response) -> str:
        """Returns the beginning of a response for a message, without the API key if the server echoes it."""
        return (response.text.replace(self.api_key, "***") if self.api_key else response.text)[:300]
