"""Kills generate.py at moments of its run, tears its files, starts it again, and reads what it leaves behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parents[2] / "data_generation" / "generate.py"
POLL_S = 0.003
Process = subprocess.Popen[bytes]
Moment = Callable[[Process], None]
"""Returns when the moment to kill the process has come, or it has ended."""
DrawMoment = Callable[[random.Random, int], Moment]
"""Draws a moment at which at most so many more rows are dealt with."""


def records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a JSON lines file, without a torn last line; every other line has to be JSON."""
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines]


@dataclass
class KilledRun:
    """A generate.py command that is killed and started again.

    Args:
        output: Its --output_path.
        flags: All other flags.
        timeout_s: Longest time of one start.
    """

    output: Path
    flags: Sequence[str]
    timeout_s: float = 30.0
    kills_while_running: int = 0
    torn: int = 0
    settled: dict[str, str] = field(default_factory=dict)
    """File of each row that was seen to be dealt with, by id."""

    @property
    def files(self) -> dict[str, Path]:
        """What a row can end in."""
        return {
            "succeeded": self.output,
            "failed": Path(f"{self.output}.failed.jsonl"),
            "skipped": Path(f"{self.output}.skipped.jsonl"),
        }

    @property
    def log(self) -> Path:
        return self.output.with_suffix(".log")

    def ids(self, name: str) -> list[str]:
        return [record["id"] for record in records(self.files[name])]

    def rows(self) -> dict[str, dict[str, Any]]:
        """Returns the conversations by id, each of which must be there once."""
        found = records(self.output)
        by_id = {row["id"]: row for row in found}
        assert len(by_id) == len(found), "a conversation was written twice"
        return by_id

    def report(self) -> dict[str, Any]:
        """Returns the report, which must account for every row."""
        report: dict[str, Any] = json.loads(Path(f"{self.output}.report.json").read_bytes())
        assert report["succeeded"] + report["failed"] + report["skipped"] == report["input_rows"]
        return report

    def start(self) -> Process:
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        command = [sys.executable, str(SCRIPT), "--output_path", str(self.output), *self.flags]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def run(self) -> int:
        """Runs the command to its end, checks what it left behind, and returns its exit status."""
        process = self.start()
        try:
            status = process.wait(self.timeout_s)
        finally:
            process.kill()
            process.wait()
        self.check()
        assert self.lines() == len(self.settled), "a row is in two places"
        return status

    def kill_at(self, moment: Moment) -> None:
        """Runs the command until a moment, kills it with SIGKILL, and checks what it left behind."""
        process = self.start()
        try:
            moment(process)
        finally:
            process.kill()
            self.kills_while_running += process.wait() == -signal.SIGKILL
        self.check()

    def check(self) -> None:
        """Holds that every line is JSON, that no row is in two places, and that none has gone since the last look.

        A row that failed stays among the failed while it is asked again, and until the end of the run.
        """
        retrying = "--retry_failed" in self.flags
        now: dict[str, str] = {}
        for name in ("failed", "skipped", "succeeded"):
            for row_id in self.ids(name):
                earlier = now.get(row_id)
                assert earlier is None or (retrying and earlier == "failed"), f"{row_id} is {earlier} and {name}"
                now[row_id] = name
        gone = {row_id: name for row_id, name in self.settled.items() if row_id not in now}
        assert not gone, f"gone: {gone}"
        changed = {row_id: name for row_id, name in self.settled.items() if now[row_id] != name}
        assert retrying or not changed, f"settled differently before: {changed}"
        self.settled = now

    def tear(self, name: str, rng: random.Random) -> None:
        """Cuts the last line of a file at a random byte, as a crash of the machine would; its row is undone by that."""
        path = self.files[name]
        content = path.read_bytes() if path.exists() else b""
        if not content.endswith(b"\n"):
            return
        begin = content[:-1].rfind(b"\n") + 1
        row_id = json.loads(content[begin:])["id"]
        os.truncate(path, rng.randint(begin + 1, len(content) - 1))
        del self.settled[row_id]
        self.torn += 1

    def kill_often(self, draw_moment: DrawMoment, kills: int, rows: int, seed: int) -> None:
        """Kills a command over so many rows again and again, and tears one of its files after every third time."""
        rng = random.Random(seed)
        for number in range(1, kills + 1):
            # On average an even share of what is left, and never so much that a later kill could find it done.
            most_lines = max(2 * (rows - self.lines()) // (kills - number + 3), 1)
            self.kill_at(draw_moment(rng, most_lines))
            written = [name for name in self.files if self.ids(name)]
            if number % 3 == 0 and written:
                self.tear(rng.choice(written), rng)
        assert self.kills_while_running == kills, "the command ended before it was killed"
        assert self.torn

    # ---- moments ----

    def until(self, condition: Callable[[], bool]) -> Moment:
        """The first moment at which a condition holds."""

        def wait(process: Process) -> None:
            give_up_at = time.monotonic() + self.timeout_s
            while not condition():
                assert time.monotonic() < give_up_at, self.log.read_text(encoding="utf-8")[-3000:]
                if ended_within(process, POLL_S):
                    return

        return wait

    def after(self, event: Callable[[], None]) -> Moment:
        """The moment at which a call returns."""

        def wait(_: Process) -> None:
            try:
                event()
            except TimeoutError:
                raise AssertionError(self.log.read_text(encoding="utf-8")[-3000:]) from None

        return wait

    def after_lines(self, more: int) -> Moment:
        """The moment at which so many more rows are dealt with than now."""
        enough = self.lines() + more
        return self.until(lambda: self.lines() >= enough)

    def lines(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.files.values() if path.exists())

    def after_seconds(self, seconds: float) -> Moment:
        """A moment of the start."""

        def wait(process: Process) -> None:
            ended_within(process, seconds)

        return wait


def ended_within(process: Process, seconds: float) -> bool:
    """Waits for the end of a process at most so long, and tells whether it came."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
