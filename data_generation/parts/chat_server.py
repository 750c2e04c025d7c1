"""One OpenAI-compatible server: which model it has, what it understands, and its whole answers.

Asks once for each call; retrying_server_pool.py decides about trying again. Knows nothing about files. No credentials are ever
part of an error's text.
"""

import json
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from reprlib import repr as shorten
from typing import Any

import aiohttp

from parts.raw_rows import parse_json
from parts.secrets import HIDDEN, split_credentials, without_secrets

RETRIED_STATUSES = frozenset({408, 409, 425, 429, *range(500, 600)})
BROKEN_OFF = frozenset({"abort", "content_filter", "error"})  # finish reasons of an answer that is not whole
LONGEST_WAIT_S = 3600.0  # of a Retry-After; a server that asks for more is asked again after it
MAX_ANSWER_BYTES = 1 << 26
OVERFLOW_STATUSES = frozenset({400, 413, 422, 500})
OVERFLOW = re.compile(
    r"context[ _-]?(length|size|window|limit)|exceed_context|maximum context|max_model_len|maximum model length"
    r"|max_(new_|completion_)?tokens\W{1,4}(must be <=|is too large|or 'max_completion_tokens' is too large)"
    r"|inputs?\W{1,3}must have less than|(prompt|input) is too long|exceeds the maximum (allowed )?(input )?length"
    r"|exceeds the maximum number of tokens|reduce the length of the (messages|input|prompt)",
    re.IGNORECASE,
)
"""What servers say of a prompt that is too long: vLLM, SGLang, TGI, llama.cpp, LiteLLM, LM Studio and hosted ones."""
CONTEXT_KEYS = ("max_model_len", "context_length", "context_window", "max_context_length")
"""Where servers list the length of a model's context: vLLM and SGLang, then proxies and hosted ones."""
CHAT, COMPLETIONS = "chat/completions", "completions"
DEFAULT_API_KEY_ENV = "OPENAI_API_KEY"


class ServerError(RuntimeError):
    """A server that cannot be used at all; the user sees the text as it is."""


class RowError(Exception):
    """A request that got no whole answer; the text is the reason that is recorded."""


class ContextOverflowError(RowError):
    """A prompt that, with the longest answer asked for, does not fit into the server's context."""


class PassingError(Exception):
    """A failure that another try may mend.

    Args:
        reason: What happened.
        retry_after_s: The wait that the server asks for, 0 if it does not.
        unreachable: Whether the request did not even reach the server.
    """

    def __init__(self, reason: str, retry_after_s: float = 0.0, unreachable: bool = False) -> None:
        """Keeps the arguments as attributes."""
        super().__init__(reason)
        self.retry_after_s, self.unreachable = retry_after_s, unreachable


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a server.

    Args:
        text: What the model said.
        finish_reason: "stop", "length" or what else the server calls it.
        prompt_tokens: Length of the prompt, 0 if the server does not report it.
        completion_tokens: Length of the answer, 0 if the server does not report it.
        model: Name of the model that was asked.
        reasoning: What the server reports apart from the text as the model's reasoning, "" if nothing.
        prompt_ids: Token ids of the prompt, None if the server does not return them.
        answer_ids: Token ids of the answer with its end-of-turn token, None if the server does not return them.
    """

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    model: str
    reasoning: str = ""
    prompt_ids: list[int] | None = None
    answer_ids: list[int] | None = None


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


def is_overflow(status: int, text: str) -> bool:
    """Returns whether an error says that prompt and answer do not fit into the context."""
    return status in OVERFLOW_STATUSES and bool(OVERFLOW.search(text))


def listed_context(entries: Mapping[str, Mapping[str, Any]], model: str) -> int:
    """Returns the length of a model's context in tokens as the server lists it, that of its base for an adapter; 0 if not."""
    entry = entries.get(model, {})
    for listed in (entry, entries.get(str(entry.get("parent")), {})):
        for key in CONTEXT_KEYS:
            value = listed.get(key)
            if type(value) is int and value > 0:
                return value
    return 0


def are_tokens(ids: Any) -> bool:
    """Tells whether token ids are a list of whole numbers, or not there."""
    return ids is None or (isinstance(ids, list) and all(type(index) is int and 0 <= index < 1 << 31 for index in ids))


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
        if not listed:
            hint = "check the URL and the API key, and name the model with --model if the server lists none"
            raise ServerError(f"{url}: found HTTP {status}, expected a list of models; {hint}")
        try:
            entries = {str(entry["id"]): dict(entry) for entry in parse_json(raw, "list")["data"]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if self.wanted_model:
                return
            raise ServerError(f"{url}: found {self.quote(raw)!r}, expected a list of models") from error
        names = list(entries)
        if not self.wanted_model and len(names) != 1:
            raise ServerError(f"{url}: found {len(names)} models {shorten(names)}, expected one; choose with --model")
        self.model = self.wanted_model or names[0]
        self.model_root = str(entries.get(self.model, {}).get("root") or "")
        self.context_tokens = listed_context(entries, self.model)

    async def understands(self, path: str, body: Mapping[str, Any], fields: Mapping[str, Any]) -> Answer | str:
        """Asks for one token to see whether the server accepts a request with these further fields.

        Returns:
            The answer, or the reason for which there is none.
        """
        self.extra_fields[path] = dict(fields)
        try:
            return await self.ask(path, {**body, "max_tokens": 1}, may_be_empty=True)
        except (RowError, PassingError) as error:
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
            return self.parse_answer(raw, may_be_empty)
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

    def parse_answer(self, raw: bytes, may_be_empty: bool) -> Answer:
        """Reads a response; raises RowError if it says that there is no whole answer, PassingError if it is none."""
        try:
            body = parse_json(raw, "answer")
            choice = body["choices"][0]
            message = choice["message"] if "message" in choice else {"content": choice["text"]}
            text, finish_reason = message.get("content"), choice.get("finish_reason")
            reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
            usage = body.get("usage") or {}
            prompt_tokens, completion_tokens = (
                int(usage.get(key) or 0) for key in ("prompt_tokens", "completion_tokens")
            )
            prompt_ids = body.get("prompt_token_ids") or choice.get("prompt_token_ids")
            f"{text}{reasoning}{finish_reason}".encode()  # half of a surrogate pair could not be written
            if not isinstance(finish_reason, str | None):
                raise TypeError("finish_reason is no string")
            if not isinstance(text, str | None):
                raise TypeError("the text is no string")
            answer_ids = choice.get("token_ids")
            if not (are_tokens(prompt_ids) and are_tokens(answer_ids)):
                raise TypeError("token ids are no whole numbers")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
            raise PassingError(f"found {self.quote(raw)!r}, expected a completion") from error
        if finish_reason in BROKEN_OFF:
            raise RowError(f"found the finish_reason {finish_reason!r}, expected a whole answer")
        only_thoughts = bool(reasoning) and finish_reason == "length"  # who asked tells what to do about it
        if not (may_be_empty or only_thoughts or (text and text.strip())):
            found = "thoughts without an answer" if reasoning else "an empty answer"
            raise RowError(f"found {found} (finish_reason {finish_reason!r}), expected text")
        return Answer(
            text or "",
            finish_reason,
            prompt_tokens,
            completion_tokens,
            self.model,
            str(reasoning),
            prompt_ids,
            answer_ids,
        )

    def quote(self, raw: bytes) -> str:
        """Returns the beginning of a response for a message, without the credentials if the server echoes them."""
        text = raw.decode(errors="replace")
        for secret in self.secrets:
            text = text.replace(secret, HIDDEN)
        return without_secrets(text)[:300]
