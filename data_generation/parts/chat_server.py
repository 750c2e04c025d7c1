"""One OpenAI-compatible server: which model it has, what it understands, and its whole answers.

Asks once for each call (twice for what it finds out at first); retrying_server_pool.py decides about trying again. Knows
nothing about files. No credentials are ever part of an error's text.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from reprlib import repr as shorten
from typing import Any

import aiohttp

from parts.chat_answer import RETRIED_STATUSES, Answer, is_overflow, listed_context, read_answer, read_models
from parts.secrets import HIDDEN, split_credentials, without_secrets
from parts.server_errors import ContextOverflowError, NotListedError, PassingError, RowError, ServerError

LONGEST_WAIT_S = 3600.0  # of a Retry-After; a server that asks for more is asked again after it
MAX_ANSWER_BYTES = 1 << 26
MOST_TOKENS = 1 << 31  # of an answer whose length is not bounded
CHAT, COMPLETIONS = "chat/completions", "completions"
DEFAULT_API_KEY_ENV = "OPENAI_API_KEY"


def asked_wait_s(retry_after: str | None) -> float:
    """Returns the wait that a Retry-After header asks for, 0 if it is missing, past or unreadable."""
    if retry_after is None:
        return 0.0
    try:
        wait_s = float(retry_after)
    except ValueError:
        try:
            wait_s = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, IndexError, OverflowError, OSError):
            return 0.0
    return min(wait_s, LONGEST_WAIT_S) if 0 < wait_s < math.inf else 0.0


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
    """One server of a pool."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str | None, api_key: str = "") -> None:
        """Connects to nothing yet.

        Args:
            session: Connections, shared by the pool.
            url: Base URL, such as http://127.0.0.1:8000/v1; a user and password in it are sent, and are no part of `url`.
            model: Name of the model to ask for; None for the only one that the server lists.
            api_key: Sent as a bearer token unless empty, or unless the URL has a user and password.
        """
        url, credentials = split_credentials(url)
        self.session, self.url = session, url.rstrip("/")
        self.secrets = [*credentials, *filter(None, [api_key])]
        self.wanted_model, self.model, self.model_root = model, model or "", ""
        self.context_tokens = 0  # 0 if the server does not list it
        self.headers = {"Content-Type": "application/json"}
        if self.secrets:
            self.headers["Authorization"] = f"Basic {credentials[0]}" if credentials else f"Bearer {api_key}"
        self.extra_fields: dict[str, dict[str, Any]] = {CHAT: {}, COMPLETIONS: {}}

    async def find_model(self) -> None:
        """Checks that the server is there, and settles `model`, `model_root` and `context_tokens`.

        Raises:
            PassingError: If the server is out of reach.
            ServerError: If it refuses the key, or leaves open which model to ask.
        """
        url = f"{self.url}/models"
        status, raw, _ = await self.exchange("GET", url)
        listed = 200 <= status < 300
        if not listed and self.wanted_model and status not in (401, 403):
            return  # some servers list no models but answer
        if status in RETRIED_STATUSES:
            raise PassingError(f"HTTP {status}: {self.quote(raw)}")
        if not listed:
            hint = "check the URL and the API key, and name the model with --model if the server lists none"
            error_kind = ServerError if status in (401, 403) else NotListedError
            raise error_kind(f"{url}: found HTTP {status}, expected a list of models; {hint}")
        try:
            entries = read_models(raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if self.wanted_model:
                return
            raise NotListedError(f"{url}: found {self.quote(raw)!r}, expected a list of models") from error
        names = list(entries)
        if not self.wanted_model and len(names) != 1:
            raise ServerError(f"{url}: found {len(names)} models {shorten(names)}, expected one; choose with --model")
        self.model = self.wanted_model or names[0]
        self.model_root = str(entries.get(self.model, {}).get("root") or "")
        self.context_tokens = listed_context(entries, self.model)

    async def understands(self, path: str, body: Mapping[str, Any], fields: Mapping[str, Any]) -> Answer | str:
        """Asks for one token to see whether the server accepts a request with these further fields.

        Returns:
            The answer, or the reason for which the server refuses.

        Raises:
            PassingError: If the server does not say, twice.
        """
        self.extra_fields[path] = dict(fields)
        request = {**body, "max_tokens": 1}
        try:
            try:
                return await self.ask(path, request, may_be_empty=True)
            except PassingError:  # which says nothing about the fields, if it is not there again
                return await self.ask(path, request, may_be_empty=True)
        except RowError as error:
            return str(error)

    async def ask(self, path: str, body: Mapping[str, Any], *, may_be_empty: bool = False) -> Answer:
        """Asks once for a chat completion or a completion.

        Args:
            path: CHAT or COMPLETIONS.
            body: The request without the model.
            may_be_empty: Whether an answer without text is an answer.

        Raises:
            PassingError: If another try may give the answer.
            ContextOverflowError: If the request does not fit into the server's context.
            RowError: If no try will give the answer.
        """
        request = json.dumps({"model": self.model, **body, **self.extra_fields[path]}).encode()
        status, raw, retry_after = await self.exchange("POST", f"{self.url}/{path}", request)
        if 200 <= status < 300:
            most = body.get("max_tokens") or MOST_TOKENS
            return read_answer(raw, self.model, most, self.quote, may_be_empty=may_be_empty)
        reason = f"HTTP {status}: {self.quote(raw)}"
        if is_overflow(status, raw.decode(errors="replace")):
            raise ContextOverflowError(reason)
        if status in RETRIED_STATUSES:
            raise PassingError(reason, asked_wait_s(retry_after))
        raise RowError(reason)

    async def exchange(self, method: str, url: str, request: bytes | None = None) -> tuple[int, bytes, str | None]:
        """Returns status, body and Retry-After header of one exchange, or raises PassingError."""
        try:
            async with self.session.request(
                method, url, data=request, headers=self.headers, allow_redirects=False
            ) as response:
                raw = bytearray()
                async for chunk in response.content.iter_any():
                    raw += chunk
                    if len(raw) > MAX_ANSWER_BYTES:
                        raise PassingError(f"found more than {MAX_ANSWER_BYTES:,} bytes, expected an answer")
                return response.status, bytes(raw), response.headers.get("Retry-After")
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
            raise ServerError(f"found the URL {shorten(str(error))}, expected one like http://host:8000/v1") from error
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            unreachable = isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
            raise PassingError(f"{type(error).__name__}: {error}".rstrip(": "), unreachable=unreachable) from error

    def quote(self, raw: bytes) -> str:
        """Returns the beginning of a response for a message, without the credentials if the server echoes them."""
        text = raw.decode(errors="replace")
        for secret in self.secrets:
            text = text.replace(secret, HIDDEN)
        return without_secrets(text)[:300]
