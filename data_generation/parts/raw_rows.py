"""Streams the raw rows of prompts files, compressed or not, and of Hugging Face datasets; memory stays flat.

Knows nothing about what a row holds. Every error names the place, what was found and what was expected.
"""

import gzip
import importlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, BinaryIO

RawRow = tuple[str, Any]  # place for messages, what stands there

FILE_KINDS = (".txt", ".jsonl", ".json")
ARCHIVES = (".gz", ".zst")
DATASET_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
SHARD_NAME = re.compile(r"(.+)-\d+-of-\d+")
CHUNK_BYTES = 1 << 16
PACKED_BYTES = 1 << 10  # zstd unpacks four bytes to 128 KiB at the most
MAX_ROW_BYTES = 1 << 24  # a conversation of four million tokens
MAX_DEPTH = 64
MEMORY_RATIO, FREE_MEMORY = 10, 1 << 22  # of values by bytes of text; small rows are not looked at so closely
BYTES_OF = {"{": 240, "[": 64, '"': 32, ",": 40}  # an object, a list, half of a text, and a place with its number
HARMLESS_BYTES = FREE_MEMORY // max(BYTES_OF.values())  # of text, which cannot take more than FREE_MEMORY
UNPACKED_RATIO, FREE_UNPACKED = 1000, 1 << 26  # gzip packs no better
WINDOW_RATIO, FREE_WINDOW = 10, 1 << 27  # bytes; the larger is what `zstd` itself unpacks unless it is told otherwise
BATCH_ROWS = 1000
DAMAGED_PARQUET = (
    LookupError,
    TypeError,
    OverflowError,
    MemoryError,
    NotImplementedError,
)  # pyarrow's, beside ValueError


class InputError(ValueError):
    """Files or flags that cannot be used; the user sees the text as it is."""


def parse_json(text: str | bytes, where: str) -> Any:
    """Parses JSON, or raises InputError with its place."""
    try:
        if len(text) > HARMLESS_BYTES and memory_of(text) > FREE_MEMORY + MEMORY_RATIO * len(text):
            raise ValueError("values that take far more memory than the text")
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: found {shorten(text)} ({error}), expected JSON") from error
    if count_of(text, "{") + count_of(text, "[") > MAX_DEPTH:  # few rows have so many, and it takes time
        check_depth(value, where)
    return value


def count_of(text: str | bytes, mark: str) -> int:
    """Returns how often a letter of ASCII is in a text."""
    return text.count(mark) if isinstance(text, str) else text.count(mark.encode())


def memory_of(text: str | bytes) -> int:
    """Returns how many bytes Python needs at most for the values of a JSON text, without their characters."""
    return sum(size * count_of(text, mark) for mark, size in BYTES_OF.items())


def check_depth(value: Any, where: str) -> None:
    """Raises InputError if a JSON value nests deeper than MAX_DEPTH; what writes it later could not follow it."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for inner in level if isinstance(inner, dict | list)]
        level = [child for inner in level for child in (inner.values() if isinstance(inner, dict) else inner)]
        if not level:
            return
    raise InputError(f"{where}: found {shorten(value)}, expected at most {MAX_DEPTH} levels of lists and objects")


def optional_module(name: str, where: str) -> Any:
    """Imports a library that only some inputs need, or raises InputError."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        library = name.partition(".")[0]
        raise InputError(f"{where}: found no library '{library}' to read it with; `pip install {library}`") from error


# ---- files ----


class ZstdReader(io.RawIOBase):
    """Reads all frames of a .zst file; EOFError if one is damaged or cut off, which zstandard's own reader passes over."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        """Prepares to read an open file."""
        self.file = file
        self.zstandard = optional_module("zstandard", where)
        self.max_window = max(FREE_WINDOW, WINDOW_RATIO * os.fstat(file.fileno()).st_size)
        self.frame: Any = None
        self.packed = self.text = b""

    def readable(self) -> bool:
        """Says yes, to io.BufferedReader."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fills the buffer as far as the text at hand reaches; 0 at the end."""
        while not self.text:
            self.packed = self.packed or self.file.read(PACKED_BYTES)
            if not self.packed:
                if self.frame:
                    raise EOFError("it ends within a frame")
                return 0
            self.unpack()
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self.text))
        view[:count], self.text = self.text[:count], self.text[count:]
        return count

    def unpack(self) -> None:
        """Turns the packed bytes at hand into text, up to the end of the frame."""
        if not self.frame:
            largest = min(self.max_window, 1 << 31)  # 2 GiB: the most that `zstd --long` can be told to use
            self.frame = self.zstandard.ZstdDecompressor(max_window_size=largest).decompressobj()
        try:
            self.text = self.frame.decompress(self.packed)
        except self.zstandard.ZstdError as error:
            raise EOFError(str(error)) from error
        self.packed = self.frame.unused_data if self.frame.eof else b""
        if self.frame.eof:
            self.frame = None


