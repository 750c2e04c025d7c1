"""Make self-distilled conversations: send prompts to an OpenAI-compatible server and write down its answers.

One input row becomes one output line under a stable id, so that an interrupted run goes on where it stopped,
and every input row ends as exactly one of succeeded, failed, skipped. Knows HTTP only: needs httpx and tqdm,
neither torch nor the axolotl_medusa package. README.md beside this file has the commands and the formats.
"""

import argparse
import asyncio
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from tqdm import tqdm

from chat_server import DEFAULT_API_KEY_ENV, Answer, ChatServer, RowError, ServerError, read_api_key
from prompt_files import InputError, Row, Turn, count_rows, parse_json, read_rows


def number(kind: Callable[[str], float], low: float, high: float = math.inf) -> Callable[[str], float]:
    """Returns a parser for flags that are finite numbers from `low` to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"found {text}, expected a number from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it when the text is no number at all
    return parse


def flag(text: str, default: Any = None, **options: Any) -> dict[str, Any]:
    """Describes the command-line flag of a field, in the words of ArgumentParser.add_argument."""
    return {
        "help": f"{text} (default: {default})" if default else text,
        "default": default,
        **options,
    }


@dataclass(frozen=True)
class Settings:
    """The command's flags. temperature and max_tokens default to the original Medusa generator's values."""

    data_path: Path = field(metadata=flag("prompts: .txt, .jsonl or .json", type=Path, required=True))
    output_path: Path = field(metadata=flag("conversations, JSON lines", type=Path, required=True))
    server: str = field(metadata=flag("base URL of the server", "http://127.0.0.1:8000/v1"))
    model: str | None = field(metadata=flag("model to ask for (default: the one that the server lists)"))
    num_threads: int = field(metadata=flag("requests in flight at a time", 32, type=number(int, 1)))
    max_tokens: int = field(metadata=flag("longest answer, in tokens", 2048, type=number(int, 1)))
    temperature: float = field(metadata=flag("sampling temperature", 0.3, type=number(float, 0)))
    top_p: float | None = field(metadata=flag("nucleus sampling (default: the server's)", type=number(float, 0, 1)))
    seed: int | None = field(metadata=flag("seed (default: made from each row's id)", type=number(int, 0)))
    chat: bool = field(metadata=flag("answer every user turn, not only the first", False, action="store_true"))
    limit: int | None = field(metadata=flag("use only this many rows (default: all)", type=number(int, 1)))
    drop_cut: bool = field(metadata=flag("leave out conversations cut by max_tokens", False, action="store_true"))
    timeout_s: float = field(metadata=flag("longest wait for an answer", 600.0, type=number(float, 0.001)))
    max_retries: int = field(metadata=flag("further tries after a passing failure", 5, type=number(int, 0)))
    backoff_s: float = field(metadata=flag("first wait before a retry, then doubled", 1.0, type=number(float, 0)))
    api_key_env: str = field(metadata=flag("environment variable with the API key", DEFAULT_API_KEY_ENV))

    @property
    def failed_path(self) -> Path:
        """File of the rows that failed in the latest run."""
        return Path(f"{self.output_path}.failed.jsonl")

    @property
    def report_path(self) -> Path:
        """File of the latest finished run's counts."""
        return Path(f"{self.output_path}.report.json")


