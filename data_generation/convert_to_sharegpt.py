"""Convert continuations (a prompt and all that a model wrote after it, playing both roles) into conversations.

Texts are taken apart by the model's own chat template: README.md beside this file has the commands. A conversation goes
as far as its turns are a well-formed alternation, and ends with an answer. Every input row is converted, dropped or
unreadable.
"""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from parts.chat_template import ChatTemplate
from parts.command_line import flag, parse_flags, speaker
from parts.conversation_rows import dump_row, format_turns
from parts.file_command import check_paths, run_command, write_whole_with_failures
from parts.json_lines import JsonLines, draft_path
from parts.prompt_files import InputError, Turn, parse_id
from parts.raw_rows import parse_record, read_records
from parts.turn_reader import SplitText

say = speaker(__file__)


@dataclass(frozen=True)
class Settings:
    """The command's flags."""

    data_path: Path = field(
        metadata=flag("texts: .jsonl or .json, also with .gz or .zst; rows with 'text'", type=Path, required=True)
    )
    output_path: Path = field(metadata=flag("conversations, .jsonl", type=Path, required=True))
    tokenizer: str = field(metadata=flag("the model's tokenizer: a directory or a name on the hub", required=True))
    format: str = field(metadata=flag("layout of a row", "sharegpt", choices=["sharegpt", "messages"]))
    cut: str = field(
        metadata=flag("what to do with a last answer that was cut", "keep", choices=["keep", "mark", "drop"])
    )
    overwrite: bool = field(metadata=flag("replace an output that is there already", False, action="store_true"))

    @property
    def failed_path(self) -> Path:
        """File of the rows that could not be read."""
        return Path(f"{self.output_path}.failed.jsonl")


@dataclass
class Counts:
    """What became of the input rows: converted + dropped + unreadable = rows."""

    rows: int = 0
    converted: int = 0
    dropped: int = 0
    unreadable: int = 0
    cut: int = 0
    stopped_early: int = 0

    def summary(self) -> str:
        """Returns the counts in one line."""
        parts = f"{self.converted} converted + {self.dropped} dropped + {self.unreadable} unreadable = {self.rows} rows"
        return f"{parts}; {self.cut} with a cut answer, {self.stopped_early} used up to a turn out of place"


def parse_text(record: Any, where: str) -> tuple[str, str]:
    """Returns id and text of a row, or raises InputError."""
    record = parse_record(record)
    row_id, text = "", record
    if isinstance(record, dict):
        row_id, text = parse_id(record, where)[0], record.get("text")
    if not isinstance(text, str):
        raise InputError(f"{where}: found {shorten(record)}, expected a text or an object with 'text'")
    try:
        digest = hashlib.sha256(text.encode()).hexdigest()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: found half of a surrogate pair, expected valid Unicode") from error
    return row_id or digest[:16], text


def whole_rounds(split: SplitText, cut: str) -> tuple[list[Turn], bool]:
    """Returns the turns up to the last round that has a user's text and an answer.

    Args:
        split: The turns of a text.
        cut: "drop" leaves out an answer that was cut, with what it answers.

    Returns:
        The turns, none if there is no round, and whether an answer among them was cut.
    """
    turns = split.turns
    start = 1 if turns and turns[0]["role"] == "system" else 0
    end = start
    while all(turn["content"].strip() for turn in turns[end : end + 2]) and end + 2 <= len(turns):
        end += 2
    was_cut = split.cut and start < end == len(turns)
    if was_cut and cut == "drop":
        end -= 2
    head = [turn for turn in turns[:start] if turn["content"].strip()]
    return (head + turns[start:end] if end > start else []), was_cut


class Conversion:
    """One pass over the input."""

    def __init__(self, settings: Settings, template: ChatTemplate) -> None:
        """Starts with no rows."""
        self.settings, self.template = settings, template
        self.counts = Counts()
        self.failures = JsonLines(draft_path(settings.failed_path), "reason")

    def lines(self) -> Iterator[bytes]:
        """Streams the converted rows as lines, counts all, and writes down the unreadable ones."""
        for where, record in read_records(self.settings.data_path):
            self.counts.rows += 1
            row_id = where
            try:
                row_id, text = parse_text(record, where)
                row = self.convert(row_id, text, where)
            except InputError as error:
                self.counts.unreadable += 1
                self.failures.append({"id": row_id, "reason": str(error)})
                continue
            if row:
                self.counts.converted += 1
                yield dump_row(row)
        if not self.counts.rows:
            raise InputError(f"{self.settings.data_path}: found no rows, expected at least one")

    def convert(self, row_id: str, text: str, where: str) -> dict[str, Any]:
        """Returns the conversation of a text, empty if it is dropped; raises InputError if there is none in it."""
        split = self.template.split_turns(text)
        turns, was_cut = whole_rounds(split, self.settings.cut)
        self.counts.cut += was_cut
        if not turns and was_cut:
            self.counts.dropped += 1
            return {}
        if not turns:
            found = split.problem or f"found {len(split.turns)} turns without an answer"
            raise InputError(f"{where}: {found}; expected a user turn and an answer in the tokenizer's format")
        self.counts.stopped_early += bool(split.problem)
        mark = {"cut": was_cut} if self.settings.cut == "mark" else {}
        return {"id": row_id, **format_turns(turns, self.settings.format), **mark}


def convert(settings: Settings) -> int:
    """Writes the conversations; returns the exit code.

    Raises:
        InputError: If the flags, the files or the tokenizer cannot be used, or there are no rows.
    """
    check_paths([settings.data_path], [settings.output_path, settings.failed_path], settings.overwrite)
    template = ChatTemplate.load(settings.tokenizer)
    template.split_turns("")  # shows a template that cannot be read before any file is touched
    conversion = Conversion(settings, template)
    write_whole_with_failures(settings.output_path, conversion.lines(), conversion.failures, settings.failed_path)
    print(conversion.counts.summary())
    if conversion.counts.unreadable:
        say(f"{conversion.counts.unreadable} rows could not be read; {settings.failed_path} says why")
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 if every row could be read, 1 if some could not, 2 after an error."""
    settings = parse_flags(Settings, __doc__, argv)
    return run_command(lambda: convert(settings), say)


if __name__ == "__main__":
    sys.exit(main())
