"""Looks at training files before anything is loaded: is there an answer to learn from? And at what is then trained on.

Contract: knows axolotl's `datasets` entries and plain local files; knows nothing about models. Axolotl masks and drops
rows itself; this only turns "nothing left" into a line that names the file, and drops columns that are not tokens.
"""

from __future__ import annotations

import codecs
import importlib.metadata
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from axolotl_medusa.errors import first_line
from axolotl_medusa.training.named_files import is_file, named_path

_ASSISTANT_ROLES = ("assistant", "gpt")
_JSON_SUFFIXES = (".json", ".jsonl")
_NOT_BLANK = re.compile(r"[^ \t\n\r]")
_CHUNK = 2**18
_LONGEST_ROW = 2**26
_LONGEST_LOOK = 2**28
"""Bytes; where the first 268 million hold nothing to learn, the rest is left to axolotl."""
_FIRST_TO_READ_MARKED_LISTS = "5.0.1"
"""Of the datasets library: earlier ones read a byte order mark before lines and not before a list."""
_TOKEN_COLUMNS = frozenset({"input_ids", "attention_mask", "labels", "position_ids", "token_type_ids", "length"})


def dataset_problems(cfg: Mapping[str, Any]) -> list[str]:
    """One line for each local dataset in which no row has a turn to train on.

    Checked are JSON and JSONL files with `type: chat_template` (an assistant turn) or an empty type (a label). A file
    is read only as far as its first good row, by every process, piece by piece.

    Args:
        cfg: The YAML as a mapping.

    Raises:
        ValueError: A file cannot be read or is damaged before its first good row.
    """
    problems = []
    named = [entries for key in ("datasets", "test_datasets") if isinstance(entries := cfg.get(key), list)]
    for entry in itertools.chain.from_iterable(named):
        if not isinstance(entry, Mapping):
            continue  # axolotl refuses it
        path = local_json_file(entry)
        if path is None:
            continue
        kind = entry.get("type") or ""
        if kind == "chat_template" and _trains_by_other_rules(cfg, entry):
            continue
        if kind == "chat_template":
            problem = _count_bad_rows(path, partial(_has_assistant_turn, entry=entry), "an assistant turn")
        elif kind == "":
            problem = _count_bad_rows(path, _has_label, "a label other than -100")
        else:
            continue
        if problem:
            problems.append(f"datasets path {path}: {problem}")
    return problems


def local_json_file(entry: Mapping[str, Any]) -> Path | None:
    """The JSON or JSONL file on this disk that an entry under `datasets` names, None where it names anything else."""
    path = named_path(entry.get("path") or "")
    return path if path.suffix in _JSON_SUFFIXES and is_file(path) else None


