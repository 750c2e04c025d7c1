"""Make self-distilled conversations: send prompts to OpenAI-compatible servers and write down their answers.

One input row becomes one output line under a stable id, so that an interrupted run goes on where it stopped,
and every input row ends as exactly one of succeeded, failed, skipped. Needs neither torch nor the axolotl_medusa
package. README.md beside this file has the commands and the formats.
"""

import asyncio
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from parts.chat_server import DEFAULT_API_KEY_ENV, ChatServer, read_api_key
from parts.chat_template import ChatTemplate
from parts.command_line import flag, number, parse_flags, speaker
from parts.context_room import ContextRoom, fit_max_tokens
from parts.conversation_files import OutputFiles, prompt_key
from parts.conversations import (
    Conversation,
    Recipe,
    Skipped,
    answer_input,
    continue_input,
    settle_user_turns,
    write_from_scratch,
)
from parts.prompt_files import InputError, Row, check_rows, id_key, read_rows
from parts.retrying_server_pool import ServerPool, Stopped
from parts.run_counts import Counts
from parts.secrets import without_secrets
from parts.server_errors import ContextOverflowError, RowError, ServerError
from parts.token_ids import returns_token_ids

DEFAULT_SERVER = "http://127.0.0.1:8000/v1"
say = speaker(__file__)


@dataclass(frozen=True)
class Settings(Recipe):
    """The command's flags; num_threads defaults to the first Medusa generator's value."""

    data_path: str | None = field(metadata=flag("prompts: a file, or the name of a dataset"))
    split: str | None = field(metadata=flag("split of a dataset or of a directory of parquet files"))
    from_scratch: int | None = field(metadata=flag("conversations to make without prompts", type=number(int, 1)))
    output_path: Path = field(metadata=flag("conversations, JSON lines", type=Path, required=True))
    server: list[str] | None = field(
        metadata=flag(f"base URL of a server; repeat it for a pool (default: {DEFAULT_SERVER})", action="append")
    )
    model: str | None = field(metadata=flag("model to ask for (default: the one that the servers list)"))
    tokenizer: str | None = field(
        metadata=flag("directory or name of the chat template (default: what the server calls its model)")
    )
    num_threads: int = field(metadata=flag("requests in flight at a time", 256, type=number(int, 1)))
    limit: int | None = field(metadata=flag("use only this many rows (default: all)", type=number(int, 1)))
    retry_failed: bool = field(metadata=flag("ask again for the rows that failed", False, action="store_true"))
    timeout_s: float = field(metadata=flag("longest wait for an answer", 600.0, type=number(float, 0.001)))
    max_retries: int = field(metadata=flag("further tries after a passing failure", 5, type=number(int, 0)))
    backoff_s: float = field(metadata=flag("first wait before a retry, then doubled", 1.0, type=number(float, 0)))
    give_up_s: float = field(metadata=flag("end after so long without any server", 600.0, type=number(float, 0)))
    api_key_env: str = field(metadata=flag("environment variable with the API key", DEFAULT_API_KEY_ENV))

    def check(self) -> None:
        """Raises InputError for flags that contradict each other."""
        if (self.data_path is None) == (self.from_scratch is None):
            raise InputError("expected either --data_path or --from_scratch")
        if self.from_scratch and (self.chat or self.split or self.limit):
            raise InputError("found --from_scratch with --chat, --split or --limit, which are for prompts that exist")
        if self.token_ids and self.thinking == "strip":
            raise InputError("found --token_ids with --thinking strip: the ids hold the reasoning; choose on or off")
        if self.tool_turns != "skip" and not self.chat:
            raise InputError(f"found --tool_turns {self.tool_turns} without --chat, which answers them; add --chat")
        if self.tool_turns != "skip" and self.format == "sharegpt":
            expected = "expected --format messages, since the other layout has no words for tools"
            raise InputError(f"found --tool_turns {self.tool_turns} with --format sharegpt, {expected}")
        if self.data_path and self.output_path.resolve() == Path(self.data_path).resolve():
            raise InputError(f"found {self.data_path} as --data_path and --output_path, expected two files")