def parse_args(argv: Sequence[str] | None = None) -> Settings:
    """Parses the flags, each accepted with underscores and with hyphens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    for setting in fields(Settings):
        spellings = dict.fromkeys([f"--{setting.name}", f"--{setting.name.replace('_', '-')}"])
        parser.add_argument(*spellings, dest=setting.name, **setting.metadata)
    return Settings(**vars(parser.parse_args(argv)))


def say(text: str) -> None:
    """Prints one line to stderr, above the progress bar."""
    tqdm.write(f"generate.py: {text}", file=sys.stderr)


def read_done_ids(path: Path) -> set[str]:
    """Returns the ids of the conversations already written, after removing a last line torn by a crash.

    Raises:
        InputError: If the file holds anything else than conversations; it is then left as it is.
    """
    done: set[str] = set()
    whole_bytes = 0
    if not path.exists():
        return done
    with path.open("rb") as lines:
        for count, raw in enumerate(lines, 1):
            if not raw.endswith(b"\n"):
                break
            whole_bytes += len(raw)
            record = parse_json(raw, f"{path}:{count}")
            if not (isinstance(record, dict) and isinstance(record.get("id"), str) and "finish_reasons" in record):
                raise InputError(f"{path}:{count}: found {shorten(record)}, expected an earlier run's conversation")
            done.add(record["id"])
    torn_bytes = path.stat().st_size - whole_bytes
    if torn_bytes:
        os.truncate(path, whole_bytes)
        say(f"removed the torn last line of {path} ({torn_bytes} bytes)")
    return done


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON line in one write, so that a crash can tear no line but the last."""
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        if file.write(line) != len(line):
            raise OSError(f"{path}: only part of a line could be written; is the disk full?")


def turns_to_send(turns: Sequence[Turn], chat: bool) -> list[Turn]:
    """Returns the system and user turns up to the first user turn; with `chat`, up to the last."""
    sent = [turn for turn in turns if turn["role"] != "assistant"]
    users = [index for index, turn in enumerate(sent) if turn["role"] == "user"]
    return sent[: users[-1 if chat else 0] + 1]


async def converse(row: Row, server: ChatServer, settings: Settings) -> dict[str, Any]:
    """Answers the user turns of a row in order, each with the new answers as history.

    Returns:
        The output line.

    Raises:
        RowError: If a turn gets no whole answer.
    """
    row_seed = int(hashlib.sha256(row.id.encode()).hexdigest()[:8], 16) >> 1  # 31 bits fit every server's integer
    sampling: dict[str, Any] = {"max_tokens": settings.max_tokens, "temperature": settings.temperature}
    sampling["seed"] = row_seed if settings.seed is None else settings.seed
    if settings.top_p is not None:
        sampling["top_p"] = settings.top_p
    messages: list[Turn] = []
    answers: list[Answer] = []
    for turn in turns_to_send(row.turns, settings.chat):
        messages.append(turn)
        if turn["role"] == "user":
            answers.append(await server.answer({"messages": messages, **sampling}))
            messages.append({"role": "assistant", "content": answers[-1].text})
            if settings.drop_cut and answers[-1].finish_reason == "length":
                break
    return {
        "id": row.id,
        "messages": messages,
        "finish_reasons": [answer.finish_reason for answer in answers],
        "usage": {
            "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
            "completion_tokens": sum(answer.completion_tokens for answer in answers),
        },
        "model": server.model,
    }


@dataclass
class Counts:
    """What became of the input rows in this run; tokens are those of the conversations written."""

    input_rows: int = 0
    succeeded: int = 0
    failed: int = 0
    skipped_already_done: int = 0
    skipped_duplicates: int = 0
    skipped_dropped_cut: int = 0
    cut: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def skipped(self) -> int:
        """Rows neither written nor failed: succeeded + failed + skipped = input_rows."""
        return self.skipped_already_done + self.skipped_duplicates + self.skipped_dropped_cut

    def summary(self) -> str:
        """Returns what a user wants to know at the end, in one line."""
        parts = (f"{getattr(self, name)} {name}" for name in ("succeeded", "failed", "skipped", "cut"))
        return f"{', '.join(parts)} of {self.input_rows} rows; {self.completion_tokens} tokens written"


