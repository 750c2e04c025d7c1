"""data_generation/generate.py against a real HTTP server on the loopback interface that fails on request."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import chat_server
import generate
import prompt_files

SCRIPT = Path(generate.__file__)
WAIT_S = 10.0  # no test comes near it; it only ends a test that would hang
DROP = "drop the connection"
HANG = "answer only when the test ends"

# What the fake server does instead of answering: (status, headers, body), DROP or HANG.
Fault = tuple[int, dict[str, str], str] | str


def completion(text: str | None, finish_reason: str | None = "stop", **extra: Any) -> str:
    """Returns the body of a chat completion; every answer costs 7 prompt and 3 completion tokens."""
    body = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }
    return json.dumps(body | extra)


def fault(status: int, body: str = "no", **headers: str) -> Fault:
    """Returns a response to send instead of the ordinary answer."""
    return (status, headers, body)


class FakeServer(ThreadingHTTPServer):
    """Answers "re: <last user turn>", after the faults planned for that turn; keeps all requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.models: Fault = fault(200, json.dumps({"data": [{"id": "fake-model"}]}))
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.arrived = threading.Condition()
        self.released = threading.Event()
        self.barrier: threading.Barrier | None = None

    def asked(self) -> Counter[str]:
        """Counts the requests by their last user turn."""
        return Counter(request["messages"][-1]["content"] for request in self.requests)

    def wait_for(self, requests: int) -> None:
        """Blocks until that many requests have come."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.requests) >= requests, WAIT_S)

    def handle_error(self, *_: object) -> None:
        """Keeps quiet about clients that went away."""


class Handler(BaseHTTPRequestHandler):
    """One connection to the fake server."""

    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *_: object) -> None:
        """Keeps quiet."""

    def do_GET(self) -> None:
        self.send(self.server.models if self.path == "/v1/models" else fault(404))

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = request["messages"][-1]["content"]
        with server.arrived:
            server.requests.append(request)
            server.authorizations.append(self.headers["Authorization"])
            planned = server.faults.get(text)
            todo = planned.pop(0) if planned else fault(200, completion(f"re: {text}"))
            server.arrived.notify_all()
        if server.barrier:
            server.barrier.wait(WAIT_S)
        self.send(todo if self.path == "/v1/chat/completions" else fault(404))

    def send(self, todo: Fault) -> None:
        if todo == HANG:
            self.server.released.wait(WAIT_S)
        if isinstance(todo, str):
            self.close_connection = True
            return
        status, headers, body = todo
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the developer's own key and proxies out."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name == "OPENAI_API_KEY":
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A running fake server."""
    fake = FakeServer()
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    fake.released.set()
    fake.shutdown()
    fake.server_close()
    thread.join()


class Workdir:
    """A directory with a prompts file, in which the command is run against a server."""

    def __init__(self, path: Path, url: str) -> None:
        self.data, self.output, self.url = path / "prompts.jsonl", path / "out" / "answers.jsonl", url
        self.failed = Path(f"{self.output}.failed.jsonl")
        self.report_file = Path(f"{self.output}.report.json")

    def argv(self, *flags: str) -> list[str]:
        paths = ["--data_path", str(self.data), "--output_path", str(self.output)]
        return [*paths, "--server", self.url, "--backoff_s", "0", *flags]

    def write(self, *rows: Any) -> None:
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, *flags: str) -> int:
        return generate.main(self.argv(*flags))

    def rows(self) -> dict[str, dict[str, Any]]:
        lines = [json.loads(line) for line in self.output.read_text().splitlines()]
        assert len({line["id"] for line in lines}) == len(lines), "a conversation was written twice"
        return {line["id"]: line for line in lines}

    def failures(self) -> dict[str, str]:
        return {line["id"]: line["reason"] for line in map(json.loads, self.failed.read_text().splitlines())}

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.report_file.read_text())
        assert report["succeeded"] + report["failed"] + report["skipped"] == report["input_rows"]
        return report


@pytest.fixture
def work(tmp_path: Path, server: FakeServer) -> Workdir:
    """A directory to run in against the fake server."""
    return Workdir(tmp_path, server.url)


