"""What servers send, read as one answer: completions, lists of models and errors, in the forms that they really have.

tests/data_generation/odd_answers.py has a table of these forms. Knows nothing about connections.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from parts.raw_rows import parse_json
from parts.server_errors import ContextOverflowError, PassingError, RowError

RETRIED_STATUSES = frozenset({408, 409, 425, 429, *range(500, 600)})
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
REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")
STREAM_END = b"data: [DONE]"  # which some proxies put after a whole answer
FINISH_REASONS = {
    "stop": ("stop", "eos", "eos_token", "stop_sequence", "stop_token", "end_turn"),
    "length": ("length", "max_tokens", "max_length", "model_length", "max_output_tokens"),
}
BROKEN_OFF = frozenset(
    {"abort", "aborted", "cancelled", "content_filter", "error", "insufficient_system_resource", "safety"}
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a server.

    Args:
        text: What the model said.
        finish_reason: "stop", "length" or what else the server calls it; None if it does not say.
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


def is_overflow(status: int, text: str) -> bool:
    """Returns whether an error says that prompt and answer do not fit into the context."""
    return status in OVERFLOW_STATUSES and bool(OVERFLOW.search(text))


def read_models(raw: bytes) -> dict[str, dict[str, Any]]:
    """Returns the entries of a list of models by their names; raises ValueError or a like error if it is none."""
    body = parse_json(raw, "list")
    listed = body if isinstance(body, list) else body["data"] if "data" in body else body["models"]
    if not isinstance(listed, list | None):
        raise TypeError("the models are no list")
    entries = [{"id": entry} if isinstance(entry, str) else dict(entry) for entry in listed or []]
    named = ((next((entry[key] for key in ("id", "name", "model") if entry.get(key)), ""), entry) for entry in entries)
    return {str(name): entry for name, entry in named if name}


def listed_context(entries: Mapping[str, Mapping[str, Any]], model: str) -> int:
    """Returns the length of a model's context in tokens as the server lists it, that of its base for an adapter; 0 if not."""
    entry = entries.get(model, {})
    for listed in (entry, entries.get(str(entry.get("parent")), {})):
        for key in CONTEXT_KEYS:
            value = listed.get(key)
            if type(value) is int and value > 0:
                return value
    return 0


def read_finish_reason(found: Any) -> str | None:
    """Returns why an answer ended, in the words of the OpenAI API where they fit; raises TypeError if it is no reason."""
    if isinstance(found, dict):  # {"type": "stop", "matched": ...}
        found = found["type"]
    if not isinstance(found, str | None):
        raise TypeError("finish_reason is no string")
    if not found or found == "null":
        return None
    return next((name for name, others in FINISH_REASONS.items() if found.lower() in others), found)


def read_tokens(usage: Any, *names: str) -> int:
    """Returns a number of tokens, 0 where the server does not report it in a way that can be read."""
    value = next((usage[name] for name in names if usage.get(name) is not None), 0) if isinstance(usage, dict) else 0
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return max(int(value), 0) if is_number else 0


def read_ids(ids: Any) -> list[int] | None:
    """Returns token ids, None where they are not there or no whole numbers."""
    readable = isinstance(ids, list) and all(type(index) is int and 0 <= index < 1 << 31 for index in ids)
    return ids if readable else None


def read_parts(content: Any) -> tuple[str, str]:
    """Returns the text of a content and the thoughts among its parts; raises TypeError if it is none of text."""
    if content is None or isinstance(content, str):
        return content or "", ""
    if not isinstance(content, list):
        raise TypeError("the text is no string")
    texts, thoughts = "", ""
    for part in content:
        kind = part.get("type", "text")
        if kind == "thinking":
            thoughts += read_parts(part["thinking"])[0]
        elif kind in ("text", "output_text") and isinstance(part["text"], str):
            texts += part["text"]
        else:
            raise TypeError("a part of the content is no text")
    return texts, thoughts


def raise_error_of(body: Mapping[str, Any], quoted: str) -> None:
    """Raises what an error stands for that came with the status of an answer; does nothing if there is none."""
    error = body if body.get("object") == "error" else body.get("error")
    if body.get("choices") or not error:
        return
    code = error.get("code") if isinstance(error, dict) else None
    status = int(code) if isinstance(code, int) or (isinstance(code, str) and code.isdecimal()) else 0
    reason = f"an error in place of an answer: {quoted}"
    if is_overflow(status or 400, str(error)):
        raise ContextOverflowError(reason)
    if 400 <= status < 500 and status not in RETRIED_STATUSES:
        raise RowError(reason)
    raise PassingError(reason)


def read_answer(
    raw: bytes, model: str, max_tokens: int, quote: Callable[[bytes], str], *, may_be_empty: bool = False
) -> Answer:
    """Reads what a server sent with the status of an answer.

    Args:
        raw: The body.
        model: Name of the model that was asked.
        max_tokens: Longest answer that was asked for. One of this length is cut, whatever the server says: some
            proxies call every end a stop.
        quote: Returns the beginning of a body for a message.
        may_be_empty: Whether an answer without text is an answer.

    Raises:
        PassingError: If it is no answer, or an error that may pass.
        ContextOverflowError: If the context was full.
        RowError: If it says that there is no whole answer.
    """
    try:
        body = parse_json(raw.rstrip().removesuffix(STREAM_END), "answer")
        raise_error_of(body, quote(raw))
        choice = body["choices"][0]
        message = choice["message"] if isinstance(choice.get("message"), dict) else {"content": choice["text"]}
        text, thoughts = read_parts(message.get("content"))
        apart = next((message[key] for key in REASONING_KEYS if message.get(key)), thoughts)
        reasoning = read_parts(apart)[0]
        finish_reason = read_finish_reason(choice.get("finish_reason"))
        f"{text}{reasoning}{finish_reason}".encode()  # half of a surrogate pair could not be written
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise PassingError(f"found {quote(raw)!r}, expected a completion") from error
    usage = body.get("usage")
    answer_tokens = read_tokens(usage, "completion_tokens", "output_tokens")
    if finish_reason in (None, "stop") and answer_tokens >= max_tokens:
        finish_reason = "length"
    if (finish_reason or "").lower() in BROKEN_OFF:
        raise RowError(f"found the finish_reason {finish_reason!r}, expected a whole answer")
    if message.get("tool_calls") or message.get("function_call"):
        raise RowError(f"found a tool call (finish_reason {finish_reason!r}), expected text")
    only_thoughts = bool(reasoning) and finish_reason == "length"  # who asked tells what to do about it
    if not (may_be_empty or only_thoughts or text.strip()):
        found = "thoughts without an answer" if reasoning else "an empty answer"
        reason = f"found {found} (finish_reason {finish_reason!r}), expected text"
        # Ollama cuts a prompt to its context, and answers nothing.
        raise (ContextOverflowError if finish_reason == "length" and answer_tokens < max_tokens else RowError)(reason)
    return Answer(
        text,
        finish_reason,
        read_tokens(usage, "prompt_tokens", "input_tokens"),
        answer_tokens,
        model,
        reasoning,
        read_ids(body.get("prompt_token_ids") or choice.get("prompt_token_ids")),
        read_ids(choice.get("token_ids")),
    )