class BoundedReader(io.RawIOBase):
    """Reads what an archive unpacks to; EOFError where that is far more than text packs to."""

    def __init__(self, unpacked: io.RawIOBase | gzip.GzipFile, packed_bytes: int) -> None:
        """Prepares to read an archive of `packed_bytes`."""
        self.unpacked = unpacked
        self.most = self.left = FREE_UNPACKED + UNPACKED_RATIO * packed_bytes

    def readable(self) -> bool:
        """Says yes, to io.BufferedReader."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fills the buffer as far as the text at hand reaches; 0 at the end."""
        count = self.unpacked.readinto(buffer) or 0
        self.left -= count
        if self.left < 0:
            raise EOFError(f"it unpacks to more than {self.most:,} bytes")
        return count


@contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    """Opens a file that may be compressed; InputError if the archive is damaged."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            match path.suffix.lower():
                case ".gz":
                    yield io.BufferedReader(BoundedReader(gzip.GzipFile(fileobj=file), size), CHUNK_BYTES)
                case ".zst":
                    yield io.BufferedReader(BoundedReader(ZstdReader(file, str(path)), size), CHUNK_BYTES)
                case _:
                    yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: found a damaged archive ({error}), expected a whole one; fetch it again") from error


def lines_of(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Streams the lines of an open file, each with its break; InputError if one is too long to be a row."""
    count = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        count += 1
        if len(line) > MAX_ROW_BYTES:
            raise InputError(f"{path}:{count}: found a line of more than {MAX_ROW_BYTES:,} bytes, expected rows")
        yield line


def read_lines(path: Path, parse: Callable[[str, str], Any]) -> Iterator[RawRow]:
    """Streams the lines that are not empty, each with its place and parsed."""
    with open_bytes(path) as file:
        for count, raw in enumerate(lines_of(file, path), 1):
            where = f"{path}:{count}"
            try:
                line = raw.decode().removeprefix("\ufeff").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: found {shorten(raw)} ({error}), expected UTF-8") from error
            if line and not line.isspace():
                yield where, parse(line, where)


class RowMeter:
    """Hands out a file, and measures what was read since a row began."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        """Starts at the first row."""
        self.file, self.path = file, path
        self.next_row()

    def next_row(self) -> None:
        """Starts anew."""
        self.bytes = self.memory = 0

    def read(self, size: int = -1) -> bytes:
        """Reads on; InputError if there is too much for one row."""
        chunk = self.file.read(CHUNK_BYTES if size < 0 else min(size, CHUNK_BYTES))
        self.bytes += len(chunk)
        self.memory += memory_of(chunk)
        if self.bytes > MAX_ROW_BYTES or self.memory > FREE_MEMORY + MEMORY_RATIO * self.bytes:
            raise InputError(f"{self.path}: found a row that takes too much memory, expected one of less")
        return chunk


def read_array(path: Path) -> Iterator[RawRow]:
    """Streams the elements of a JSON list."""
    ijson = optional_module("ijson", str(path))
    with open_bytes(path) as text:
        head = text.peek(1)[:1]
        for _ in range(CHUNK_BYTES):
            if not head or head not in b" \t\r\n\xef\xbb\xbf":  # white space, or the mark that some editors put first
                break
            text.read(1)
            head = text.peek(1)[:1]
        if head != b"[":
            expected = "expected a list of rows (one object a line belongs in a .jsonl file)"
            raise InputError(f"{path}: found {shorten(text.read(80).decode(errors='replace'))}, {expected}")
        count, meter = 0, RowMeter(text, path)
        try:
            for count, record in enumerate(ijson.items(meter, "item", use_float=True), 1):
                meter.next_row()
                check_depth(record, f"{path}: row {count}")
                yield f"{path}: row {count}", record
        except InputError:
            raise
        except (ijson.JSONError, ValueError) as error:
            cause = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
            raise InputError(f"{path}: row {count + 1}: found {cause.splitlines()[0]}, expected JSON") from error


def read_records(path: Path) -> Iterator[RawRow]:
    """Streams the rows of a file; a line that is no JSON comes as the error, for `parse_record`, so that it stops nothing."""
    kind = (path.with_suffix("") if path.suffix.lower() in ARCHIVES else path).suffix.lower()
    if kind not in (".json", ".jsonl"):
        raise InputError(f"{path}: found the ending '{kind}', expected .jsonl or .json; rename it")

    def parse(line: str, where: str) -> Any:
        try:
            return parse_json(line, where)
        except InputError as error:
            return error

    return read_array(path) if kind == ".json" else read_lines(path, parse)


def parse_record(found: Any) -> Any:
    """Returns a row of `read_records`, or raises the InputError that came in its place."""
    if isinstance(found, InputError):
        raise found
    return found


# ---- datasets ----


@contextmanager
def explained(problem: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns what a library raises into InputError; `errors` are those that are its own."""
    failures: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *errors)
    try:
        yield
    except InputError:
        raise
    except failures as error:
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{problem} ({cause})") from error


