"""The turns of an input row, in every layout and spelling that people have, brought into one form.

Knows nothing about files, ids or servers. Every error names the place, what was found and what was expected.
"""

import json
from collections.abc import Sequence
from reprlib import repr as shorten
from typing import Any

from parts.raw_rows import InputError

Turn = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "call" | "tool", "content": text}.

A "call" is an assistant's turn that calls tools, a "tool" what one of them returned; these may hold more fields.
"""

# Where a row may keep its turns; the first that is not empty counts, so that UltraChat-200k's messages win over prompt.
LAYOUT_KEYS = ("messages", "conversations", "conversation", "data", "prompt")
REQUEST_KEYS = ("body", "request", "input")  # of logs: the whole request
SPEAKER_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value", "text")
SPEAKERS = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "claude", "model", "bot", "ai"),
    "call": ("function_call", "tool_call"),
    "tool": ("tool", "function", "observation", "function_response", "tool_response", "ipython"),
}
ROLES = {name: role for role, names in SPEAKERS.items() for name in names}  # looked up in lower case
TOOL_ROLES = ("call", "tool")
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
THOUGHT_PARTS = ("thinking", "reasoning", "redacted_thinking")
EXPECTED_ROW = (
    "expected a text or an object with 'messages', 'conversations' or 'conversation' (lists of turns), 'data' (a list of "
    "texts) or 'prompt' (a text), or a list of turns"
)


class NoTextError(InputError):
    """A turn that is none of text, such as an image: its row is left out, and stops nothing."""


def text_of_parts(parts: Any, where: str) -> str | None:
    """Returns a content that may be a text or a list of parts; None if it is neither.

    Raises:
        NoTextError: If a part is an image, a file or another thing that is no text.
    """
    if parts is None or isinstance(parts, str):
        return parts or ""
    if not isinstance(parts, list):
        return None
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else "text"
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else part
        if isinstance(text, dict):  # {"text": {"value": ..., "annotations": [...]}}
            text = text.get("value")
        if kind in TEXT_PARTS and isinstance(text, str) and isinstance(part, dict):
            texts.append(text)
        elif isinstance(kind, str) and isinstance(part, dict) and kind not in (*TEXT_PARTS, *THOUGHT_PARTS):
            raise NoTextError(f"{where}: found a content part of the type {shorten(kind)}, expected text")
        elif kind not in THOUGHT_PARTS:
            return None
    return "".join(texts)


def tool_calls_of(turn: dict[str, Any]) -> list[Any]:
    """Returns the tools that a turn calls, in today's form of the OpenAI API."""
    if isinstance(turn.get("tool_calls"), list):
        return list(turn["tool_calls"])
    if isinstance(turn.get("function_call"), dict):
        return [{"type": "function", "function": turn["function_call"]}]
    return []


def parse_turn(turn: Any, where: str) -> Turn:
    """Brings one turn into the one form, whichever names its speaker and text have.

    Raises:
        NoTextError: If it is no text.
        InputError: If it has no speaker that is known, or no text.
    """
    if isinstance(turn, dict):
        speaker = next((turn[key] for key in SPEAKER_KEYS if turn.get(key) is not None), None)
        role = ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
        calls = tool_calls_of(turn) if role == "assistant" else []
        there = [turn[key] for key in (*TEXT_KEYS, "refusal") if key in turn]
        content = next((found for found in there if found is not None), None)
        text = text_of_parts(content, where) if role and (there or calls) else None
        if role is not None and text is not None:
            more = {key: turn[key] for key in ("tool_call_id", "name") if role == "tool" and turn.get(key) is not None}
            return {"role": "call" if calls else role, "content": text, **({"tool_calls": calls} if calls else more)}
    expected = f"a text ('content', 'value' or 'text') by one of {', '.join(ROLES)} ('role' or 'from')"
    raise InputError(f"{where}: found the turn {shorten(turn)}, expected {expected}")


def parse_turns(record: Any, where: str) -> tuple[Turn, ...]:
    """Brings the turns of one raw row into the one form.

    Raises:
        NoTextError: If a turn is no text.
        InputError: If the row or a turn is malformed.
    """
    if isinstance(record, str):
        return ({"role": "user", "content": record},)
    if isinstance(record, list) and not all(isinstance(turn, str) for turn in record):
        return name_plain_calls([parse_turn(turn, where) for turn in record])
    if isinstance(record, list):
        return parse_turns({"data": record}, where)
    if not isinstance(record, dict):
        raise InputError(f"{where}: found {shorten(record)}, {EXPECTED_ROW}")
    key = next((key for key in LAYOUT_KEYS if record.get(key) not in (None, "", [])), None)
    if key is None:
        if not any(key in record for key in LAYOUT_KEYS):
            return parse_request(record, where)
        return ()
    found = record[key]
    if key == "prompt" and not (isinstance(found, list) and all(isinstance(turn, dict) for turn in found)):
        return (parse_turn({"content": found, "role": "user"}, where),)
    if not isinstance(found, list):
        raise InputError(f"{where}: found '{key}' to be {shorten(found)}, {EXPECTED_ROW}")
    if key == "data":
        found = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(found)]
    return name_plain_calls([parse_turn(turn, where) for turn in found])


def parse_request(record: dict[str, Any], where: str) -> tuple[Turn, ...]:
    """Brings the turns of a logged request into the one form; raises InputError if it is none."""
    inner = next((record[key] for key in REQUEST_KEYS if isinstance(record.get(key), dict)), None)
    if inner is not None and any(key in inner for key in (*LAYOUT_KEYS, "input")):
        return parse_turns(inner, where) if any(key in inner for key in LAYOUT_KEYS) else parse_request(inner, where)
    found = record.get("input")
    if isinstance(found, str) and "model" in record:  # else it is the input of an instruction
        found = [{"role": "user", "content": found}]
    if isinstance(found, list) and all(isinstance(turn, dict) for turn in found):
        turns = [parse_turn(turn, where) for turn in found if any(key in turn for key in SPEAKER_KEYS)]
        if isinstance(record.get("instructions"), str):
            turns.insert(0, {"role": "system", "content": record["instructions"]})
        return name_plain_calls(turns)
    raise InputError(f"{where}: found the keys {shorten(list(record))}, {EXPECTED_ROW}")


def name_plain_calls(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Returns turns in which an assistant's turn just before a tool's is a call, which some data write as plain text."""
    following = [*turns[1:], {"role": ""}]
    return tuple(
        {**turn, "role": "call"} if turn["role"] == "assistant" and after["role"] == "tool" else turn
        for turn, after in zip(turns, following, strict=True)
    )


def sent_form(turn: Turn) -> Turn:
    """Returns a turn as servers and trainers know it."""
    return {**turn, "role": "assistant"} if turn["role"] == "call" else turn


def said(turn: Turn) -> str:
    """Returns all that a turn says, the tools that it calls included."""
    return str(turn["content"]) or json.dumps(turn.get("tool_calls", ""))
