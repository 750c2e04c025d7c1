"""A running server, asked one question at a time over its OpenAI-compatible API.

Contract: knows vLLM's additions to that API (token ids, penalties, `/metrics`, `/version`) and nothing about heads.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_medusa.errors import first_line
from axolotl_medusa.live.counters import Counters, read_counters
from axolotl_medusa.model.json_files import parse_json, read_json

_TIMEOUT_S = 600
"""For one answer: a model on a CPU is slow, and so is the first step of one that compiles."""
_LARGEST_ANSWER = 100_000_000

GREEDY = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""The model's own first choice: vLLM takes a model's generation config for what a request leaves out."""


class ServerError(RuntimeError):
    """A server does not answer as it should."""


class RefusedError(ServerError):
    """A server understood a request and refused it."""


@dataclass(frozen=True)
class Completion:
    """What a server wrote.

    Attributes:
        token_ids: Its tokens.
        logprobs: Their log-probabilities, empty where it gives none.
    """

    token_ids: list[int]
    logprobs: list[float]


def root_of(url: str) -> str:
    """The address of a server without `/v1`.

    Raises:
        ValueError: It is no address.
    """
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"found the address {url}, expected one such as http://127.0.0.1:8000")
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/").removesuffix("/v1"), "", ""))


class Server:
    """A server at an address; the model that it names first is the one that is asked.

    Args:
        url: With or without `/v1`.
        api_key: Sent as a bearer token where there is one.

    Raises:
        ValueError: It is no address.
        ServerError: Nothing answers there, or it names no model.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = root_of(url)
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        models = self._json("/v1/models").get("data")
        first = models[0] if isinstance(models, list) and models and isinstance(models[0], dict) else {}
        if not isinstance(first.get("id"), str):
            raise ServerError(
                f"{self.url}/v1/models names no model, expected an OpenAI-compatible server: check the address"
            )
        self.model: str = first["id"]
        self._root = first.get("root")

    def version(self) -> str | None:
        """What the server says of its version, None where it says nothing."""
        try:
            found = self._json("/version").get("version")
        except RefusedError:
            return None
        return found if isinstance(found, str) else None

    def quantization(self) -> str | None:
        """How the served model's files say that it is quantized, where they are on this machine; else None."""
        if not isinstance(self._root, str) or not (Path(self._root) / "config.json").is_file():
            return None
        quantization = read_json(Path(self._root) / "config.json").get("quantization_config")
        return str(quantization.get("quant_method", "quantized")) if isinstance(quantization, dict) else None

    def counters(self) -> Counters:
        """What the server counts.

        Raises:
            ServerError: It has no `/metrics`.
        """
        return read_counters(self._get("/metrics"))

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens that the server makes of a chat.

        Raises:
            RefusedError: It has no chat template, or refuses the chat.
            ServerError: It does not tell.
        """
        request = {"messages": list(messages), "max_tokens": 1, "return_token_ids": True, **GREEDY}
        answer = self._json("/v1/chat/completions", {"model": self.model, **request})
        return self._token_ids(answer, "prompt_token_ids")

    def complete(self, prompt: Sequence[int], max_tokens: int) -> Completion:
        """Continues tokens greedily.

        Raises:
            ServerError: The server does not answer, or not with token ids.
        """
        request = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "return_token_ids": True,
            **GREEDY,
        }
        try:
            answer = self._json("/v1/completions", {**request, "logprobs": 0})
        except RefusedError as error:
            if "logprob" not in str(error).lower():
                raise
            answer = self._json("/v1/completions", request)
        choice = _first_choice(answer)
        logprobs = choice.get("logprobs")
        values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        token_ids = self._token_ids(choice, "token_ids")
        numbers = values if isinstance(values, list) and all(isinstance(value, int | float) for value in values) else []
        return Completion(token_ids, [float(value) for value in numbers] if len(numbers) == len(token_ids) else [])

    def _token_ids(self, answer: Mapping[str, Any], key: str) -> list[int]:
        found = answer.get(key)
        if not isinstance(found, list) or not all(isinstance(token, int) for token in found):
            raise ServerError(f"{self.url} answers without {key}, expected vLLM 0.10.2 or newer: update the server")
        return found

    def _json(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = parse_json(self._get(path, body), f"{self.url}{path}")
        except ValueError as error:
            raise ServerError(str(error)) from error
        if not isinstance(answer, dict):
            raise ServerError(
                f"{self.url}{path} answers with a {type(answer).__name__}, expected an object: check the address"
            )
        return answer

    def _get(self, path: str, body: Mapping[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                text: bytes = answer.read(_LARGEST_ANSWER)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(_LARGEST_ANSWER).decode(errors="replace").split())
            raise RefusedError(f"{self.url}{path} answers with status {error.code}: {first_line(said)}") from error
        except (OSError, urllib.error.URLError) as error:
            reason = getattr(error, "reason", error)
            raise ServerError(f"{self.url} cannot be reached ({first_line(str(reason))}): check the address") from error
        return text.decode(errors="replace")


def _first_choice(answer: Mapping[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices")
    found = choices[0] if isinstance(choices, list) and choices else {}
    return found if isinstance(found, dict) else {}
