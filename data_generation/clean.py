"""Repair a file of conversations so that chat templates can render every row, and count each thing that was done.

Reads every layout that generate.py reads. Answers are never changed: a conversation is used up to the last answer before
something that cannot be mended. README.md beside this file lists the repairs.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parts.command_line import flag, parse_flags, speaker
from parts.conversation_repair import Repair
from parts.conversation_rows import TRAINED, dump_row, format_turns
from parts.file_command import check_paths, run_command, write_whole, write_whole_with_failures
from parts.input_turns import TEXT_KEYS, NoTextError, parse_turns
from parts.json_lines import JsonLines, draft_path
from parts.prompt_files import InputError, parse_id
from parts.raw_rows import parse_record, read_records

say = speaker(__file__)
DROPPED = ("no answer is left", "not text", "unreadable")


@dataclass(frozen=True)
class Settings:
    """The command's flags."""

    data_path: Path = field(
        metadata=flag("conversations: .jsonl or .json, also with .gz or .zst", type=Path, required=True)
    )
    output_path: Path = field(metadata=flag("conversations, .jsonl", type=Path, required=True))
    format: str = field(metadata=flag("layout of a row", "messages", choices=["messages", "sharegpt"]))
    system: str = field(
        metadata=flag(
            "system turns: keep those at the beginning, join them to the user turn (for templates without them), or drop them",
            "keep",
            choices=["keep", "join", "drop"],
        )
    )
    overwrite: bool = field(metadata=flag("replace an output that is there already", False, action="store_true"))

    @property
    def failed_path(self) -> Path:
        """File of the rows that were left out, each with its reason."""
        return Path(f"{self.output_path}.failed.jsonl")

    @property
    def report_path(self) -> Path:
        """File of the counts."""
        return Path(f"{self.output_path}.report.json")


class Cleaning:
    """One pass over the input."""

    def __init__(self, settings: Settings) -> None:
        """Starts with no rows."""
        self.settings = settings
        self.rows = self.written = self.repaired = 0
        self.repairs: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.failures = JsonLines(draft_path(settings.failed_path), "reason")

    def lines(self) -> Iterator[bytes]:
        """Streams the repaired rows as lines, counts all, and writes down those that are left out."""
        for where, found in read_records(self.settings.data_path):
            self.rows += 1
            row_id = ""
            try:
                record = parse_record(found)
                row_id = parse_id(record, where)[0] if isinstance(record, dict) else ""
                line = self.clean(record, row_id, where)
            except (InputError, UnicodeEncodeError) as error:
                reason = "found half of a surrogate pair" if isinstance(error, UnicodeEncodeError) else str(error)
                self.leave_out(row_id or where, "not text" if isinstance(error, NoTextError) else "unreadable", reason)
                continue
            if line is None:
                self.leave_out(
                    row_id or where, "no answer is left", f"{where}: found no answer to a user turn, expected one"
                )
                continue
            self.written += 1
            yield line
        if not self.rows:
            raise InputError(f"{self.settings.data_path}: found no rows, expected at least one")
        if not self.written:
            raise InputError(f"{self.settings.data_path}: found {self.summary()}, expected rows that can be used")

    def clean(self, record: Any, row_id: str, where: str) -> bytes | None:
        """Returns a row as a line, None if nothing is left of it; raises InputError if it cannot be read."""
        turns = parse_turns(record, where)
        if has_marks(record):
            found = f"found turns with '{TRAINED}', which say what is to be trained on and would be lost"
            raise InputError(f"{where}: {found}; expected none, since such rows need no repair")
        repair = Repair(turns, self.settings.system)
        if not repair.turns:
            return None
        written = format_turns(repair.turns, self.settings.format)
        packed = json.dumps(written, ensure_ascii=False).encode()  # half of a surrogate pair would stop the training
        row = {"id": row_id or hashlib.sha256(packed).hexdigest()[:16], **written}
        done = [*repair.done, *(["turns spelled anew"] if is_spelled_otherwise(record, self.settings.format) else [])]
        self.repaired += bool(done)
        self.repairs.update(done)
        return dump_row(row)

    def leave_out(self, row_id: str, why: str, reason: str) -> None:
        """Counts a row that is left out and writes down why."""
        self.dropped[why] += 1
        self.failures.append({"id": row_id, "reason": reason.encode(errors="replace").decode()})

    def summary(self) -> str:
        """Returns the counts in one line."""
        dropped = " + ".join(f"{self.dropped[why]} {why}" for why in DROPPED)
        return f"{self.written} written + {dropped} = {self.rows} rows; {self.repaired} repaired"

    def report(self) -> dict[str, Any]:
        """Returns all counts."""
        counts = {"rows": self.rows, "written": self.written, "repaired": self.repaired}
        return {**counts, "left_out": dict(self.dropped), "repairs": dict(self.repairs.most_common())}


def turns_in(record: Any) -> list[Any]:
    """Returns the raw turns of a row in the two layouts that are written, none in others."""
    if not isinstance(record, dict):
        return []
    found: Any = next((record[key] for key in ("messages", "conversations") if record.get(key)), [])
    return found if isinstance(found, list) else []


def has_marks(record: Any) -> bool:
    """Returns whether turns say by themselves what is to be trained on."""
    return any(isinstance(turn, dict) and TRAINED in turn for turn in turns_in(record))


def is_spelled_otherwise(record: Any, layout: str) -> bool:
    """Returns whether a row has another layout than is written, or turns with other names."""
    speaker_key, text_key = ("role", "content") if layout == "messages" else ("from", "value")
    turns = turns_in(record)
    others = {"role", "from", *TEXT_KEYS} - {speaker_key, text_key}
    return not turns or any(
        not {speaker_key, text_key} <= turn.keys() or others & turn.keys() or not isinstance(turn[text_key], str | None)
        for turn in turns
    )


def clean(settings: Settings) -> int:
    """Writes the repaired conversations; returns the exit code.

    Raises:
        InputError: If the flags or the file cannot be used, or no row is left.
    """
    outputs = [settings.output_path, settings.failed_path, settings.report_path]
    check_paths([settings.data_path], outputs, settings.overwrite)
    cleaning = Cleaning(settings)
    write_whole_with_failures(settings.output_path, cleaning.lines(), cleaning.failures, settings.failed_path)
    write_whole(settings.report_path, [json.dumps(cleaning.report(), indent=2).encode() + b"\n"])
    print(cleaning.summary())
    for what, count in cleaning.repairs.most_common():
        print(f"  {count} {what}")
    if cleaning.dropped:
        say(f"{sum(cleaning.dropped.values())} rows were left out; {settings.failed_path} says why")
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 if every row is there, 1 if some were left out, 2 after an error."""
    settings = parse_flags(Settings, __doc__, argv)
    return run_command(lambda: clean(settings), say)


if __name__ == "__main__":
    sys.exit(main())
