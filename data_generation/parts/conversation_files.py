"""The files of a run: conversations, failed rows, skipped rows and the report. Nothing that was written gets lost.

A row that failed before and is asked again stays in the file of the failed until its conversation is on the disk: at
any moment a row is in one of the files, or in both, where the conversation counts. Knows nothing about servers.
"""

import errno
import fcntl
import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from parts.json_lines import JsonLines, draft_path, replace_file
from parts.prompt_files import InputError, id_key, parse_turns

LOG = logging.getLogger(__name__)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that cannot lock


class Layout(NamedTuple):
    """What the rows of an output have in common, so that they can be trained on together."""

    format: str
    token_ids: bool
    split_turns: bool = False

    def __str__(self) -> str:
        """Says it for messages."""
        rows = ", a row for each answer" if self.split_turns else ""
        return f"{self.format} with{'' if self.token_ids else 'out'} token ids{rows}"


def row_of(record: dict[str, Any]) -> str:
    """Returns the id of the input row that a record is of."""
    return str(record.get("row", record["id"]))


def prompt_key(prompt: str) -> int:
    """Returns a 60-bit hash of a prompt, the same for prompts that differ in case and white space only."""
    return id_key(" ".join(prompt.lower().split()))


class OutputFiles:
    """The output of a run, locked against other runs while it is open; use it as a context manager.

    What earlier runs left is known inside the `with` block, where a row is one of these sets by its `id_key`:

    - done: Rows with a conversation in the output.
    - skipped: Rows that were left out.
    - failed: Rows that failed and are not to be asked again; none with `retry_failed`.

    And of the conversations:

    - prompts: `prompt_key` of each one's first user turn, if wanted.
    - models: How many each model wrote.
    """

    def __init__(
        self,
        output_path: Path,
        retry_failed: bool = False,
        *,
        with_prompts: bool = False,
        say: Callable[[str], None] = LOG.warning,
    ) -> None:
        """Touches no file yet.

        Args:
            output_path: File of the conversations; the others stand beside it.
            retry_failed: Whether rows that failed are to be asked again.
            with_prompts: Whether `prompts` is wanted.
            say: Is told, line by line, what the user should know.
        """
        self.output_path = output_path
        self.failed_path = Path(f"{output_path}.failed.jsonl")
        self.skipped_path = Path(f"{output_path}.skipped.jsonl")
        self.report_path = Path(f"{output_path}.report.json")
        self.retry_failed, self.with_prompts, self.say = retry_failed, with_prompts, say
        self.done: set[int] = set()
        self.skipped: set[int] = set()
        self.failed: set[int] = set()
        self.prompts: set[int] = set()
        self.models: Counter[str] = Counter()
        self._conversations = JsonLines(output_path, "finish_reasons")
        self._failures = JsonLines(self.failed_path, "reason")
        self._skips = JsonLines(self.skipped_path, "reason")
        self._layouts: dict[Layout, int] = {}  # with the first line that has it
        self._failed_before: set[int] = set()
        self._settled: set[int] = set()  # of those, what this run has written or left out

    def __enter__(self) -> Self:
        """Locks the output, reads what is there and mends it.

        Raises:
            InputError: If another run has the output, or a file is none of a run's; all files are then left alone.
        """
        self.output_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock()
            self._check_report()
            self._read_conversations()
            self.skipped = {id_key(record["id"]) for _, record in self._skips.read()}
            for _ in self._failures.read():
                pass  # is of a run, or raises before anything is changed
            for file in (self._conversations, self._skips, self._failures):
                if done := file.repair():
                    self.say(done)
            for path in (self.failed_path, self.report_path):
                draft_path(path).unlink(missing_ok=True)
            self._failed_before = self._compact_failures()
        except BaseException:
            self._close()
            raise
        self.failed = set() if self.retry_failed else self._failed_before
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes what is settled out of the file of the failed, and unlocks the output."""
        try:
            for file in (self._conversations, self._skips, self._failures):
                file.sync()  # before failures that are settled go
            self._compact_failures()
        finally:
            self._close()

    def expect_layout(self, format: str, token_ids: bool, split_turns: bool = False) -> None:
        """Raises InputError if the output has rows of another layout than this run will write."""
        wanted = Layout(format, token_ids, split_turns)
        for layout, count in self._layouts.items():
            if layout != wanted:
                found = f"{self.output_path}:{count}: found a row in the layout {layout}"
                raise InputError(f"{found}, expected {wanted}; choose another --output_path or the flags of that run")

    def append_conversation(self, *records: dict[str, Any]) -> None:
        """Writes a conversation: one record, or one for each answer, of which the last says that it is whole.

        Raises:
            ValueError: If a record cannot be read back; nothing is then written.
            OSError: If it could not be written as a whole.
        """
        for record in records:
            if next(iter(record), None) != "id" or not isinstance(record["id"], str) or "finish_reasons" not in record:
                raise ValueError(f"found the fields {list(record)}, expected 'id', a text, first and 'finish_reasons'")
        self._conversations.append(*records)
        self._settle(row_of(records[-1]))

    def append_failed(self, row_id: str, reason: str) -> None:
        """Writes down why a row failed; characters that cannot be written become '?'."""
        self._failures.append({"id": row_id, "reason": writable(reason)})

    def append_skipped(self, row_id: str, reason: str) -> None:
        """Writes down why a row was left out; characters that cannot be written become '?'."""
        self._skips.append({"id": row_id, "reason": writable(reason)})
        self._settle(row_id)

    def write_report(self, report: dict[str, Any]) -> None:
        """Writes the report in place of an earlier one."""
        replace_file(self.report_path, [json.dumps(report, indent=2).encode() + b"\n"])

    def _lock(self) -> None:
        """Makes this process the only one that writes to the output."""
        try:
            fcntl.flock(self._conversations.open(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            found = f"{self.output_path}: found another run writing to it"
            raise InputError(f"{found}, expected one at a time; wait for it or choose another output") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self.say(f"warning: {self.output_path} cannot be locked ({error}); let no second run write to it")

    def _check_report(self) -> None:
        """Raises InputError if what would be replaced at the end is no report of a run."""
        if not self.report_path.exists():
            return
        try:
            report = json.loads(self.report_path.read_bytes())
        except (ValueError, RecursionError, OSError):
            report = None
        if not (isinstance(report, dict) and "succeeded" in report):
            found = f"{self.report_path}: found a file that is no report of an earlier run"
            raise InputError(f"{found}, expected one, or none; move it away or choose another output")

    def _read_conversations(self) -> None:
        """Collects what is known of the conversations."""
        repeated = 0
        first_repeated = ""
        for count, record in self._conversations.read():
            if record.get("turn") != record.get("turns"):
                continue  # the row is done with its last turn
            key = id_key(row_of(record))
            if key in self.done:
                repeated += 1
                first_repeated = first_repeated or f"'{record['id']}' in line {count}"
            self.done.add(key)
            self._layouts.setdefault(
                Layout(
                    "sharegpt" if "conversations" in record else "messages", "input_ids" in record, "turns" in record
                ),
                count,
            )
            self.models[str(record.get("model"))] += 1
            if self.with_prompts:
                turns = parse_turns(record, f"{self.output_path}:{count}")
                first_prompt = next((turn["content"] for turn in turns if turn["role"] == "user"), "")
                self.prompts.add(prompt_key(first_prompt))
        if repeated:
            self.say(
                f"warning: {self.output_path}: found {repeated} lines with an id of an earlier line, the first "
                f"{first_repeated}; such a row counts once, and combine.py can drop the repeats"
            )

    def _compact_failures(self) -> set[int]:
        """Brings the file of the failed down to the latest line of each row that no other file has.

        Returns:
            The keys of those rows.
        """
        latest: dict[int, int] = {}
        total = 0
        for total, record in self._failures.read():
            key = id_key(record["id"])
            if not (key in self.done or key in self.skipped or key in self._settled):
                latest[key] = total
        if len(latest) < total:
            kept = set(latest.values())
            self._failures.close()
            if not kept:
                self.failed_path.unlink()
                return set()
            with self.failed_path.open("rb") as lines:
                replace_file(self.failed_path, (line for count, line in enumerate(lines, 1) if count in kept))
        return set(latest)

    def _settle(self, row_id: str) -> None:
        """Notes that an earlier failure of this row is past."""
        key = id_key(row_id)
        if key in self._failed_before:
            self._settled.add(key)

    def _close(self) -> None:
        """Closes all files, which also unlocks the output."""
        for file in (self._failures, self._skips, self._conversations):
            file.close()


def writable(text: str) -> str:
    """Returns a text that fits into UTF-8."""
    return text.encode(errors="replace").decode()
