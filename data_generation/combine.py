"""Combine several files of conversations: merge, remove duplicates, sample or mix by weights, shuffle, and count it all.

Files are taken in the order given. Of identical conversations the first is kept; then each file's sample, or its share by
weights, is drawn from what is left of it. An id that stands for another conversation already gets a suffix made from its
conversation, so that ids stay unique. Prompts with and without further turns become one layout. Sample and order depend on
the conversations and the seed alone. README.md beside this file has the commands.
"""

import json
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from reprlib import repr as shorten

from parts.command_line import flag, number, parse_flags, speaker
from parts.conversation_rows import dump_row, parse_conversation
from parts.file_command import check_paths, run_command, write_whole
from parts.prompt_files import InputError, id_key, parse_json
from parts.raw_rows import ARCHIVES, lines_of
from parts.row_kinds import RowKinds, as_messages
from parts.weights import parse_weights, rows_by_weight

say = speaker(__file__)
SUFFIX_DIGITS = 8


@dataclass(frozen=True)
class Settings:
    """The command's flags."""

    data_path: list[Path] = field(
        metadata=flag("files of conversations, .jsonl", action="extend", nargs="+", type=Path, required=True)
    )
    output_path: Path = field(metadata=flag("the combined file", type=Path, required=True))
    sample: list[str] = field(
        metadata=flag(
            "take only so many rows of a file: PATH=500 or PATH=25%%", [], action="extend", nargs="+", metavar="PATH=N"
        )
    )
    weights: list[str] = field(
        metadata=flag(
            "mix all files in these proportions, no row twice: PATH=3 OTHER=1",
            [],
            action="extend",
            nargs="+",
            metavar="PATH=W",
        )
    )
    rows: int | None = field(
        metadata=flag("rows of the mix (default: as many as the weights allow)", type=number(int, 1))
    )
    shuffle: bool = field(metadata=flag("shuffle the rows", False, action="store_true"))
    seed: int = field(metadata=flag("another seed gives another sample and order (default: 0)", 0, type=int))
    keep_duplicates: bool = field(metadata=flag("keep identical conversations", False, action="store_true"))
    common_keys: bool = field(metadata=flag("leave out keys that not all rows have", False, action="store_true"))
    overwrite: bool = field(metadata=flag("replace an output that is there already", False, action="store_true"))

    @property
    def report_path(self) -> Path:
        """File of the counts."""
        return Path(f"{self.output_path}.report.json")


@dataclass
class Counts:
    """What became of the rows of an input: rows = written + duplicates + sampled_out."""

    path: str
    rows: int = 0
    written: int = 0
    duplicates: int = 0
    sampled_out: int = 0
    new_ids: int = 0

    def summary(self) -> str:
        """Returns the counts in one line."""
        parts = f"{self.written} written + {self.duplicates} duplicates + {self.sampled_out} sampled out"
        return f"{self.path}: {self.rows} rows = {parts}; {self.new_ids} with a new id"


def parse_samples(samples: Sequence[str], paths: Sequence[Path]) -> dict[Path, str]:
    """Returns the share that is wanted of each file named in --sample; raises InputError."""
    wanted: dict[Path, str] = {}
    for sample in samples:
        name, _, size = sample.rpartition("=")
        path, amount = Path(name), size.removesuffix("%")
        if path not in paths or path in wanted:
            raise InputError(f"found --sample {sample}, expected PATH=N once for one of --data_path; correct PATH")
        in_range = amount.isascii() and amount.isdigit() and int(amount) > 0 and ("%" not in size or int(amount) <= 100)
        if not in_range:
            raise InputError(f"found --sample {sample}, expected a number of rows or 1% to 100%; correct it")
        wanted[path] = size
    return wanted


def sample_size(size: str, available: int) -> int:
    """Returns how many of the rows at hand "500" or "25%" are."""
    if size.endswith("%"):
        return max(1, round(available * int(size[:-1]) / 100)) if available else 0
    return min(int(size), available)


@dataclass
class Candidates:
    """What is left of an input after duplicates: where each row begins, and hashes of its conversation and id."""

    source: int
    counts: Counts
    offsets: "array[int]" = field(default_factory=lambda: array("Q"))
    contents: "array[int]" = field(default_factory=lambda: array("Q"))
    ids: "array[int]" = field(default_factory=lambda: array("Q"))


