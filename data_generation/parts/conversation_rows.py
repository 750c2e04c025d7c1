"""Rows of conversation files in every layout of this directory: what tells them apart, and how turns are written.

Knows nothing about whole files.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as shorten
from typing import Any

from parts.conversation_files import prompt_key
from parts.input_turns import Turn, parse_turns, said, sent_form
from parts.prompt_files import InputError, id_key, parse_json

TURN_LAYOUTS = ("messages", "conversations")
LAYOUTS = (*TURN_LAYOUTS, "input_ids", "text", "prompt")  # the first that is there counts
SHAREGPT_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
IGNORED_LABEL = -100
TRAINED = "train"  # of a turn; to be named as axolotl's message_field_training


@dataclass(frozen=True, slots=True)
class ConversationRow:
    """What commands over files need to know of a row. Its keys are 60-bit hashes, equal for equal things.

    Args:
        record: The row.
        id: Its id, None if it has none.
        layout: Which of LAYOUTS it has.
        prompt: Key of the first user turn, whatever its case and white space. Where nothing tells the prompt apart
            (a row of text), of all of it.
        content: Key of all turns and their roles; the same in the layouts "messages" and "conversations", and for one user
            turn in "prompt" too.
    """

    record: dict[str, Any]
    id: str | None
    layout: str
    prompt: int
    content: int


def dump_row(record: dict[str, Any]) -> bytes:
    """Returns a row as a line."""
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair fits into JSON only as an escape
        return json.dumps(record).encode() + b"\n"


def format_turns(turns: Sequence[Turn], layout: str, trained: Sequence[bool] | None = None) -> dict[str, Any]:
    """Returns the column with the turns of a row.

    Args:
        turns: The turns.
        layout: "messages" or "sharegpt"; the latter has no words for tools, so that there are none.
        trained: Adds to each turn whether it is to be trained on, under the name TRAINED.
    """
    marks: list[dict[str, Any]] = [{}] * len(turns) if trained is None else [{TRAINED: mark} for mark in trained]
    if layout == "messages":
        return {"messages": [{**sent_form(turn), **mark} for turn, mark in zip(turns, marks, strict=True)]}
    named = [{"from": SHAREGPT_SPEAKERS[turn["role"]], "value": turn["content"]} for turn in turns]
    return {"conversations": [{**turn, **mark} for turn, mark in zip(named, marks, strict=True)]}


def token_prompt(record: dict[str, Any], where: str) -> list[int]:
    """Returns the token ids before the first that has a label, or all of them; raises InputError."""
    ids, labels = record["input_ids"], record.get("labels")
    if not isinstance(ids, list) or (labels is not None and not (isinstance(labels, list) and len(labels) == len(ids))):
        expected = "expected two lists of the same length"
        raise InputError(f"{where}: found the input_ids {shorten(ids)} and labels {shorten(labels)}, {expected}")
    trained = (index for index, label in enumerate(labels or []) if label != IGNORED_LABEL)
    return ids[: next(trained, len(ids))]


def parse_conversation(line: str | bytes, where: str) -> ConversationRow:
    """Reads a row.

    Args:
        line: The row as JSON.
        where: Its place, for messages.

    Raises:
        InputError: If it is no row in one of the layouts.
    """
    record = parse_json(line, where)
    layouts = [key for key in LAYOUTS if isinstance(record, dict) and record.get(key) not in (None, "", [])]
    if not layouts:
        raise InputError(f"{where}: found {shorten(record)}, expected an object with one of {', '.join(LAYOUTS)}")
    layout, row_id = layouts[0], record.get("id")
    if layout in TURN_LAYOUTS:
        turns = parse_turns(record, where)
        prompt = next((turn["content"] for turn in turns if turn["role"] == "user"), "")
        content = json.dumps([[turn["role"], said(turn)] for turn in turns])
        alone = len(turns) == 1 and bool(prompt)  # the same as the layout "prompt"
        keys = prompt_key(prompt or content), id_key(prompt if alone else content)
    elif layout == "input_ids":
        content = json.dumps([record["input_ids"], record.get("labels")])
        keys = id_key(json.dumps(token_prompt(record, where))), id_key(content)
    else:
        text = record[layout]
        if not isinstance(text, str):
            raise InputError(f"{where}: found '{layout}' to be {shorten(text)}, expected a text")
        keys = prompt_key(text), id_key(text)
    return ConversationRow(record, None if row_id is None else str(row_id), layout, *keys)
