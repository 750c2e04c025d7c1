"""The command data_generation/generate.py: flags, going on, counting, Ctrl-C and errors, against a real HTTP server."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from planned_server import DROP, HANG, SLOW, WAIT_S, FakeServer, Fault, Workdir, completion, fault, turns

import generate
from parts import prompt_files
from parts.command_line import parse_flags

SCRIPT = Path(generate.__file__)
SYSTEM = {"role": "system", "content": "Be kind."}


# ---- what is asked and what is written ----


def test_output_row_has_turns_reasons_usage_and_model(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "messages": [SYSTEM, *turns("one", "old answer")]}, {"id": 5, "prompt": "zwölf\n"})
    assert work.run() == 0
    rest = {"finish_reasons": ["stop"], "usage": {"prompt_tokens": 7, "completion_tokens": 3}, "model": "fake-model"}
    assert work.rows() == {
        "a": {"id": "a", "messages": [SYSTEM, *turns("one", "re: one")], **rest},
        "5": {"id": "5", "messages": turns("zwölf\n", "re: zwölf\n"), **rest},
    }
    assert server.asked() == {"one": 1, "zwölf\n": 1}


def test_sampling_defaults_and_flags_reach_the_server(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "prompt": "one"})
    assert work.run() == 0
    request = server.requests[0]
    assert request.pop("seed") >= 0
    assert request == {
        "model": "fake-model",
        "messages": turns("one"),
        "max_tokens": 2048,
        "temperature": 0.3,
    }
    work.output.unlink()
    assert work.run("--max_tokens", "16", "--temperature", "0", "--top-p", "0.9", "--model", "mine") == 0
    request = server.requests[1]
    assert (request["max_tokens"], request["temperature"], request["top_p"]) == (16, 0, 0.9)
    assert request["model"] == "mine"


def test_rerun_sends_the_same_requests(work: Workdir, server: FakeServer) -> None:
    work.write(*({"id": str(index), "prompt": f"p{index}"} for index in range(4)))
    for _ in range(2):
        assert work.run("--num_threads", "1") == 0
        work.output.unlink()
    assert server.requests[:4] == server.requests[4:]
    seeds = {request["seed"] for request in server.requests}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_seed_changes_every_request(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "prompt": "one"})
    for seed in ("0", "1"):
        assert work.run("--seed", seed) == 0
        work.output.unlink()
    assert server.requests[0]["seed"] != server.requests[1]["seed"]


def test_every_flag_has_both_spellings() -> None:
    values: dict[str, Any] = {"data_path": "d", "split": "s", "from_scratch": 3, "output_path": Path("o")}
    values |= {"model": "m", "tokenizer": "t", "thinking": "on", "format": "sharegpt", "cut": "drop"}
    values |= {"temperature": 0.5, "user_temperature": 0.5, "top_p": 0.5, "seed": 1, "limit": 1, "max_turns": 2}
    values |= {"num_threads": 2, "max_tokens": 2, "timeout_s": 2.0, "max_retries": 2, "backoff_s": 2.0}
    values |= {"tool_turns": "keep", "split_turns": True}
    values |= {"give_up_s": 2.0, "api_key_env": "K", "chat": True, "token_ids": True, "retry_failed": True}
    for separator in "_-":
        argv = ["--server", "http://x", "--server", "http://y"]
        for name, value in values.items():
            argv += [f"--{name.replace('_', separator)}"] + ([] if value is True else [str(value)])
        assert vars(parse_flags(generate.Settings, "", argv)) == values | {"server": ["http://x", "http://y"]}


def test_num_threads_bounds_the_requests_in_flight(
    work: Workdir, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = ended = most = 0
    really_converse = generate.Run.converse

    async def converse(*args: Any) -> None:
        nonlocal begun, ended, most
        begun += 1
        most = max(most, begun - ended)
        await really_converse(*args)
        ended += 1

    monkeypatch.setattr(generate.Run, "converse", converse)
    server.barrier = threading.Barrier(3)  # breaks, and fails requests, unless three are in flight together
    work.write(*({"prompt": f"p{index}"} for index in range(9)))
    assert work.run("--num-threads", "3", "--max-retries", "0") == 0
    assert most == 3, "rows must not be taken before there is room for their requests"


def test_limit_uses_the_first_rows_only(work: Workdir, server: FakeServer) -> None:
    work.write(*({"prompt": f"p{index}"} for index in range(5)))
    assert work.run("--limit", "2") == 0
    assert server.asked() == {"p0": 1, "p1": 1}
    assert work.report()["input_rows"] == 2


def test_pool_of_servers_shares_the_rows(work: Workdir, server: FakeServer, start_server: Any) -> None:
    second = start_server()
    server.barrier = second.barrier = threading.Barrier(4)  # two on each server, or nothing goes on
    work.write(*({"prompt": f"p{index}"} for index in range(8)))
    assert work.run("--server", second.url, "--num_threads", "4", "--max_retries", "0") == 0
    assert work.report()["servers"] == {
        server.url: {"answers": 4, "failures": 0},
        second.url: {"answers": 4, "failures": 0},
    }


# ---- going on ----


def test_resume_asks_only_for_what_is_missing(work: Workdir, server: FakeServer) -> None:
    work.write(*({"id": f"r{index}", "prompt": f"p{index}"} for index in range(5)))
    assert work.run("--limit", "3") == 0
    first = work.output.read_bytes()
    assert work.run() == 0
    assert work.output.read_bytes().startswith(first)
    assert server.asked() == {f"p{index}": 1 for index in range(5)}
    assert set(work.rows()) == {f"r{index}" for index in range(5)}
    report = work.report()
    assert (report["succeeded"], report["skipped_already_done"]) == (2, 3)
    assert work.run() == 0
    assert (len(server.requests), work.report()["skipped_already_done"]) == (5, 5)


def test_failed_rows_are_asked_again_only_by_retry_failed(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two"}, {"id": "c", "prompt": "three"})
    server.faults = {"one": [fault(400)], "two": [fault(400), fault(422)]}
    assert work.run() == 1
    assert work.run() == 0
    assert len(server.requests) == 3
    assert work.report()["skipped_failed_before"] == 2
    assert set(work.failures()) == {"a", "b"}
    assert work.run("--retry_failed") == 1
    report = work.report()
    assert (report["succeeded"], report["failed"], report["skipped_already_done"]) == (1, 1, 1)
    assert work.failures() == {"b": "HTTP 422: no"}
    assert work.run("--retry_failed") == 0
    assert set(work.rows()) == {"a", "b", "c"}
    assert not work.failed.exists(), "no failure is left"


@pytest.mark.parametrize("kept_bytes", [1, 40, -1], ids=["one byte", "middle", "all but the line break"])
def test_resume_mends_a_torn_last_line(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str], kept_bytes: int
) -> None:
    work.write({"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two"})
    assert work.run("--num_threads", "1") == 0
    before = work.rows()
    first, second = work.output.read_bytes().splitlines(keepends=True)
    work.output.write_bytes(first + second[:kept_bytes])
    capsys.readouterr()
    assert work.run() == 0
    assert "last line of" in capsys.readouterr().err
    assert work.rows() == before
    assert server.asked() == {"one": 1, "two": 1 if kept_bytes == -1 else 2}


def test_rows_of_another_model_in_the_output_are_warned_about(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    work.write({"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two"})
    assert work.run("--limit", "1") == 0
    assert work.run("--model", "other") == 0
    assert "has rows of fake-model, and now gets rows of other" in capsys.readouterr().err


def test_output_that_is_no_output_is_refused_and_left_alone(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    work.write({"prompt": "one"})
    work.output.parent.mkdir()
    work.output.write_text("notes\ntail")
    assert work.run() == 2
    assert f"{work.output}:1: found" in capsys.readouterr().err
    assert work.output.read_text() == "notes\ntail"
    assert not server.requests


@pytest.mark.parametrize("content", ["precious", '{"inputs": [], "total": {}}'], ids=["text", "combine's report"])
def test_report_that_is_of_no_run_is_refused_and_left_alone(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    work.write({"prompt": "one"})
    work.report_file.parent.mkdir()
    work.report_file.write_text(content)
    assert work.run() == 2
    assert f"{work.report_file}: found" in capsys.readouterr().err
    assert work.report_file.read_text() == content
    assert not server.requests
    work.report_file.unlink()
    assert work.run() == work.run() == 0


def test_input_as_output_is_refused(work: Workdir, server: FakeServer) -> None:
    work.write({"prompt": "one"})
    work.output = work.data
    before = work.data.read_text()
    assert work.run() == 2
    assert work.data.read_text() == before


# ---- Ctrl-C ----


@pytest.fixture
def interrupted_run(work: Workdir, server: FakeServer) -> Any:
    """The command as a process of its own, with one answer written and one in flight that is slow."""
    work.write({"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two"}, {"id": "c", "prompt": "three"})
    server.faults["two"] = [SLOW]
    command = subprocess.Popen(
        [sys.executable, str(SCRIPT), *work.argv("--num_threads", "1", "--chat")],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    server.wait_for(requests=2)
    yield command
    command.kill()
    command.communicate(timeout=WAIT_S)


def read_until(command: Any, text: str) -> str:
    """Reads stderr up to the line with `text`."""
    read = ""
    while text not in read:
        line = command.stderr.readline()
        assert line, read
        read += line
    return read


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_waits_for_what_is_in_flight(
    work: Workdir, server: FakeServer, interrupted_run: Any, sent: signal.Signals
) -> None:
    interrupted_run.send_signal(sent)
    read_until(interrupted_run, "waiting for the answers in flight")
    server.released.set()
    _, stderr = interrupted_run.communicate(timeout=WAIT_S)
    assert interrupted_run.returncode == 130
    assert "the same command goes on" in stderr
    assert "Traceback" not in stderr
    assert set(work.rows()) == {"a", "b"}
    report = work.report()
    assert (report["succeeded"], report["left"]) == (2, 1)
    assert work.run() == 0
    assert set(work.rows()) == {"a", "b", "c"}
    assert server.asked() == {"one": 1, "two": 1, "three": 1}


def test_second_interrupt_stops_at_once(work: Workdir, server: FakeServer, interrupted_run: Any) -> None:
    interrupted_run.send_signal(signal.SIGINT)
    read_until(interrupted_run, "waiting for the answers in flight")
    interrupted_run.send_signal(signal.SIGINT)
    _, stderr = interrupted_run.communicate(timeout=WAIT_S)
    assert interrupted_run.returncode == 130
    assert "Traceback" not in stderr
    assert set(work.rows()) == {"a"}
    assert work.report()["left"] == 2
    server.released.set()
    assert work.run() == 0
    assert set(work.rows()) == {"a", "b", "c"}


# ---- failures ----


@pytest.mark.parametrize("planned", [fault(429), fault(503), DROP, fault(200, "<html>")], ids=str)
def test_passing_failure_is_retried(work: Workdir, server: FakeServer, planned: Fault) -> None:
    work.write({"id": "a", "prompt": "one"})
    server.faults["one"] = [planned, planned]
    assert work.run("--max_retries", "2") == 0
    assert work.rows()["a"]["messages"] == turns("one", "re: one")
    assert server.requests == [server.requests[0]] * 3
    assert work.report()["retries"] == 2


def test_timeouts_end_as_a_failure(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "prompt": "one"})
    server.faults["one"] = [HANG, HANG]
    assert work.run("--timeout_s", "0.2", "--max_retries", "1") == 1
    assert "Timeout" in work.failures()["a"]
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


def test_failure_in_a_later_turn_writes_no_half_conversation(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "messages": turns("one", "old", "two")})
    server.faults["two"] = [fault(400)]
    assert work.run() == 1
    assert work.output.read_bytes() == b""
    assert set(work.failures()) == {"a"}


# ---- counting ----


def test_report_accounts_for_every_row(work: Workdir, server: FakeServer) -> None:
    rows: list[dict[str, Any]] = [{"id": name, "prompt": name} for name in ("done", "good", "cut", "bad", "good")]
    rows += [{"id": "empty", "messages": [SYSTEM]}]
    work.write(*rows[:1])
    assert work.run() == 0
    work.write(*rows)
    server.faults = {"cut": [fault(200, completion("cut sh", "length"))], "bad": [fault(400)]}
    assert work.run() == 1
    report = work.report()
    assert report.pop("wall_s") > 0
    recipe = report.pop("recipe")
    assert (recipe["max_tokens"], recipe["temperature"], recipe["chat"]) == (2048, 0.3, True)
    assert report == {
        "input_rows": 6,
        "succeeded": 2,
        "failed": 1,
        "skipped": 3,
        "left": 0,
        "skipped_already_done": 1,
        "skipped_failed_before": 0,
        "skipped_left_out_before": 0,
        "skipped_duplicates": 1,
        "skipped_unusable": 1,
        "skipped_cut": 0,
        "cut_answers": 1,
        "cut_reasoning": 0,
        "context_full": 0,
        "tool_turns_left_out": 0,
        "prompt_tokens": 14,
        "completion_tokens": 6,
        "retries": 0,
        "model": "fake-model",
        "servers": {server.url: {"answers": 2, "failures": 0}},
        "data": str(work.data),
    }
    skipped = Path(f"{work.output}.skipped.jsonl").read_text()
    assert json.loads(skipped)["id"] == "empty"


# ---- errors before the first request ----


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the error, the only line that was printed besides the progress bar."""
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = [line for line in printed.err.splitlines() if line.startswith("generate.py: ")]
    return line