def pick_split(data_path: str, splits: dict[str, Any], split: str | None) -> Any:
    """Returns the split that is asked for, or the only one."""
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        found = "several splits and no --split" if split is None else f"no split '{split}'"
        raise InputError(f"{data_path}: found {found}, expected --split to be one of {', '.join(splits)}")
    return splits[split]


def split_of(file: Path, root: Path) -> str:
    """Returns the split that a parquet file belongs to, as datasets on the Hugging Face hub name their files."""
    if shard := SHARD_NAME.match(file.stem):
        return shard[1]
    if file.stem in ("train", "validation", "test") or file.parent == root:
        return file.stem if file.stem in ("validation", "test") else "train"
    return file.parent.name


def parquet_splits(path: Path) -> dict[str, list[Path]]:
    """Returns the parquet files of each split, in order; `path` is one file or a directory."""
    splits: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*.parquet")) if path.is_dir() else [path]:
        splits.setdefault(split_of(file, path if path.is_dir() else path.parent), []).append(file)
    if not splits:
        raise InputError(f"{path}: found a directory without .parquet files, expected some, or the name of a file")
    return splits


def read_parquet(data_path: str, split: str | None, wanted: tuple[str, ...]) -> Iterator[RawRow]:
    """Streams the rows of a split of local parquet files; of their columns only the wanted ones, if there are any."""
    parquet = optional_module("pyarrow.parquet", data_path)
    for path in pick_split(data_path, parquet_splits(Path(data_path)), split):
        with (
            explained(f"{path}: found something that cannot be read as parquet", *DAMAGED_PARQUET),
            # Through a buffer: a group of rows can be as large as the file, and would be read as a whole.
            parquet.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK_BYTES) as file,
        ):
            columns = [name for name in file.schema_arrow.names if name in wanted] or None
            batches = file.iter_batches(BATCH_ROWS, columns=columns)
            for count, record in enumerate((record for batch in batches for record in batch.to_pylist()), 1):
                yield f"{path}: row {count}", record


def read_dataset(name: str, split: str | None, wanted: tuple[str, ...]) -> Iterator[RawRow]:
    """Streams the rows of a split of a dataset on the hub; of its columns only the wanted ones, if there are any."""
    datasets = optional_module("datasets", name)
    problem = f"{name}: found neither such a file nor a dataset that can be loaded"
    with explained(problem, datasets.exceptions.DatasetsError):
        # Not streamed: fetched once, then mapped into memory on each pass.
        rows = pick_split(name, dict(datasets.load_dataset(name)), split)
    if columns := [column for column in rows.column_names if column in wanted]:
        rows = rows.select_columns(columns)
    batches = rows.iter(batch_size=BATCH_ROWS)
    records = (dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True))
    for count, record in enumerate(records, 1):
        yield f"{name}: row {count}", record


def read_raw_rows(data_path: str, split: str | None, columns: tuple[str, ...]) -> Iterator[RawRow]:
    """Streams the rows of a file or dataset; of a dataset only these columns.

    Raises:
        InputError: If there is no such file or dataset, or it cannot be read.
    """
    path = Path(data_path)
    looks_like_dataset = DATASET_NAME.fullmatch(data_path) and not path.suffix[1:].isalpha()
    if not data_path or not (path.exists() or looks_like_dataset):
        raise InputError(f"{data_path}: found no such file, expected a prompts file or the name of a dataset")
    if not path.exists():
        return read_dataset(data_path, split, columns)
    if path.is_dir() or path.suffix.lower() == ".parquet":
        return read_parquet(data_path, split, columns)
    if split is not None:
        raise InputError(f"{data_path}: found the split '{split}' for a file without splits, expected no --split")
    kind = (path.with_suffix("") if path.suffix.lower() in ARCHIVES else path).suffix.lower()
    if kind not in FILE_KINDS:
        expected = f"expected {', '.join(FILE_KINDS)}, each also with {' or '.join(ARCHIVES)}, or .parquet"
        raise InputError(f"{data_path}: found the ending '{kind}', {expected}")
    if kind == ".json":
        return read_array(path)
    return read_lines(path, parse_json if kind == ".jsonl" else lambda line, _: line)
