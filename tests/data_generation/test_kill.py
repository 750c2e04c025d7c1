"""`kill -9` of generate.py at random moments, against a server process that does everything wrong that servers do."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import FAULTS, FakeServer, answer_text, chat_prompt, fake_server, share_of
from killed_runs import KilledRun, Moment

SEED = 20
KILLS = 20
ROWS = 600
START_S = 0.6
"""Longer than the command takes up to its first request, on a machine that is not busy."""
REFUSED, CUT = 0.04, 0.06
FAULT_SHARES = {
    "status_500": 0.03,
    "status_503": 0.03,
    "rate_limit": 0.03,
    "cut_before": 0.03,
    "cut_body": 0.03,
    "stall": 0.006,
    "stall_body": 0.006,
    "garbage_text": 0.02,
    "garbage_html": 0.02,
    "garbage_json": 0.02,
}
BAD_SERVER = [word for name, share in FAULT_SHARES.items() for word in ("--fault", f"{name}={share}")]
BAD_SERVER += ["--refuse", str(REFUSED), "--length", str(CUT), "--retry_after_s", "0.02"]
BAD_SERVER += ["--latency_s", "0.01", "--jitter_s", "0.03"]
NUM_THREADS = 24
PATIENT = ["--max_retries", "20", "--backoff_s", "0.01", "--timeout_s", "1", "--num_threads", str(NUM_THREADS)]
Turn = dict[str, str]


def input_rows() -> list[dict[str, Any]]:
    """Conversations of one to three user turns, a third of them with a system turn, no text twice."""
    rows = []
    for number in range(ROWS):
        turns = [{"role": "system", "content": f"Be number {number}."}] if number % 3 == 0 else []
        for turn in range(1 + number % 3):
            turns.append({"role": "user", "content": f"Question {number}.{turn}?"})
            turns.append({"role": "assistant", "content": "an old answer"})
        rows.append({"id": f"row-{number}", "messages": turns})
    return rows


def outcome(row: dict[str, Any]) -> tuple[str, list[Turn]]:
    """What has to become of a row with --chat --cut drop, and the turns to be written if it succeeds."""
    messages: list[Turn] = []
    for turn in row["messages"]:
        if turn["role"] == "assistant":
            continue
        messages.append(turn)
        if turn["role"] == "system":
            continue
        if share_of("refuse", turn["content"]) < REFUSED:
            return "failed", []
        if share_of("length", chat_prompt(messages)) < CUT:
            messages.pop()
            break
        messages.append({"role": "assistant", "content": answer_text(messages)})
    return ("succeeded", messages) if any(turn["role"] == "assistant" for turn in messages) else ("skipped", [])


@pytest.fixture
def bad_server() -> Iterator[FakeServer]:
    with fake_server(*BAD_SERVER) as server:
        yield server


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in input_rows()), encoding="utf-8")
    return path


def kill_often(run: KilledRun, server: FakeServer, kills: int, rows: int) -> None:
    """Kills a run during its start, after a number of rows, and when a request has just come."""

    def draw_moment(rng: random.Random, most_lines: int) -> Moment:
        kind = rng.choice(["start", "lines", "lines", "requests", "requests"])
        if kind == "start":
            return run.after_seconds(rng.uniform(0, START_S))
        if kind == "lines":
            return run.after_lines(rng.randint(1, most_lines))
        enough = server.stats()["requests"] + rng.randint(1, NUM_THREADS + most_lines)
        return run.after(lambda: server.wait_for(enough))

    run.kill_often(draw_moment, kills, rows, SEED)


def test_kill_at_20_random_moments_loses_nothing(tmp_path: Path, prompts: Path, bad_server: FakeServer) -> None:
    run = KilledRun(
        tmp_path / "out.jsonl",
        ["--data_path", str(prompts), "--server", bad_server.url, "--chat", "--cut", "drop", *PATIENT],
    )
    kill_often(run, bad_server, KILLS, ROWS)
    assert run.run() == 1, "some rows are refused"
    expected = {row["id"]: outcome(row) for row in input_rows()}
    assert run.settled == {row_id: name for row_id, (name, _) in expected.items()}
    assert set(run.settled.values()) == set(run.files)
    for row_id, row in run.rows().items():
        assert row["messages"] == expected[row_id][1]
        assert len(row["finish_reasons"]) == sum(turn["role"] == "assistant" for turn in row["messages"])
    assert run.report()["input_rows"] == ROWS
    stats = bad_server.stats()
    assert set(stats["faults"]) == {*FAULTS, "refuse"}, "the server did not do everything wrong"

    left = {path: path.read_bytes() for path in run.files.values()}
    assert run.run() == 0
    assert run.report()["skipped"] == ROWS
    assert bad_server.stats()["requests"] == stats["requests"], "a row that was dealt with was asked for again"
    assert {path: path.read_bytes() for path in run.files.values()} == left


def test_kill_while_failed_rows_are_retried_loses_nothing(
    tmp_path: Path, prompts: Path, bad_server: FakeServer
) -> None:
    run = KilledRun(
        tmp_path / "out.jsonl",
        ["--data_path", str(prompts), "--server", bad_server.url, "--chat", "--retry_failed", *PATIENT],
    )
    kill_often(run, bad_server, kills=6, rows=ROWS)
    assert run.run() == 1
    refused = {row["id"] for row in input_rows() if outcome(row)[0] == "failed"}
    assert refused <= set(run.ids("failed"))
    with fake_server() as good_server:
        run.flags = [good_server.url if flag == bad_server.url else flag for flag in run.flags]
        assert run.run() == 0
    assert set(run.settled.values()) == {"succeeded"}
    assert len(run.settled) == ROWS


TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """A directory with the chat template that `fake_server.chat_prompt` follows."""
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}), encoding="utf-8")
    return directory


def test_kill_while_the_model_writes_both_roles_gives_the_rows_of_one_run(
    tmp_path: Path, template: Path, bad_server: FakeServer
) -> None:
    rows = 200
    flags = ["--from_scratch", str(rows), "--tokenizer", str(template), "--max_turns", "2", *PATIENT]
    run = KilledRun(tmp_path / "out.jsonl", [*flags, "--server", bad_server.url])
    kill_often(run, bad_server, kills=6, rows=rows)
    assert run.run() in (0, 1)
    assert len(run.settled) == rows
    with fake_server("--refuse", str(REFUSED), "--length", str(CUT)) as good_server:
        whole = KilledRun(tmp_path / "whole.jsonl", [*flags, "--server", good_server.url])
        assert whole.run() in (0, 1)
    assert run.rows() == whole.rows()
    assert {name: set(run.ids(name)) for name in run.files} == {name: set(whole.ids(name)) for name in whole.files}
    for row in run.rows().values():
        for place, turn in enumerate(row["messages"]):
            if turn["role"] == "assistant":
                assert turn["content"] == answer_text(row["messages"][:place])
            else:
                assert re.fullmatch(r"What is [0-9a-f]{12}\?", turn["content"])