def rows_of(path: Path) -> Iterator[Any]:
    """The rows of a JSON or JSONL file, one held at a time.

    Raises:
        ValueError: It is damaged, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield from _rows(path, file)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"{path} cannot be read ({error.strerror}): expected a file of JSON rows")


def _trains_by_other_rules(cfg: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    marks = ("message_field_training", "message_field_training_detail")
    return bool(cfg.get("train_on_inputs")) or any(entry.get(mark) for mark in marks)


def _count_bad_rows(path: Path, is_good: Callable[[Any], bool], wanted: str) -> str | None:
    count = 0
    try:
        with path.open("rb") as file:
            for row in _rows(path, file):
                count += 1
                if is_good(row) or file.tell() > _LONGEST_LOOK:
                    return None
    except OSError as error:
        raise _unreadable(path, error) from None
    return (
        f"none of its {count} rows has {wanted}; expected at least one (are field_messages and roles_to_train right?)"
    )


def _rows(path: Path, file: BinaryIO) -> Iterator[Any]:
    mark = codecs.BOM_UTF8 if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else b""
    file.seek(len(mark))
    start = b""
    while path.suffix == ".json" and not start and (line := file.readline(_CHUNK)):
        start = line.strip()
    if mark and start.startswith(b"[") and not _reads_marked_lists():
        raise ValueError(
            f"{path} begins with a byte order mark, which this version of datasets reads before no list: "
            f"save it without one, or install datasets {_FIRST_TO_READ_MARKED_LISTS}"
        )
    file.seek(len(mark))
    if start.startswith(b"[") or start == b"{":
        try:
            yield from _array_rows(file) if start.startswith(b"[") else _printed_rows(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({_reason(error)}): expected a list of objects") from None
        return
    for number in itertools.count(1):
        line = file.readline(_LONGEST_ROW + 1)
        if not line:
            return
        if line.strip():
            try:
                yield _line_row(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}:{number} is not JSON ({_reason(error)}): expected one object a line"
                ) from None


def _reads_marked_lists() -> bool:
    from packaging.version import Version

    return Version(importlib.metadata.version("datasets")) >= Version(_FIRST_TO_READ_MARKED_LISTS)


def _line_row(line: bytes) -> Any:
    if len(line) > _LONGEST_ROW:
        raise ValueError(f"a row of more than {_LONGEST_ROW:,} bytes")
    return json.loads(line.decode("utf-8"))


def _array_rows(file: BinaryIO) -> Iterator[Any]:
    """The elements of a JSON array, without reading much further than the one that is asked for."""
    decoder, text = json.JSONDecoder(), _Text(file)
    text.expect("[")
    if text.peek() == "]":
        text.expect("]")
    else:
        while True:
            yield text.element(decoder)
            if text.peek() != ",":
                text.expect("]")
                break
            text.expect(",")
    if text.peek():
        raise json.JSONDecodeError("Extra data", text.text, text.place)


def _printed_rows(file: BinaryIO) -> Iterator[Any]:
    """Objects one after the other, each on several lines."""
    decoder, text = json.JSONDecoder(), _Text(file)
    while text.peek():
        yield text.element(decoder)


class _Text:
    """What has been read of a file and not been taken yet."""

    def __init__(self, file: BinaryIO) -> None:
        self.text, self.place = "", 0
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._is_whole = False

    def peek(self) -> str:
        """The next character that is not blank, empty at the end of the file."""
        while True:
            found = _NOT_BLANK.search(self.text, self.place)
            self.place = found.start() if found else len(self.text)
            if found or not self._read_on():
                return self.text[self.place : self.place + 1]

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise json.JSONDecodeError(f"Expecting {character!r}", self.text, self.place)
        self.place += 1

    def element(self, decoder: json.JSONDecoder) -> Any:
        """The value that stands here; what looks damaged may only be cut off."""
        self.peek()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.place)
            except json.JSONDecodeError:
                if not self._read_on():
                    raise
                continue
            follows = _NOT_BLANK.search(self.text, end)
            is_whole = not isinstance(value, (int, float)) or (follows is not None and follows.group() in ",]")
            if is_whole or not self._read_on():  # else it may be a number cut in two
                self.place = end
                return value

    def _read_on(self) -> bool:
        """Doubles what is held, so that a long value is not parsed too often; tells whether there was more."""
        if self._is_whole:
            return False
        held = len(self.text) - self.place
        if held > _LONGEST_ROW:
            raise ValueError(f"a row of more than {_LONGEST_ROW:,} bytes")
        chunk = self._file.read(max(_CHUNK, held))
        if not chunk:
            self._is_whole = True
            self._decode(b"", final=True)
            return False
        self.text, self.place = self.text[self.place :] + self._decode(chunk), 0
        return True


def _reason(error: BaseException) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)


def _has_assistant_turn(row: Any, entry: Mapping[str, Any]) -> bool:
    role_key = str(_mapping(entry, "message_property_mappings").get("role") or "role")
    wanted = {str(role) for role in _list(entry, "roles_to_train") or _ASSISTANT_ROLES}
    roles = _mapping(entry, "roles")
    for role in wanted & roles.keys():
        wanted |= {str(spelling) for spelling in _list(roles, role)}
    if wanted & set(_ASSISTANT_ROLES):
        wanted |= set(_ASSISTANT_ROLES)
    turns = row.get(str(entry.get("field_messages") or "messages")) if isinstance(row, Mapping) else None
    turns = [turn for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    return any(str(turn.get(role_key, turn.get("from"))) in wanted for turn in turns)


def _mapping(entry: Mapping[str, Any], key: str) -> Mapping[Any, Any]:
    value = entry.get(key)
    return value if isinstance(value, Mapping) else {}


def _list(entry: Mapping[Any, Any], key: str) -> list[Any]:
    value = entry.get(key)
    return value if isinstance(value, list) else []


def _has_label(row: Any) -> bool:
    labels = row.get("labels") if isinstance(row, Mapping) else None
    return isinstance(labels, list) and any(label != -100 for label in labels)


def token_columns_only(dataset: Any) -> Any:
    """Returns a prepared dataset without columns such as ids and texts.

    Axolotl keeps all columns of rows that are already tokenised, and its collators for packed samples fail on them.
    Whatever does not name its columns (None, a streamed dataset) is returned as it is.
    """
    extra = [name for name in getattr(dataset, "column_names", None) or () if name not in _TOKEN_COLUMNS]
    return dataset.remove_columns(extra) if extra else dataset