def test_unreachable_server_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work = Workdir(tmp_path, f"http://127.0.0.1:{port}/v1/")
    work.write({"prompt": "one"})
    assert work.run("--model", "m") == 2
    assert f"cannot reach http://127.0.0.1:{port}/v1/models" in error_line(capsys)


def test_malformed_input_is_one_line_before_any_request(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    work.data.write_text('{"prompt": "x"}\n{"prompt": \n')
    assert work.run() == 2
    assert f"{work.data}:2: found" in error_line(capsys)
    assert not server.requests


def test_missing_input_is_one_line(work: Workdir, capsys: pytest.CaptureFixture[str]) -> None:
    assert work.run() == 2
    assert str(work.data) in error_line(capsys)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--data_path", "d", "--from_scratch", "3"],
        ["--from_scratch", "3", "--chat"],
        ["--from_scratch", "3", "--split", "train"],
        ["--data_path", "d", "--token_ids", "--thinking", "strip"],
        ["--data_path", "d", "--tool_turns", "keep"],
        ["--data_path", "d", "--tool_turns", "mask", "--chat", "--format", "sharegpt"],
    ],
    ids=" ".join,
)
def test_contradicting_flags_are_one_line(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--output_path", str(tmp_path / "o.jsonl"), *flags]) == 2
    assert "--" in error_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags", [["--num_threads", "0"], ["--top_p", "1.5"], ["--temperature", "nan"], ["--limit", "x"], ["--cut", "x"]]
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

    monkeypatch.setattr(generate.OutputFiles, "append_conversation", full)
    work.write(*({"prompt": f"p{index}"} for index in range(3)))
    assert work.run() == 2
    assert capsys.readouterr().err.splitlines()[-1] == "generate.py: error: No space left on device"


# ---- the API key ----


def test_api_key_is_sent_and_never_shown(
    work: Workdir, server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "sk-very-secret"
    work.write({"id": "a", "prompt": "one"})
    for variable, flags in [("OPENAI_API_KEY", []), ("MY_KEY", ["--api-key-env", "MY_KEY", "--retry_failed"])]:
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


# ---- what stands beside the command ----


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts_heldout.jsonl"])
def test_prompts_of_the_repository_load_with_unique_ids_and_texts(name: str) -> None:
    rows = list(prompt_files.read_rows(str(SCRIPT.parent / name)))
    assert len({row.id for row in rows}) == len({row.digest for row in rows}) == len(rows) > 0
    assert not any(row.reason for row in rows)


def test_script_needs_neither_torch_nor_the_package_nor_what_only_some_inputs_need() -> None:
    heavy = {"torch", "transformers", "axolotl", "axolotl_medusa", "datasets", "ijson", "zstandard", "huggingface_hub"}
    code = f"import generate, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_readme_names_every_flag_with_its_default() -> None:
    readme = (SCRIPT.parent / "README.md").read_text()
    rows = dict(line.split(" | ")[:2] for line in readme.splitlines() if line.startswith("| `--"))
    defaults = vars(parse_flags(generate.Settings, "", ["--output_path", "o"]))
    assert set(rows) == {f"| `--{name}`" for name in defaults}
    for name, default in defaults.items():
        written = rows[f"| `--{name}`"].strip("`")
        if isinstance(default, bool):
            assert written == "off"
        elif isinstance(default, float):
            assert float(written) == default
        elif default is not None and not isinstance(default, Path):
            assert written == str(default)


# ---- credentials ----


def everything_written(work: Workdir) -> str:
    return "".join(path.read_text() for path in work.output.parent.iterdir())


@pytest.mark.parametrize("key", ["", "key-of-the-environment"])
def test_credentials_of_a_server_are_sent_and_are_in_no_file_and_no_line(
    work: Workdir, server: FakeServer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    basic = "bWU6c2VjLXJldA=="  # me:sec-ret
    work.url = server.url.replace("://", "://me:sec-ret@")
    work.write({"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two"}, {"id": "c", "prompt": "three"})
    server.faults = {"one": [fault(400, f"no: me:sec-ret Basic {basic}")], "two": [DROP, fault(200, "sec-ret")]}
    assert work.run("--num_threads", "1", "--max_retries", "1") == 1
    assert set(server.authorizations) == {f"Basic {basic}"}
    assert list(work.report()["servers"]) == [server.url]
    shown = everything_written(work) + "".join(capfd.readouterr())
    assert "sec-ret" not in shown and basic not in shown
    assert work.failures() == {
        "a": "HTTP 400: no: me:*** Basic ***",
        "b": "found '***', expected a completion (tries: 2)",
    }


def test_one_server_under_two_names_is_counted_once_in_the_report(work: Workdir, server: FakeServer) -> None:
    work.write(*({"prompt": f"p{index}"} for index in range(6)))
    named = [server.url.replace("://", f"://user{number}:pass@") for number in (1, 2)]
    assert work.run("--server", named[0], "--server", named[1]) == 0
    assert work.report()["servers"] == {server.url: {"answers": 6, "failures": 0}}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:sec-ret@127.0.0.1:9/v1", "cannot reach http://127.0.0.1:9/v1/models"),
        ("http://me:sec-ret@[bad/v1", "expected one like http://host:8000/v1"),
        ("http://127.0.0.1:9/v1?token=sec-ret", "cannot reach http://127.0.0.1:9/v1?token=***"),
        ("ftp://me:sec-ret@host/v1", "expected one like http://host:8000/v1"),
    ],
)
def test_error_about_a_server_shows_no_credentials(
    work: Workdir, capfd: pytest.CaptureFixture[str], url: str, message: str
) -> None:
    work.write({"id": "a", "prompt": "one"})
    work.url = url
    assert work.run() == 2
    shown = "".join(capfd.readouterr())
    assert message in shown and "sec-ret" not in shown


def test_key_that_was_typed_as_a_flag_is_not_repeated(work: Workdir, capsys: pytest.CaptureFixture[str]) -> None:
    for typed in (["--api_key", "sec-ret"], ["--api-key=sec-ret"]):
        with pytest.raises(SystemExit) as error:
            work.run(*typed)
        shown = capsys.readouterr().err
        assert error.value.code == 2 and "unrecognized arguments: --api" in shown and "sec-ret" not in shown


def test_data_with_a_token_in_its_address_is_reported_without_it(work: Workdir, server: FakeServer) -> None:
    work.data = work.data.with_name("x?token=sec-ret&a.jsonl")
    work.write({"prompt": "one"})
    assert work.run() == 0
    assert work.report()["data"] == str(work.data).replace("sec-ret", "***")


def test_commands_find_their_own_modules_where_another_package_has_their_name(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").touch()
    for script in ("generate", "convert_to_sharegpt", "clean", "split", "combine"):
        command = [sys.executable, str(SCRIPT.with_name(f"{script}.py")), "--help"]
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=60)
        assert done.returncode == 0, done.stderr