def turns(*texts: str) -> list[dict[str, str]]:
    """Returns alternating user and assistant turns."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


# ---- what is asked and what is written ----


def test_output_row_without_chat_answers_first_user_turn(work: Workdir, server: FakeServer) -> None:
    system = {"role": "system", "content": "Be kind."}
    work.write({"id": "a", "messages": [system, *turns("one", "old answer", "two")]}, {"id": 5, "prompt": "zwölf\n"})
    assert work.run() == 0
    assert work.rows() == {
        "a": {
            "id": "a",
            "messages": [system, *turns("one", "re: one")],
            "finish_reasons": ["stop"],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3},
            "model": "fake-model",
        },
        "5": {
            "id": "5",
            "messages": turns("zwölf\n", "re: zwölf\n"),
            "finish_reasons": ["stop"],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3},
            "model": "fake-model",
        },
    }
    assert server.asked() == {"one": 1, "zwölf\n": 1}


def test_chat_answers_every_user_turn_with_new_answers_as_history(work: Workdir, server: FakeServer) -> None:
    system = {"role": "system", "content": "Be kind."}
    work.write({"id": "a", "messages": [system, *turns("one", "old", "two", "older", "three", "oldest"), system]})
    assert work.run("--chat") == 0
    history = [system, *turns("one", "re: one", "two", "re: two", "three", "re: three")]
    assert [request["messages"] for request in server.requests] == [history[:2], history[:4], history[:6]]
    row = work.rows()["a"]
    assert row["messages"] == history
    assert row["finish_reasons"] == ["stop"] * 3
    assert row["usage"] == {"prompt_tokens": 21, "completion_tokens": 9}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "\n Why? \r\n"),
        ("p.jsonl", '\ufeff{"prompt": " Why? "}\n\n'),
        ("p.json", '[{"prompt": " Why? ", "messages": null}]'),
        ("p.jsonl", '{"messages": [{"role": "user", "content": " Why? "}], "prompt": "passed over"}'),
        ("p.jsonl", '{"conversations": [{"from": "human", "value": " Why? "}]}'),
        ("p.json", '[{"conversations": [{"from": "user", "value": " Why? "}]}]'),
    ],
)
def test_read_rows_in_any_format_gives_the_same_row_and_id(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    # The id is pinned: if it changes, no user's half-done output can be resumed.
    (row,) = prompt_files.read_rows(path)
    assert (row.id[:8], row.turns) == ("b045cbf6", ({"role": "user", "content": " Why? "},))


def test_read_rows_translates_sharegpt_speakers(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    speakers = ["system", "human", "gpt", "user", "assistant"]
    path.write_text(json.dumps({"conversations": [{"from": speaker, "value": "x"} for speaker in speakers]}))
    (row,) = prompt_files.read_rows(path)
    assert [turn["role"] for turn in row.turns] == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts_heldout.jsonl"])
def test_prompts_of_the_repository_load_with_unique_ids_and_texts(name: str) -> None:
    path = SCRIPT.parent / name
    count = prompt_files.count_rows(path)
    rows = list(prompt_files.read_rows(path))
    assert count == len(rows) == len({row.id for row in rows}) == len({row.digest for row in rows}) > 0


def test_sampling_defaults_and_flags_reach_the_server(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "prompt": "one"})
    assert work.run() == 0
    flags = ["--max-tokens", "9", "--temperature", "0", "--top-p", "0.5", "--seed", "3", "--model", "other"]
    work.output.unlink()
    assert work.run(*flags) == 0
    default, chosen = server.requests
    assert {key: default[key] for key in default if key not in ("messages", "seed")} == {
        "model": "fake-model",
        "max_tokens": 2048,
        "temperature": 0.3,
    }
    assert {key: chosen[key] for key in chosen if key != "messages"} == {
        "model": "other",
        "max_tokens": 9,
        "temperature": 0,
        "top_p": 0.5,
        "seed": 3,
    }
    assert work.report()["sampling"] == {
        "max_tokens": 9,
        "temperature": 0,
        "top_p": 0.5,
        "seed": 3,
        "chat": False,
        "drop_cut": False,
    }
    assert work.rows()["a"]["model"] == work.report()["model"] == "other"


def test_rerun_sends_the_same_requests(work: Workdir, server: FakeServer) -> None:
    work.write(*({"id": str(index), "prompt": f"p{index}"} for index in range(4)))
    for _ in range(2):
        assert work.run("--num_threads", "1") == 0
        work.output.unlink()
    assert server.requests[:4] == server.requests[4:]
    seeds = {request["seed"] for request in server.requests}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_every_flag_has_both_spellings() -> None:
    paths = {"data_path": Path("d"), "output_path": Path("o")}
    values = {"server": "http://x", "model": "m", "temperature": 0.5, "top_p": 0.5, "seed": 1, "limit": 1}
    values |= {"num_threads": 2, "max_tokens": 2, "timeout_s": 2.0, "max_retries": 2, "backoff_s": 2.0}
    expected: dict[str, Any] = {**paths, **values, "api_key_env": "K", "chat": True, "drop_cut": True}
    for separator in "_-":
        argv = []
        for name, value in expected.items():
            argv += [f"--{name.replace('_', separator)}"] + ([] if value is True else [str(value)])
        assert vars(generate.parse_args(argv)) == expected


def test_num_threads_bounds_the_requests_in_flight(
    work: Workdir, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = ended = most = 0
    really_converse = generate.converse

    async def converse(*args: Any) -> dict[str, Any]:
        nonlocal begun, ended, most
        begun += 1
        most = max(most, begun - ended)
        record = await really_converse(*args)
        ended += 1
        return record

    monkeypatch.setattr(generate, "converse", converse)
    server.barrier = threading.Barrier(3)  # breaks, and fails requests, unless three are in flight together
    work.write(*({"prompt": f"p{index}"} for index in range(9)))
    assert work.run("--num-threads", "3", "--max-retries", "0") == 0
    assert most == 3, "rows must not be taken before there is room for their requests"


def test_limit_uses_the_first_rows_only(work: Workdir, server: FakeServer) -> None:
    work.write(*({"prompt": f"p{index}"} for index in range(5)))
    assert work.run("--limit", "2") == 0
    assert server.asked() == {"p0": 1, "p1": 1}
    assert work.report()["input_rows"] == 2


# ---- going on ----


def test_resume_asks_only_for_what_is_missing(work: Workdir, server: FakeServer) -> None:
    work.write(*({"id": f"r{index}", "prompt": f"p{index}"} for index in range(5)))
    server.faults["p1"] = [fault(400)]
    assert work.run("--limit", "3") == 1
    first = work.output.read_bytes()
    assert work.run() == 0
    assert work.output.read_bytes().startswith(first)
    assert server.asked() == {"p0": 1, "p1": 2, "p2": 1, "p3": 1, "p4": 1}
    assert set(work.rows()) == {f"r{index}" for index in range(5)}
    report = work.report()
    assert (report["succeeded"], report["skipped_already_done"]) == (3, 2)
    assert not work.failed.exists(), "the failure of the first run is past"
    assert work.run() == 0
    assert (len(server.requests), work.report()["skipped_already_done"]) == (6, 5)


@pytest.mark.parametrize("kept_bytes", [1, 40, -1], ids=["one byte", "middle", "all but the line break"])
def test_resume_removes_a_torn_last_line(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str], kept_bytes: int
) -> None:
    work.write({"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two"})
    assert work.run("--num_threads", "1") == 0
    before = work.rows()
    first, second = work.output.read_bytes().splitlines(keepends=True)
    work.output.write_bytes(first + second[:kept_bytes])
    capsys.readouterr()
    assert work.run() == 0
    assert "removed the torn last line" in capsys.readouterr().err
    assert work.rows() == before
    assert server.asked() == {"one": 1, "two": 2}


@pytest.mark.parametrize("content", ['{"id": "a", "prompt": "x"}\ntail', "notes\ntail", "{}\n", '{"id": "a",\n{}\n'])
def test_output_that_is_no_output_is_refused_and_left_alone(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    work.write({"prompt": "one"})
    work.output.parent.mkdir()
    work.output.write_text(content)
    assert work.run() == 2
    assert f"{work.output}:1: found" in capsys.readouterr().err
    assert work.output.read_text() == content
    assert not server.requests


def test_input_as_output_is_refused(work: Workdir, server: FakeServer) -> None:
    work.write({"prompt": "one"})
    work.output = work.data
    before = work.data.read_text()
    assert work.run() == 2
    assert work.data.read_text() == before


def test_ctrl_c_keeps_what_is_written_and_says_how_to_go_on(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two"}, {"id": "c", "prompt": "three"})
    server.faults["two"] = [HANG]
    command = subprocess.Popen(
        [sys.executable, str(SCRIPT), *work.argv("--num_threads", "1")],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    server.wait_for(requests=2)
    command.send_signal(signal.SIGINT)
    _, stderr = command.communicate(timeout=WAIT_S)
    assert command.returncode == 130
    assert "the same command goes on" in stderr
    assert "Traceback" not in stderr
    assert set(work.rows()) == {"a"}
    assert work.run() == 0
    assert set(work.rows()) == {"a", "b", "c"}
    assert server.asked() == {"one": 1, "two": 2, "three": 1}


# ---- failures ----


@pytest.mark.parametrize("planned", [*(fault(status) for status in (408, 409, 425, 429, 500, 503, 599)), DROP], ids=str)
def test_passing_failure_is_retried(work: Workdir, server: FakeServer, planned: Fault) -> None:
    work.write({"id": "a", "prompt": "one"})
    server.faults["one"] = [planned, planned]
    assert work.run("--max_retries", "2") == 0
    assert work.rows()["a"]["messages"] == turns("one", "re: one")
    assert server.requests == [server.requests[0]] * 3


def test_timeout_is_retried(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "prompt": "one"})
    server.faults["one"] = [HANG, HANG]
    assert work.run("--timeout_s", "0.2", "--max_retries", "1") == 1
    assert work.failures()["a"].startswith("ReadTimeout")
    assert server.asked() == {"one": 2}


def test_retries_end(work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    work.write({"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two"})
    server.faults["one"] = [fault(503, "overloaded")] * 9
    assert work.run("--max_retries", "2") == 1
    assert server.asked() == {"one": 3, "two": 1}
    assert work.failures() == {"a": "HTTP 503: overloaded (tries: 3)"}
    assert set(work.rows()) == {"b"}
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 2 rows failed" in last_line
    assert str(work.failed) in last_line


@pytest.mark.parametrize("status", [307, 400, 401, 404, 422])
def test_lasting_failure_is_recorded_at_once(work: Workdir, server: FakeServer, status: int) -> None:
    work.write({"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two"})
    server.faults["one"] = [fault(status, "too long")]
    assert work.run() == 1
    assert server.asked() == {"one": 1, "two": 1}
    assert work.failures() == {"a": f"HTTP {status}: too long"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (completion(""), "empty answer"),
        (completion(" \n"), "empty answer"),
        (completion(None, "length"), "empty answer (finish_reason 'length')"),
        (completion("half", "abort"), "finish_reason 'abort'"),
        (completion("\ud83d"), "expected a chat completion"),
        (completion("x", usage={"prompt_tokens": "many"}), "expected a chat completion"),
        (completion("x", usage={"prompt_tokens": float("inf")}), "expected a chat completion"),
        (
            json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": {}}]}),
            "expected a chat completion",
        ),
        ("<html>", "found '<html>', expected a chat completion"),
        ("", "expected a chat completion"),
        ("[]", "expected a chat completion"),
        ('{"choices": []}', "expected a chat completion"),
        ('{"choices": [{"message": "text"}]}', "expected a chat completion"),
    ],
)
def test_answer_that_cannot_be_used_is_a_failure(work: Workdir, server: FakeServer, body: str, reason: str) -> None:
    work.write({"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two"})
    server.faults["one"] = [fault(200, body)]
    assert work.run() == 1
    assert reason in work.failures()["a"]
    assert set(work.rows()) == {"b"}


def test_failure_in_a_later_turn_writes_no_half_conversation(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "messages": turns("one", "old", "two")})
    server.faults["two"] = [fault(400)]
    assert work.run("--chat") == 1
    assert not work.output.exists()
    assert set(work.failures()) == {"a"}


def test_retry_after_is_waited_for(work: Workdir, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    really_sleep = chat_server.asyncio.sleep

    async def sleep(delay: float) -> None:
        waits.append(delay)
        await really_sleep(0)

    monkeypatch.setattr(chat_server.asyncio, "sleep", sleep)
    work.write({"prompt": "one"})
    server.faults["one"] = [fault(429, Retry_After="77"), DROP, fault(429, Retry_After="soon")]
    assert work.run() == 0
    assert [wait for wait in waits if wait] == [77.0]  # the backoff itself is 0 here


def test_retry_wait_doubles_with_jitter_up_to_its_cap() -> None:
    for attempt, longest_s in [(0, 2.0), (1, 4.0), (3, 16.0), (50, chat_server.MAX_BACKOFF_S)]:
        waits = [chat_server.retry_wait_s(attempt, 2.0, None) for _ in range(100)]
        assert longest_s / 2 <= min(waits) < max(waits) <= longest_s
        # 100 uniform draws all fall into one half with a chance of 2 in 2**100.
        assert min(waits) < longest_s * 0.75 < max(waits)


def test_retry_after_is_seconds_or_a_date() -> None:
    assert chat_server.asked_wait_s("12") == 12
    assert 50 < chat_server.asked_wait_s(formatdate(time.time() + 60, usegmt=True)) <= 60
    for unusable in [None, "", "soon", "-3", "nan", "inf", formatdate(0, usegmt=True)]:
        assert chat_server.asked_wait_s(unusable) == 0


# ---- counting ----


def test_report_accounts_for_every_row(work: Workdir, server: FakeServer) -> None:
    rows = [{"id": name, "prompt": name} for name in ("done", "good", "cut", "bad", "good")]
    work.write(*rows[:1])
    assert work.run() == 0
    work.write(*rows)
    server.faults = {"cut": [fault(200, completion("cut sh", "length"))], "bad": [fault(400)]}
    assert work.run() == 1
    report = work.report()
    assert report.pop("wall_s") > 0
    assert report.pop("sampling")
    assert report == {
        "input_rows": 5,
        "succeeded": 2,
        "failed": 1,
        "skipped": 2,
        "skipped_already_done": 1,
        "skipped_duplicates": 1,
        "skipped_dropped_cut": 0,
        "cut": 1,
        "prompt_tokens": 14,
        "completion_tokens": 6,
        "model": "fake-model",
        "server": server.url,
    }


def test_cut_answer_is_kept_and_marked(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "messages": turns("one", "old", "two")})
    server.faults["one"] = [fault(200, completion("cut sh", "length"))]
    assert work.run("--chat") == 0
    assert work.rows()["a"]["finish_reasons"] == ["length", "stop"]
    assert work.report()["cut"] == 1


def test_drop_cut_leaves_the_conversation_out(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "messages": turns("one", "old", "two")}, {"id": "b", "prompt": "three"})
    server.faults["one"] = [fault(200, completion("cut sh", "length"))]
    assert work.run("--chat", "--drop-cut") == 0
    assert set(work.rows()) == {"b"}
    assert server.asked() == {"one": 1, "three": 1}, "a dropped conversation needs no further turns"
    report = work.report()
    assert (report["succeeded"], report["skipped_dropped_cut"], report["cut"]) == (1, 1, 1)


def test_usage_that_the_server_leaves_out_counts_as_zero(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "prompt": "one"})
    server.faults["one"] = [fault(200, completion("fine", usage=None))]
    assert work.run() == 0
    assert work.rows()["a"]["usage"] == {"prompt_tokens": 0, "completion_tokens": 0}


# ---- errors before the first request ----


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the error, which must be all that was printed."""
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