class Run:
    """One pass over the input: which rows are left, and what becomes of each."""

    def __init__(self, settings: Settings, counts: Counts, files: OutputFiles) -> None:
        """Starts the clock and the progress bar."""
        self.settings, self.counts, self.files = settings, counts, files
        self.recipe: Recipe = settings  # until the servers show what they cannot do
        self.template: ChatTemplate | None = None
        self.have_token_ids: list[bool] = []
        self.interrupts = 0
        self.room = ContextRoom()
        self.started = time.monotonic()
        self.bar = tqdm(total=counts.input_rows, unit="row", dynamic_ncols=True, smoothing=0)

    async def prepare(self, server: ChatServer) -> None:
        """Settles what a server that was just reached understands."""
        if not self.settings.chat:
            if self.template is None:
                name = self.settings.tokenizer or server.model_root or server.model
                self.template = ChatTemplate.load(name)
            await settle_user_turns(server, self.template)
        if self.settings.token_ids:
            self.have_token_ids.append(await returns_token_ids(server))

    def settle_layout(self, model: str) -> None:
        """Decides between token ids and text, and holds the rows to what the output already has."""
        if self.settings.token_ids and not all(self.have_token_ids):
            say("warning: a server does not return token ids; rows hold text only")
            self.recipe = replace(self.recipe, token_ids=False)
        self.files.expect_layout(self.recipe.format, self.recipe.token_ids, self.recipe.split_turns)
        if self.files.models and model not in self.files.models:
            known = ", ".join(self.files.models)
            say(f"warning: {self.files.output_path} has rows of {known}, and now gets rows of {model}")

    def source(self) -> Iterator[Row]:
        """Streams the input."""
        settings = self.settings
        if settings.from_scratch:
            names = (f"scratch-{settings.seed}-{count}" for count in range(settings.from_scratch))
            return (Row(name, name, ()) for name in names)
        assert settings.data_path
        return read_rows(settings.data_path, settings.split, settings.limit)

    def rows_left(self) -> Iterator[Row]:
        """Streams the rows still to be made into conversations, and counts the others as skipped."""
        seen: set[int] = set()
        for row in self.source():
            key = id_key(row.id)
            if key in seen:
                self.skip("duplicates")
            elif key in self.files.done:
                self.skip("already_done")
            elif row.reason:
                if key not in self.files.skipped:
                    self.files.append_skipped(row.id, row.reason)
                self.skip("unusable")
            elif key in self.files.skipped:
                self.skip("left_out_before")
            elif key in self.files.failed and not self.settings.retry_failed:
                self.skip("failed_before")
            else:
                yield row
            seen.add(key)

    def skip(self, why: str) -> None:
        """Counts a row that is not asked for."""
        name = f"skipped_{why}"
        setattr(self.counts, name, getattr(self.counts, name) + 1)
        self.bar.initial += 1  # keeps it out of the rate
        self.bar.update()

    async def work(self, rows: Iterator[Row], pool: ServerPool) -> None:
        """Takes rows from an iterator shared by all workers until none is left or the run is to end."""
        for row in rows:
            conversation = Conversation(row, pool, self.recipe, self.template)
            try:
                await self.converse_or_see_why(conversation, pool)
                self.keep(conversation)
            except RowError as error:
                self.files.append_failed(row.id, str(error))
                self.counts.failed += 1
                self.counts.add_ends(conversation)
                self.advance()
            except Skipped as skipped:
                self.files.append_skipped(row.id, str(skipped))
                self.counts.add_ends(conversation)
                self.skip({"cut": "cut", "duplicate": "duplicates"}.get(str(skipped), "unusable"))
            except Stopped:
                return
            if self.interrupts:
                return

    async def converse_or_see_why(self, conversation: Conversation, pool: ServerPool) -> None:
        """Makes a conversation; where its first prompt overflows the context, sees whether that is the prompt's fault."""
        try:
            await self.converse(conversation)
        except ContextOverflowError:
            await self.room.expect(pool, self.recipe.max_tokens)
            raise
        self.room.is_known = True

    async def converse(self, conversation: Conversation) -> None:
        """Makes a conversation in the mode that the flags ask for."""
        if self.settings.from_scratch:
            await write_from_scratch(conversation, self.is_new)
        elif self.settings.chat:
            await answer_input(conversation)
        else:
            await continue_input(conversation)

    def is_new(self, prompt: str) -> bool:
        """Tells whether no conversation begins with this prompt yet, and notes it."""
        key = prompt_key(prompt)
        new = key not in self.files.prompts
        self.files.prompts.add(key)
        return new

    def keep(self, conversation: Conversation) -> None:
        """Writes and counts a conversation."""
        records = conversation.records()
        self.files.append_conversation(*records)
        self.counts.succeeded += 1
        self.counts.add_ends(conversation)
        self.counts.prompt_tokens += sum(record["usage"]["prompt_tokens"] for record in records)
        self.counts.completion_tokens += sum(record["usage"]["completion_tokens"] for record in records)
        self.advance()

    def advance(self) -> None:
        """Shows one more row as dealt with."""
        tokens_per_s = self.counts.completion_tokens / self.wall_s()
        self.bar.set_postfix_str(f"{tokens_per_s:.0f} tokens/s, {self.counts.failed} failed", refresh=False)
        self.bar.update()

    def wall_s(self) -> float:
        """Returns the seconds since the start, never 0."""
        return max(time.monotonic() - self.started, 0.001)

    async def run(self, pool: ServerPool) -> None:
        """Makes all conversations that are left, at most num_threads at a time; the first Ctrl-C lets them end."""
        everything = asyncio.current_task()
        assert everything

        def interrupt() -> None:
            self.interrupts += 1
            if self.interrupts > 1:
                everything.cancel()
                return
            pool.stop()
            say("waiting for the answers in flight; Ctrl-C again drops them")

        loop = asyncio.get_running_loop()
        for number_ in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number_, interrupt)
        rows = self.rows_left()
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(self.settings.num_threads, self.counts.input_rows)):
                    workers.create_task(self.work(rows, pool))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None  # the one that stopped the others
        except asyncio.CancelledError:
            if not self.interrupts:
                raise

    def report(self, pool: ServerPool) -> dict[str, Any]:
        """Returns the counts and what they were made with, without credentials."""
        servers: dict[str, dict[str, int]] = {}
        for member in pool.members:  # two of them may differ in their credentials alone
            counts = servers.setdefault(without_secrets(member.server.url), {"answers": 0, "failures": 0})
            counts["answers"] += member.answers
            counts["failures"] += member.failures
        return {
            **asdict(self.counts),
            "skipped": self.counts.skipped,
            "left": self.counts.left,
            "retries": pool.retries,
            "wall_s": round(self.wall_s(), 3),
            "model": pool.name,
            "servers": servers,
            "data": without_secrets(self.settings.data_path or f"from scratch, {self.settings.from_scratch}"),
            "recipe": {name.name: getattr(self.recipe, name.name) for name in fields(Recipe)},
        }


