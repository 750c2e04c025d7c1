"""Read prompts files (text, JSON lines, JSON; OpenAI or ShareGPT turns) as rows of one form with stable ids.

Knows nothing about servers or outputs. Every error names the file and line, what was found and expected.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

Turn = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

# Where a row may keep its turns; the first match wins. Key of the row: (key of the speaker, key of the text).
TURN_KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class InputError(ValueError):
    """Files or flags that cannot be used; the user sees the text as it is."""


@dataclass(frozen=True)
class Row:
    """One input conversation.

    Args:
        id: The given id, or the first 16 digits of `digest`.
        digest: SHA-256 of the turns, the same for the same turns in any input format.
        turns: All turns of the input, in OpenAI form.
    """

    id: str
    digest: str
    turns: tuple[Turn, ...]


def parse_json(text: str | bytes, where: str) -> Any:
    """Parses JSON, or raises InputError with its place."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: found {shorten(text)} ({error}), expected JSON") from error


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Streams the raw rows of a file (a .json file is read whole), each with its place for messages."""
    if path.suffix == ".json":
        records = parse_json(path.read_bytes(), str(path))
        if not isinstance(records, list):
            expected = "expected a list of rows (one object a line belongs in a .jsonl file)"
            raise InputError(f"{path}: found {shorten(records)}, {expected}")
        yield from ((f"{path}: row {count}", record) for count, record in enumerate(records, 1))
        return
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(f"{path}: found the ending '{path.suffix}', expected .txt, .jsonl or .json")
    with path.open("rb") as lines:
        for count, raw in enumerate(lines, 1):
            where = f"{path}:{count}"
            try:
                line = raw.decode("utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: found {shorten(raw)} ({error}), expected UTF-8") from error
            if line.strip():
                yield where, {"prompt": line} if path.suffix == ".txt" else parse_json(line, where)


def parse_turn(turn: Any, role_key: str, text_key: str, where: str) -> Turn:
    """Brings one turn into OpenAI form, or raises InputError."""
    role = ROLES.get(str(turn.get(role_key))) if isinstance(turn, dict) else None
    text = turn.get(text_key) if role else None
    if role is None or not isinstance(text, str) or (role == "user" and not text.strip()):
        expected = f"'{role_key}' to be one of {', '.join(ROLES)} and '{text_key}' a text, not empty for a user"
        raise InputError(f"{where}: found the turn {shorten(turn)}, expected {expected}")
    return {"role": role, "content": text}


def parse_turns(record: Any, where: str) -> tuple[Turn, ...]:
    """Brings the turns of one raw row into OpenAI form, or raises InputError."""
    expected = "expected an object with 'prompt' (a text) or 'messages' or 'conversations' (lists of turns)"
    if not isinstance(record, dict):
        raise InputError(f"{where}: found {shorten(record)}, {expected}")
    key = next((key for key in (*TURN_KEYS, "prompt") if record.get(key) is not None), None)
    if key is None:
        raise InputError(f"{where}: found the keys {shorten(list(record))}, {expected}")
    found = [{"role": "user", "content": record[key]}] if key == "prompt" else record[key]
    if not isinstance(found, list):
        raise InputError(f"{where}: found '{key}' to be {shorten(found)}, {expected}")
    role_key, text_key = TURN_KEYS.get(key, ("role", "content"))
    turns = tuple(parse_turn(turn, role_key, text_key, where) for turn in found)
    if not any(turn["role"] == "user" for turn in turns):
        raise InputError(f"{where}: found no user turn in '{key}', expected at least one")
    return turns


def parse_row(record: Any, where: str) -> Row:
    """Brings one raw row into OpenAI form and gives it its id, or raises InputError."""
    turns = parse_turns(record, where)
    canonical = json.dumps(turns, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    row_id = record.get("id")
    try:
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        str(row_id).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: found half of a surrogate pair ({error}), expected valid Unicode") from error
    if row_id is None:
        return Row(digest[:16], digest, turns)
    if isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id == "":
        raise InputError(f"{where}: found the id {shorten(row_id)}, expected a text or an integer")
    return Row(str(row_id), digest, turns)


def read_rows(path: Path, limit: int | None = None) -> Iterator[Row]:
    """Streams the first `limit` rows of a prompts file.

    Raises:
        InputError: At the first line that is malformed.
    """
    for where, record in itertools.islice(read_records(path), limit):
        yield parse_row(record, where)


def count_rows(path: Path, limit: int | None = None) -> int:
    """Reads the whole input once, so that what is wrong with it shows before the first request.

    Returns:
        The number of rows.

    Raises:
        InputError: If a row is malformed, there is none, or one id stands for two different conversations.
    """
    digests: dict[str, str] = {}
    total = 0
    for row in read_rows(path, limit):
        total += 1
        if digests.setdefault(row.id, row.digest) != row.digest:
            raise InputError(f"{path}: found the id '{row.id}' on two different conversations, expected unique ids")
    if not total:
        raise InputError(f"{path}: found no rows, expected at least one")
    return total