class Plan:
    """Which rows are written, in order. Of a row, only offset and hashes are kept: 0.33 GB for a million, shuffled."""

    def __init__(self, settings: Settings) -> None:
        """Plans to write nothing yet."""
        self.settings = settings
        self.kinds = RowKinds(settings.common_keys)
        self.sources, self.offsets, self.contents = array("I"), array("Q"), array("Q")
        self.renamed = bytearray()
        self.known_contents: set[int] = set()
        self.known_ids: dict[int, int] = {}

    def read_file(self, source: int, apart: bool) -> Candidates:
        """Reads an input and returns what is left after duplicates; `apart`: later files may have the same rows."""
        path = self.settings.data_path[source]
        found = Candidates(source, Counts(str(path)))
        seen: set[int] = set() if apart else self.known_contents
        for where, offset, line in read_lines(path):
            row = parse_conversation(line, where)
            self.kinds.check(row, where)
            found.counts.rows += 1
            if not self.settings.keep_duplicates:
                if row.content in seen or row.content in self.known_contents:
                    found.counts.duplicates += 1
                    continue
                seen.add(row.content)
            found.offsets.append(offset)
            found.contents.append(row.content)
            found.ids.append(row.content if row.id is None else id_key(row.id))
        return found

    def take(self, found: Candidates, wanted: int | None) -> None:
        """Plans to write so many rows of an input, or all of them."""
        kept = self.draw(found.contents, wanted)
        for index in kept:
            is_new = self.known_ids.setdefault(found.ids[index], found.contents[index]) == found.contents[index]
            self.renamed.append(not is_new)
            found.counts.new_ids += not is_new
            self.sources.append(found.source)
            self.offsets.append(found.offsets[index])
            self.contents.append(found.contents[index])
        if not self.settings.keep_duplicates:
            self.known_contents.update(found.contents[index] for index in kept)
        found.counts.written, found.counts.sampled_out = len(kept), len(found.contents) - len(kept)

    def add_sampled(self, samples: Mapping[Path, str]) -> list[Counts]:
        """Plans to write each input, or its sample, one after the other: what a sample leaves out may come in a later file."""
        inputs = []
        for source, path in enumerate(self.settings.data_path):
            size = samples.get(path)
            found = self.read_file(source, apart=size is not None)
            self.take(found, None if size is None else sample_size(size, len(found.contents)))
            inputs.append(found.counts)
            if size and not size.endswith("%") and int(size) > found.counts.written:
                say(f"warning: {path} has {found.counts.written} rows to sample {size} from; all of them are taken")
        return inputs

    def add_weighted(self, weights: Mapping[Path, Fraction]) -> list[Counts]:
        """Plans to write as much of each input as its weight says; raises InputError if it has not so much."""
        inputs = [self.read_file(source, apart=False) for source in range(len(self.settings.data_path))]
        available = {Path(found.counts.path): len(found.contents) for found in inputs}
        for found, rows in zip(inputs, rows_by_weight(weights, available, self.settings.rows), strict=True):
            self.take(found, rows)
        return [found.counts for found in inputs]

    def draw(self, contents: Sequence[int], wanted: int | None) -> Sequence[int]:
        """Returns the numbers of the rows in a file's sample, in order."""
        if wanted is None:
            return range(len(contents))
        lots = sorted(range(len(contents)), key=lambda index: id_key(f"{self.settings.seed}/draw/{contents[index]}"))
        return sorted(lots[:wanted])

    def lines(self) -> Iterator[bytes]:
        """Streams the planned lines, byte for byte where neither id nor keys change."""
        order: Sequence[int] = range(len(self.offsets))
        if self.settings.shuffle:
            order = sorted(order, key=lambda index: id_key(f"{self.settings.seed}/order/{self.contents[index]}"))
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("rb")) for path in self.settings.data_path]
            for index in order:
                file = files[self.sources[index]]
                file.seek(self.offsets[index])
                line = file.readline()
                if self.renamed[index] or self.kinds.differ or self.kinds.mixed:
                    line = self.changed(line, index)
                yield line if line.endswith(b"\n") else line + b"\n"

    def changed(self, line: bytes, index: int) -> bytes:
        """Returns a line with a new id, if it needs one, and with the keys and the layout that all rows have."""
        record = parse_json(line, "a row that was read before")
        if self.renamed[index]:
            record["id"] = f"{record['id']}-{f'{self.contents[index]:015x}'[:SUFFIX_DIGITS]}"
        if self.kinds.mixed:
            record = as_messages(record)
        return dump_row({key: value for key, value in record.items() if key in self.kinds.keys})


def read_lines(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """Streams the lines that are not empty, each with its place for messages and its offset."""
    if path.suffix.lower() in ARCHIVES:
        raise InputError(
            f"{path}: found a compressed file, expected one that can be read in any order; unpack it first"
        )
    with path.open("rb") as file:
        offset = 0
        for count, line in enumerate(lines_of(file, path), 1):
            if not line.isspace():
                yield f"{path}:{count}", offset, line
            offset += len(line)


def combine(settings: Settings) -> int:
    """Writes the combined file and its report; returns the exit code.

    Raises:
        InputError: If the flags, the files or a row cannot be used, rows do not go together, or none is left.
    """
    samples = parse_samples(settings.sample, settings.data_path)
    weights = parse_weights(settings.weights, settings.data_path)
    if (settings.sample and weights) or (settings.rows and not weights):
        raise InputError(
            "found --sample with --weights, or --rows without, expected --sample, or --weights with or without --rows"
        )
    check_paths(settings.data_path, [settings.output_path, settings.report_path], settings.overwrite)
    plan = Plan(settings)
    inputs = plan.add_weighted(weights) if weights else plan.add_sampled(samples)
    if not plan.offsets:
        raise InputError(f"found no rows in {shorten([str(path) for path in settings.data_path])}, expected some")
    write_whole(settings.output_path, plan.lines())
    total = Counts(str(settings.output_path))
    for counts in inputs:
        for name in ("rows", "written", "duplicates", "sampled_out", "new_ids"):
            setattr(total, name, getattr(total, name) + getattr(counts, name))
    report = {
        "inputs": [asdict(counts) for counts in inputs],
        "total": asdict(total),
        "sample": settings.sample,
        "weights": settings.weights,
        "shuffle": settings.shuffle,
        "seed": settings.seed,
        "keys": sorted(plan.kinds.keys),
    }
    write_whole(settings.report_path, [json.dumps(report, indent=2).encode() + b"\n"])
    for counts in (*inputs, total):
        print(counts.summary())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after an error."""
    settings = parse_flags(Settings, __doc__, argv)
    return run_command(lambda: combine(settings), say)


if __name__ == "__main__":
    sys.exit(main())