def test_unreachable_server_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work = Workdir(tmp_path, f"http://127.0.0.1:{port}/v1/")
    work.write({"prompt": "one"})
    assert work.run("--model", "m") == 2
    assert f"cannot reach http://127.0.0.1:{port}/v1/models" in error_line(capsys)


@pytest.mark.parametrize(
    ("models", "found"),
    [
        (fault(200, '{"data": []}'), "found 0 models"),
        (fault(200, '{"data": [{"id": "m1"}, {"id": "m2"}]}'), "found 2 models ['m1', 'm2']"),
        (fault(200, "<html>"), "found '<html>', expected a list of models"),
        (fault(404), "found HTTP 404"),
    ],
)
def test_model_that_cannot_be_discovered_has_to_be_named(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str], models: Fault, found: str
) -> None:
    server.models = models
    work.write({"prompt": "one"})
    assert work.run() == 2
    assert found in error_line(capsys)
    assert not server.requests
    assert work.run("--model", "mine") == 0
    assert server.requests[0]["model"] == "mine"


def test_refused_key_is_an_error_even_with_a_named_model(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.models = fault(401)
    work.write({"prompt": "one"})
    assert work.run("--model", "m") == 2
    assert "found HTTP 401" in error_line(capsys)


@pytest.mark.parametrize(
    ("name", "content", "place", "expected"),
    [
        ("p.jsonl", '{"prompt": "x"}\n{"prompt": \n', ":2", "expected JSON"),
        ("p.jsonl", '{"prompt": "x"}\n\n"text"\n', ":3", "expected an object with 'prompt'"),
        ("p.jsonl", '{"text": "x"}', ":1", "found the keys ['text'], expected an object with 'prompt'"),
        ("p.jsonl", '{"prompt": ["x"]}', ":1", "'content' a text"),
        ("p.jsonl", '{"prompt": " "}', ":1", "not empty for a user"),
        ("p.jsonl", '{"messages": {}}', ":1", "lists of turns"),
        (
            "p.jsonl",
            '{"messages": [{"role": "tool", "content": "x"}]}',
            ":1",
            "expected 'role' to be one of system,",
        ),
        ("p.jsonl", '{"messages": [{"role": "system", "content": "x"}]}', ":1", "found no user turn"),
        (
            "p.jsonl",
            '{"conversations": [{"role": "user", "content": "x"}]}',
            ":1",
            "expected 'from' to be one of",
        ),
        ("p.jsonl", '{"id": 1.5, "prompt": "x"}', ":1", "found the id 1.5"),
        ("p.jsonl", '{"prompt": "\\ud83d"}', ":1", "expected valid Unicode"),
        ("p.jsonl", '{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}', "", "expected unique ids"),
        ("p.jsonl", "\n", "", "found no rows"),
        ("p.txt", "fine\n\udcff\n", ":2", "expected UTF-8"),
        ("p.json", '[{"prompt": "x"}, 3]', ": row 2", "expected an object with 'prompt'"),
        ("p.json", '{"prompt": "x"}', "", "expected a list of rows"),
        ("p.csv", "x", "", "expected .txt, .jsonl or .json"),
    ],
)
def test_malformed_input_names_its_place_before_any_request(
    work: Workdir,
    server: FakeServer,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str,
    place: str,
    expected: str,
) -> None:
    work.data = work.data.with_name(name)
    work.data.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert work.run() == 2
    line = error_line(capsys)
    assert f"{work.data}{place}: found" in line
    assert expected in line
    assert not server.requests


def test_missing_input_is_one_line(work: Workdir, capsys: pytest.CaptureFixture[str]) -> None:
    assert work.run() == 2
    assert f"No such file or directory: '{work.data}'" in error_line(capsys)


@pytest.mark.parametrize(
    "flags", [["--num_threads", "0"], ["--top_p", "1.5"], ["--temperature", "nan"], ["--limit", "x"]]
)
def test_flag_out_of_bounds_is_refused(work: Workdir, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    work.write({"prompt": "one"})
    with pytest.raises(SystemExit) as exit_info:
        work.run(*flags)
    assert exit_info.value.code == 2
    assert flags[0] in capsys.readouterr().err.splitlines()[-1]


def test_output_that_cannot_be_written_stops_the_run(
    work: Workdir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(generate, "append_line", full)
    work.write(*({"prompt": f"p{index}"} for index in range(3)))
    assert work.run() == 2
    assert capsys.readouterr().err.splitlines()[-1] == "generate.py: error: No space left on device"


# ---- the API key ----


def test_api_key_is_sent_and_never_shown(
    work: Workdir, server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "sk-very-secret"
    work.write({"id": "a", "prompt": "one"})
    for variable, flags in [("OPENAI_API_KEY", []), ("MY_KEY", ["--api-key-env", "MY_KEY"])]:
        monkeypatch.setenv(variable, f"{secret}\n")
        server.faults["one"] = [fault(400, f"bad key {secret}" + "x" * 264 + secret)]
        assert work.run(*flags) == 1
        monkeypatch.delenv(variable)
        printed = capsys.readouterr()
        shown = printed.out + printed.err + "".join(path.read_text() for path in work.output.parent.iterdir())
        assert secret[:5] not in shown
    assert server.authorizations == [f"Bearer {secret}"] * 2


def test_api_key_variable_that_is_not_set_is_an_error(work: Workdir, capsys: pytest.CaptureFixture[str]) -> None:
    work.write({"prompt": "one"})
    assert work.run("--api_key_env", "NOT_SET_ANYWHERE") == 2
    assert "NOT_SET_ANYWHERE" in error_line(capsys)


def test_without_a_key_none_is_sent(work: Workdir, server: FakeServer) -> None:
    work.write({"prompt": "one"})
    assert work.run() == 0
    assert server.authorizations == [None]


def test_script_needs_neither_torch_nor_the_package() -> None:
    heavy = {"torch", "transformers", "axolotl", "axolotl_medusa"}
    code = f"import generate, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_readme_names_every_flag_with_its_default() -> None:
    readme = (SCRIPT.parent / "README.md").read_text()
    rows = dict(line.split(" | ")[:2] for line in readme.splitlines() if line.startswith("| `--"))
    defaults = vars(generate.parse_args(["--data_path", "d", "--output_path", "o"]))
    assert set(rows) == {f"| `--{name}`" for name in defaults}
    for name, default in defaults.items():
        written = rows[f"| `--{name}`"].strip("`")
        if isinstance(default, bool):
            assert written == "off"
        elif isinstance(default, float):
            assert float(written) == default
        elif default is not None and not isinstance(default, Path):
            assert written == str(default)
