"""JSON as strangers send it: read within limits of size, nesting and memory.

Contract: knows no file's meaning; imports nothing of ours. Whatever a text holds, reading it ends in a value or in a
`ValueError` of one line, and takes no more than ten times the file's memory beyond `_FREE_BYTES`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 100_000_000
"""The index of a model with 100,000 tensors has 10 MB; safetensors refuses longer headers too."""

MAX_DEPTH = 64
"""Levels of lists and objects; Python itself stops, with a RecursionError, near 1,000."""

_FREE_BYTES = 4_000_000
"""Memory that any text may take; it spares small files, such as a list of lists of a number, the ratio below."""
_MEMORY_RATIO, _ASCII_RATIO = 5, 7
"""Beyond `_FREE_BYTES`, memory of the values by that of the file; its text itself is decoded at one byte a character where all
of them are ASCII, else at up to four."""
_BYTES_OF = {"{": 240, "[": 64, '"': 32, ",": 40}
"""What Python needs at most for an object, a list, half of a text, and a place with its number."""


def parse_json(text: str | bytes, where: str, num_bytes: int = 0) -> Any:
    """Parses JSON.

    Args:
        text: UTF-8.
        where: Its file, for messages.
        num_bytes: Of the whole file, where the text is only a part of it.

    Raises:
        ValueError: It is not JSON, or goes beyond the limits.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        memory = sum(size * text.count(mark) for mark, size in _BYTES_OF.items())
        ratio = _ASCII_RATIO if text.isascii() else _MEMORY_RATIO
        if memory > _FREE_BYTES + ratio * max(num_bytes, len(text)):
            raise ValueError(f"its values would take {memory // 1_000_000} MB of memory, as no file of this kind does")
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}): get it again") from error
    except RecursionError as error:
        raise ValueError(f"{where} nests deeper than {MAX_DEPTH} levels: get it again") from error
    if text.count("{") + text.count("[") > MAX_DEPTH and _is_deep(content):
        raise ValueError(f"{where} nests deeper than {MAX_DEPTH} levels: get it again")
    return content


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        level = [value for value in level if isinstance(value, dict | list)]
        if not level:
            return False
        level = [child for value in level for child in (value.values() if isinstance(value, dict) else value)]
    return True


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        ValueError: The file is missing, cannot be read, is anything else, or goes beyond the limits; the message begins with
            its path.
    """
    content = read_value(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected an object")
    return content


def read_json_if_there(file: Path) -> dict[str, Any]:
    """As `read_json`; empty where there is no file."""
    return read_json(file) if file.is_file() else {}


def read_value(file: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: The file is missing, cannot be read, is not JSON, or goes beyond the limits.
    """
    try:
        if not file.is_file():  # a pipe or a device would never end
            raise ValueError(f"{file} is missing: complete the directory")
        with file.open("rb") as stream:
            size = min(os.fstat(stream.fileno()).st_size, MAX_JSON_BYTES)
            text = stream.read(size + 1)  # what is asked for is taken from memory at once
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): expected a file that may be read") from error
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{file} is longer than {MAX_JSON_BYTES:,} bytes, as no file of this kind is: get it again")
    return parse_json(text, str(file))