class Run:
    """One pass over the input: which rows are left, and what becomes of each."""

    def __init__(self, settings: Settings, counts: Counts, done: set[str]) -> None:
        """Starts the clock and the progress bar."""
        self.settings, self.counts, self.done = settings, counts, done
        self.started = time.monotonic()
        self.bar = tqdm(total=counts.input_rows, unit="row", dynamic_ncols=True)

    def rows_left(self) -> Iterator[Row]:
        """Streams the rows still to be answered, and counts the others as skipped."""
        seen: set[str] = set()
        for row in read_rows(self.settings.data_path, self.settings.limit):
            if row.id in seen:
                self.counts.skipped_duplicates += 1
                self.advance()
            elif row.id in self.done:
                self.counts.skipped_already_done += 1
                self.advance()
            else:
                yield row
            seen.add(row.id)

    async def work(self, rows: Iterator[Row], server: ChatServer) -> None:
        """Takes rows from an iterator shared by all workers until none is left."""
        for row in rows:
            try:
                record = await converse(row, server, self.settings)
            except RowError as error:
                append_line(self.settings.failed_path, {"id": row.id, "reason": str(error)})
                self.counts.failed += 1
            else:
                self.keep(record)
            self.advance()

    def keep(self, record: dict[str, Any]) -> None:
        """Writes and counts an answered conversation, or only counts it if it is to be dropped."""
        cut = "length" in record["finish_reasons"]
        self.counts.cut += cut
        if cut and self.settings.drop_cut:
            self.counts.skipped_dropped_cut += 1
            return
        append_line(self.settings.output_path, record)
        self.counts.succeeded += 1
        self.counts.prompt_tokens += record["usage"]["prompt_tokens"]
        self.counts.completion_tokens += record["usage"]["completion_tokens"]

    def wall_s(self) -> float:
        """Returns the seconds since the start, never 0."""
        return max(time.monotonic() - self.started, 0.001)

    def advance(self) -> None:
        """Shows one more row as dealt with."""
        tokens_per_s = self.counts.completion_tokens / self.wall_s()
        self.bar.set_postfix_str(f"{tokens_per_s:.0f} tokens/s, {self.counts.failed} failed", refresh=False)
        self.bar.update()

    def report(self, model: str) -> dict[str, Any]:
        """Returns the counts and what they were made with."""
        sampling = ("max_tokens", "temperature", "top_p", "seed", "chat", "drop_cut")
        return {
            **asdict(self.counts),
            "skipped": self.counts.skipped,
            "wall_s": round(self.wall_s(), 3),
            "model": model,
            "server": self.settings.server,
            "sampling": {name: getattr(self.settings, name) for name in sampling},
        }


async def generate(settings: Settings, counts: Counts, done: set[str]) -> dict[str, Any]:
    """Answers every row that is left, at most num_threads at a time.

    Returns:
        The report.

    Raises:
        ServerError: If the server cannot be used at all.
        OSError: If an answer cannot be written.
    """
    async with ChatServer(
        settings.server.rstrip("/"),
        settings.model,
        read_api_key(settings.api_key_env),
        max_connections=settings.num_threads,
        timeout_s=settings.timeout_s,
        max_retries=settings.max_retries,
        backoff_s=settings.backoff_s,
    ) as server:
        settings.failed_path.unlink(missing_ok=True)
        settings.report_path.unlink(missing_ok=True)
        run = Run(settings, counts, done)
        rows = run.rows_left()
        with run.bar:
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(min(settings.num_threads, counts.input_rows)):
                        workers.create_task(run.work(rows, server))
            except ExceptionGroup as group:
                raise group.exceptions[0] from None  # the one that stopped the others
        return run.report(server.model)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 if no row failed, 1 if some did, 2 for an error, 130 after Ctrl-C."""
    settings, counts = parse_args(argv), Counts()
    try:
        if settings.output_path.resolve() == settings.data_path.resolve():
            raise InputError(f"found {settings.data_path} as --data_path and --output_path, expected two files")
        counts.input_rows = count_rows(settings.data_path, settings.limit)
        settings.output_path.parent.mkdir(parents=True, exist_ok=True)
        report = asyncio.run(generate(settings, counts, read_done_ids(settings.output_path)))
        settings.report_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except KeyboardInterrupt:
        say(f"interrupted; {settings.output_path} keeps what was answered, the same command goes on")
        return 130
    except (InputError, ServerError, OSError) as error:
        say(f"error: {error}")
        return 2
    print(f"{counts.summary()} in {report['wall_s']} s; {settings.report_path}")
    if counts.failed:
        say(f"error: {counts.failed} of {counts.input_rows} rows failed; {settings.failed_path} says why")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
