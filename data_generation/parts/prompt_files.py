"""Read prompts of many layouts as rows of one form with stable ids; README.md beside this file lists the layouts.

Knows nothing about servers or outputs. Every error names the place, what was found and what was expected.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from reprlib import repr as shorten
from typing import Any, NamedTuple

from parts.input_turns import LAYOUT_KEYS, NoTextError, Turn, parse_turns
from parts.raw_rows import InputError, parse_json, read_raw_rows

__all__ = ["InputError", "InputSize", "Row", "Turn", "check_rows", "id_key", "parse_json", "parse_turns", "read_rows"]

ID_KEYS = ("id", "prompt_id")
COLUMNS = (*ID_KEYS, *LAYOUT_KEYS, "body", "request", "custom_id")  # that datasets are read for
CANONICAL_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Row:
    """One input conversation.

    Args:
        id: The given id, or the first 16 digits of `digest`.
        digest: SHA-256 of the turns, the same for the same turns in any input layout.
        turns: All turns of the input, in one form; none where `reason` says why the row cannot be used.
        reason: Place and cause where the row has no usable prompt, otherwise empty.
        of_prompt: Whether `id` is a `prompt_id`, which conversations with the same first prompt share.
    """

    id: str
    digest: str
    turns: tuple[Turn, ...]
    reason: str = ""
    of_prompt: bool = False


class InputSize(NamedTuple):
    """Size of an input: all rows, and the different ids among them."""

    rows: int
    distinct: int


def id_key(row_id: str) -> int:
    """Returns a 60-bit hash of an id: a set of a million of them takes 65 MB.

    Two of n ids share a key with a chance of about n² / 2^61, 4e-7 for a million; one of the two rows is then taken
    for done, for a duplicate or for one with a wrong id.
    """
    # 60 bits are two digits of a Python int; 64 would need a third.
    return int.from_bytes(hashlib.blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 4


def why_unusable(turns: tuple[Turn, ...]) -> str:
    """Returns why no conversation can be made from these turns, or nothing."""
    prompts = [turn["content"] for turn in turns if turn["role"] == "user"]
    if not prompts:
        return "found no user turn, expected at least one"
    if any(not prompt or prompt.isspace() for prompt in prompts):
        return "found an empty user turn, expected text"
    return ""


def parse_id(record: dict[str, Any], where: str) -> tuple[str, bool]:
    """Returns the given id, empty if there is none, and whether it is the prompt's; or raises InputError."""
    keys = (*ID_KEYS, "custom_id") if isinstance(record.get("body"), dict) else ID_KEYS  # of a batch of requests
    key = next((key for key in keys if record.get(key) is not None), None)
    if key is None:
        return "", False
    found = record[key]
    if isinstance(found, bool) or not isinstance(found, str | int) or found == "":
        raise InputError(f"{where}: found the {key} {shorten(found)}, expected a text or an integer")
    try:
        str(found).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: found half of a surrogate pair in '{key}', expected valid Unicode") from error
    return str(found), key == "prompt_id"


def parse_row(record: Any, where: str) -> Row:
    """Brings one raw row into one form and gives it its id, or raises InputError."""
    row_id, of_prompt = parse_id(record, where) if isinstance(record, dict) else ("", False)
    try:
        turns = parse_turns(record, where)
        reason = why_unusable(turns)
    except NoTextError as error:
        turns, reason = ({"role": "", "content": record},), str(error).removeprefix(f"{where}: ")
    canonical = CANONICAL_JSON.encode(turns)
    try:
        packed = canonical.encode()
    except UnicodeEncodeError:
        packed = canonical.encode("utf-8", "surrogatepass")
        reason = "found half of a surrogate pair, expected valid Unicode"
    digest = hashlib.sha256(packed).hexdigest()
    if reason:
        return Row(row_id or digest[:16], digest, (), f"{where}: {reason}", of_prompt)
    return Row(row_id or digest[:16], digest, turns, "", of_prompt)


def read_rows(data_path: str, split: str | None = None, limit: int | None = None) -> Iterator[Row]:
    """Streams the first `limit` rows of a prompts file or dataset.

    A row without a user turn, or with an empty one, comes without turns and with the reason.

    Raises:
        InputError: If the input cannot be read, and at the first row that is malformed.
    """
    for where, record in itertools.islice(read_raw_rows(data_path, split, COLUMNS), limit):
        yield parse_row(record, where)


def check_rows(data_path: str, split: str | None = None, limit: int | None = None) -> InputSize:
    """Reads the whole input once, so that what is wrong with it shows before the first request.

    Rows that share an id and their turns, or a `prompt_id`, are duplicates and no error.

    Raises:
        InputError: If a row is malformed, there is none, or one id stands for two different conversations.
    """
    known: dict[int, int] = {}  # key of the id → number of the conversation
    total = 0
    for total, row in enumerate(read_rows(data_path, split, limit), 1):
        key = id_key(row.id)
        # Where the turns or the prompt make the id, it needs no number beside it, which would take more memory.
        number = key if row.of_prompt or row.id == row.digest[:16] else int(row.digest[:15], 16)
        if known.setdefault(key, number) != number:
            found = f"found the id '{row.id}' on two different conversations, the later in row {total}"
            raise InputError(f"{data_path}: {found}, expected unique ids")
    if not total:
        raise InputError(f"{data_path}: found no rows, expected at least one")
    return InputSize(total, len(known))
