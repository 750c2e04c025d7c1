"""Split a file of conversations into training and evaluation rows, reproducibly and without leakage.

The side of a row depends on its prompt and the seed alone: on neither the order of the rows nor the other rows' number
(with --eval_fraction). Rows with the same first user turn, whatever its case and white space, stay together, and so do
identical conversations. Lines are copied byte for byte. README.md beside this file has the commands.
"""

import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from parts.command_line import flag, number, parse_flags, speaker
from parts.conversation_rows import parse_conversation
from parts.file_command import check_paths, run_command, write_whole
from parts.prompt_files import InputError, id_key
from parts.raw_rows import lines_of, open_bytes

say = speaker(__file__)
TRAIN, EVAL, REMOVED, BLANK = range(4)
HASHES = 1 << 60  # id_key is below
DEFAULT_FRACTION = 0.05


@dataclass(frozen=True)
class Settings:
    """The command's flags."""

    data_path: Path = field(metadata=flag("conversations: .jsonl, .jsonl.gz or .jsonl.zst", type=Path, required=True))
    train_path: Path = field(metadata=flag("rows to train on", type=Path, required=True))
    eval_path: Path = field(metadata=flag("rows to evaluate on", type=Path, required=True))
    eval_fraction: float | None = field(
        metadata=flag(f"share of the prompts to evaluate on (default: {DEFAULT_FRACTION})", type=number(float, 0, 1))
    )
    eval_rows: int | None = field(
        metadata=flag("number of rows to evaluate on, in place of the fraction", type=number(int, 1))
    )
    seed: int = field(metadata=flag("another seed gives another split (default: 0)", 0, type=int))
    deduplicate: bool = field(metadata=flag("keep only one of identical conversations", False, action="store_true"))
    overwrite: bool = field(metadata=flag("replace outputs that are there already", False, action="store_true"))


def read_lines(path: Path) -> Iterator[bytes]:
    """Streams the lines of a file, each with its line break."""
    with open_bytes(path) as file:
        for line in lines_of(file, path):
            yield line if line.endswith(b"\n") else line + b"\n"


def read_draws(settings: Settings) -> Iterator[int]:
    """Streams what decides over each line's side: a number below HASHES, or minus REMOVED or minus BLANK."""
    seen: set[int] = set()
    for count, line in enumerate(read_lines(settings.data_path), 1):
        if line.isspace():
            yield -BLANK
            continue
        row = parse_conversation(line, f"{settings.data_path}:{count}")
        if row.content in seen:
            yield -REMOVED
            continue
        if settings.deduplicate:
            seen.add(row.content)
        yield id_key(f"{settings.seed}/{row.prompt}")


def choose_rows(draws: Iterator[int], eval_rows: int) -> set[int]:
    """Returns the draws of the prompts to evaluate on: the lowest, without those whose rows would be too many."""
    chosen: set[int] = set()
    left = eval_rows
    for draw, rows in groupby(sorted(array("Q", (draw for draw in draws if draw >= 0)))):
        size = sum(1 for _ in rows)
        if size <= left:
            chosen.add(draw)
            left -= size
        if not left:
            break
    return chosen


def decide(settings: Settings) -> bytearray:
    """Returns the side of each line."""
    is_eval: Callable[[int], bool]
    if settings.eval_rows is None:
        fraction = DEFAULT_FRACTION if settings.eval_fraction is None else settings.eval_fraction
        is_eval = (fraction * HASHES).__gt__
    else:
        is_eval = choose_rows(read_draws(settings), settings.eval_rows).__contains__
    return bytearray((EVAL if is_eval(draw) else TRAIN) if draw >= 0 else -draw for draw in read_draws(settings))


def split(settings: Settings) -> int:
    """Writes both files; returns the exit code.

    Raises:
        InputError: If the flags, the files or a row cannot be used, or a side would be empty.
    """
    if settings.eval_fraction is not None and settings.eval_rows is not None:
        raise InputError("found --eval_fraction and --eval_rows, expected one of them; leave one out")
    check_paths([settings.data_path], [settings.train_path, settings.eval_path], settings.overwrite)
    sides = decide(settings)
    train, held_out, removed = (sides.count(side) for side in (TRAIN, EVAL, REMOVED))
    total = len(sides) - sides.count(BLANK)
    counts = f"{train} train + {held_out} eval + {removed} removed = {total} rows"
    if not (train and held_out):
        raise InputError(f"found {counts}, expected rows on both sides; change --eval_fraction or --eval_rows")
    for side, path in ((TRAIN, settings.train_path), (EVAL, settings.eval_path)):
        lines = read_lines(settings.data_path)
        write_whole(path, (line for line, its_side in zip(lines, sides, strict=True) if its_side == side))
    print(counts)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after an error."""
    settings = parse_flags(Settings, __doc__, argv)
    return run_command(lambda: split(settings), say)


if __name__ == "__main__":
    sys.exit(main())
