"""Files of JSON lines that a crash cannot spoil: whole lines only are appended, whole files only are replaced.

Knows nothing about what the records mean.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from parts.raw_rows import InputError, lines_of, parse_json

LINE_START = b'{"id": "'  # of every record here; a last line that does not begin so was not torn from one


def draft_path(path: Path) -> Path:
    """Returns where `replace_file` writes, which a crash may leave behind."""
    return Path(f"{path}.tmp")


def replace_file(path: Path, lines: Iterable[bytes]) -> None:
    """Writes a file so that readers and crashes find the old one or the new one, and nothing between."""
    draft = draft_path(path)
    with draft.open("wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def is_torn(line: bytes) -> bool:
    """Tells whether a line without its break is the beginning of a record."""
    begun = line.rstrip(b"\0")  # which a power failure may leave in place of what was not yet on the disk
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return begun.startswith(LINE_START) or LINE_START.startswith(begun)
    return False  # no beginning of an object is JSON


class TurnsBegun:
    """Follows records of one conversation, one for each of its `turns`, which count as whole from the last `turn` on."""

    def __init__(self) -> None:
        """Has seen none."""
        self.row: Any = None
        self.turn = self.bytes = 0

    def add(self, record: dict[str, Any], size: int) -> int:
        """Takes a record of so many bytes; returns how many bytes are whole with it that were not so before."""
        row, turn, turns = (record.get(name) for name in ("row", "turn", "turns"))
        follows = turn == 1 or (row == self.row and turn == self.turn + 1)
        size += self.bytes
        begun = row is not None and turn != turns and follows
        self.row, self.turn, self.bytes = (row, turn, size) if begun else (None, 0, 0)  # type: ignore[assignment]
        return 0 if begun else size


class JsonLines:
    """A file of records, each with an id and one more field; made when the first is appended."""

    def __init__(self, path: Path, field: str) -> None:
        """Touches no file yet.

        Args:
            path: The file.
            field: What every record holds beside its id.
        """
        self.path, self.field = path, field
        self.descriptor: int | None = None
        self.whole_bytes = self.torn_bytes = 0
        self.lacks_break = False

    def open(self) -> int:
        """Opens the file for appending if it is not open; returns its descriptor."""
        if self.descriptor is None:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        return self.descriptor

    def sync(self) -> None:
        """Returns when the disk has what was appended."""
        if self.descriptor is not None:
            os.fsync(self.descriptor)

    def close(self) -> None:
        """Closes the file if it is open."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Streams the records with their line numbers, and finds out what is to be repaired.

        Records of a conversation whose last turn is not there are torn like a line, since they were written together.

        Raises:
            InputError: At the first line that is no record.
        """
        self.whole_bytes, self.torn_bytes, self.lacks_break = 0, 0, False
        if not self.path.exists():
            return
        begun = TurnsBegun()
        with self.path.open("rb") as file:
            for count, line in enumerate(lines_of(file, self.path), 1):
                self.lacks_break = not line.endswith(b"\n")
                if self.lacks_break and is_torn(line):
                    self.torn_bytes = begun.bytes + len(line)
                    return
                record = parse_json(line, f"{self.path}:{count}")
                if not (isinstance(record, dict) and isinstance(record.get("id"), str) and self.field in record):
                    expected = f"expected an earlier run's line with 'id' and '{self.field}'; choose another output"
                    raise InputError(f"{self.path}:{count}: found {shorten(record)}, {expected}")
                self.whole_bytes += begun.add(record, len(line))
                yield count, record
        self.torn_bytes = begun.bytes

    def repair(self) -> str:
        """Mends the last line as `read` found it; returns what was done, for the user."""
        if self.torn_bytes:
            done = f"removed the torn last line of {self.path} ({self.torn_bytes} bytes)"
            os.truncate(self.path, self.whole_bytes)
            self.torn_bytes = 0
            return done
        if self.lacks_break:
            os.write(self.open(), b"\n")
            return f"ended the last line of {self.path}, of which only the line break was missing"
        return ""

    def append(self, *records: dict[str, Any]) -> None:
        """Appends records that belong together in one write.

        Raises:
            ValueError: If a record does not fit into JSON and UTF-8; the file is then as it was.
            OSError: If only part of it could be written; nothing is appended after that, so that it can be repaired.
        """
        if self.torn_bytes:
            raise OSError(f"{self.path}: the last line is torn; the next run repairs it")
        lines = b""
        for record in records:
            try:
                lines += json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
            except ValueError as error:
                raise ValueError(f"found {shorten(record)} ({error}), expected what fits into JSON") from error
        try:
            written = os.write(self.open(), lines)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if written != len(lines):
            self.torn_bytes = written
            raise OSError(f"{self.path}: only {written} of {len(lines)} bytes could be written; is the disk full?")