async def generate(settings: Settings, counts: Counts, files: OutputFiles) -> tuple[dict[str, Any], bool]:
    """Makes every conversation that is left.

    Returns:
        The report, and whether Ctrl-C ended the run before its end.

    Raises:
        InputError: If the chat template cannot be used, or the output has another layout.
        ServerError: If no server can be used.
        OSError: If a conversation cannot be written.
    """
    run = Run(settings, counts, files)
    with run.bar:
        async with ServerPool(
            settings.server or [DEFAULT_SERVER],
            settings.model,
            read_api_key(settings.api_key_env),
            prepare=run.prepare,
            say=say,
            max_connections=settings.num_threads,
            timeout_s=settings.timeout_s,
            max_retries=settings.max_retries,
            backoff_s=settings.backoff_s,
            give_up_s=settings.give_up_s,
        ) as pool:
            run.settle_layout(pool.name)
            fitted = fit_max_tokens(settings.max_tokens, pool.context_tokens, say)
            run.recipe = replace(run.recipe, max_tokens=fitted)
            await run.run(pool)
    return run.report(pool), run.interrupts > 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 if no row failed, 1 if some did, 2 for an error or a useless input, 130 after Ctrl-C."""
    settings, counts = parse_flags(Settings, __doc__, argv), Counts()
    try:
        settings.check()
        counts.input_rows = settings.from_scratch or 0
        if settings.data_path:
            counts.input_rows = check_rows(settings.data_path, settings.split, settings.limit).rows
        with_prompts = settings.from_scratch is not None
        with OutputFiles(settings.output_path, settings.retry_failed, with_prompts=with_prompts, say=say) as files:
            report, interrupted = asyncio.run(generate(settings, counts, files))
            files.write_report(report)
    except KeyboardInterrupt:
        say("interrupted before the first request")
        return 130
    except (InputError, ServerError, OSError) as error:
        say(f"error: {error}")
        return 2
    print(f"{counts.summary()} in {report['wall_s']} s; {files.report_path}")
    if interrupted:
        say(f"interrupted; {settings.output_path} keeps what was answered, the same command goes on")
        return 130
    if counts.failed:
        say(f"error: {counts.failed} of {counts.input_rows} rows failed; {files.failed_path} says why")
        return 1
    if counts.nothing_usable:
        say(f"error: none of the {counts.input_rows} rows gave a conversation; {files.skipped_path} says why")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
