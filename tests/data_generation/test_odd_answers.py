"""Every form of odd_answers.py through generate.py, and servers that answer oddly only once in a while."""

import json
import threading
from typing import Any

import pytest
from odd_answers import LISTS_OF_MODELS, NO_MODEL, ODD_ANSWERS, Odd
from planned_server import FakeServer, Fault, Workdir, completion, fault, prompt_ids, turns

from parts import retrying_server_pool


@pytest.mark.parametrize("odd", ODD_ANSWERS, ids=lambda odd: odd.name)
def test_odd_answer_is_read_or_fails_alone(
    work: Workdir, server: FakeServer, odd: Odd, capsys: pytest.CaptureFixture[str]
) -> None:
    work.write({"id": "odd", "prompt": "one"}, {"id": "other", "prompt": "two"})
    server.faults["one"] = [fault(200, odd.body())] * 9
    flags = ["--num_threads", "1", "--max_retries", "2", *odd.flags]
    assert work.run(*flags) == (0 if odd.text else 1)
    assert "is set aside" not in capsys.readouterr().err
    assert server.asked()["one"] == odd.asked
    rows = work.rows()
    assert rows["other"]["messages"] == turns("two", "re: two")
    if odd.text is None:
        assert odd.reason in work.failures()["odd"]
        return
    assert rows["odd"]["messages"] == turns("one", odd.text)
    assert rows["odd"]["finish_reasons"] == [odd.finish_reason]
    assert rows["odd"]["usage"] == dict(zip(("prompt_tokens", "completion_tokens"), odd.usage, strict=True))


@pytest.mark.parametrize(("name", "by", "body"), LISTS_OF_MODELS)
def test_list_of_models_is_read(work: Workdir, server: FakeServer, name: str, by: str, body: str) -> None:
    server.models = fault(200, body)
    work.write({"prompt": "one"})
    assert work.run() == 0
    assert server.requests[0]["model"] == "m"


@pytest.mark.parametrize(("name", "by", "body", "found"), NO_MODEL)
def test_list_of_no_models_is_one_line(
    work: Workdir, server: FakeServer, name: str, by: str, body: str, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.models = fault(200, body)
    work.write({"prompt": "one"})
    assert work.run() == 2
    assert found in capsys.readouterr().err.splitlines()[-1]
    assert work.run("--model", "m") == 0, "a model that is named needs no list"


# ---- one bad answer, and a server that is good ----

BAD: dict[str, Fault] = {
    "garbage": fault(200, "<html>"),
    "half a pair": fault(200, completion("\ud83d")),
    "500": fault(500, "cannot render this"),
    "error in an answer": fault(200, '{"error": {"code": 500}}'),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_single_row_that_a_server_cannot_answer_never_sets_it_aside(
    work: Workdir, server: FakeServer, bad: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    work.write(*({"id": name, "prompt": name} for name in ("bad", "one", "two")))
    server.faults["bad"] = [bad] * 99
    assert work.run("--num_threads", "1", "--max_retries", str(2 * retrying_server_pool.FAILURES_TO_SET_ASIDE)) == 1
    assert "is set aside" not in capsys.readouterr().err
    assert set(work.rows()) == {"one", "two"}


@pytest.mark.parametrize(
    "answer", [fault(503, "loading"), fault(502, "<html>"), fault(404), fault(200, "<html>")], ids=str
)
def test_server_that_comes_back_may_list_its_models_late(
    work: Workdir,
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    answer: Fault,
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed, asked, lock = server.models, [0], threading.Lock()

    def models(_: FakeServer) -> Fault:
        with lock:
            asked[0] += 1
            return listed if asked[0] in (1, 4) else answer

    monkeypatch.setattr(FakeServer, "models", property(models, lambda *_: None), raising=False)
    work.write(*({"id": name, "prompt": name} for name in ("one", "two")))
    server.faults = {name: [fault(500)] * 4 for name in ("one", "two")}
    assert work.run("--num_threads", "2", "--max_retries", "9", "--give_up_s", "30") == 0
    assert "is set aside" in capsys.readouterr().err
    assert asked[0] == 4
    assert set(work.rows()) == {"one", "two"}


def test_server_that_starts_with_503_is_one_line(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.models = fault(503, '{"error": {"message": "Loading model"}}')
    work.write({"prompt": "one"})
    assert work.run() == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "cannot reach" in line and "Loading model" in line


def test_pool_goes_on_without_a_server_that_starts_with_503(
    work: Workdir, server: FakeServer, start_server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    second = start_server()
    second.models = fault(503, "Loading model")
    work.write({"prompt": "one"})
    assert work.run("--server", second.url) == 0
    assert f"{second.url} is set aside (HTTP 503: Loading model)" in capsys.readouterr().err


def test_answer_without_token_ids_fails_alone(work: Workdir, server: FakeServer) -> None:
    server.has_token_ids = True
    work.write(*({"id": name, "prompt": name} for name in ("one", "two")))
    server.faults["one"] = [fault(200, completion("x"))]
    assert work.run("--token_ids") == 1
    assert "without token ids" in work.failures()["one"]
    assert work.rows()["two"]["input_ids"][: len(prompt_ids(turns("two")))] == prompt_ids(turns("two"))


@pytest.mark.parametrize("rejecting", ["token ids", "user turns"])
def test_server_that_answers_500_to_a_field_that_it_does_not_know_is_asked_without_it(
    work: Workdir, server: FakeServer, monkeypatch: pytest.MonkeyPatch, rejecting: str
) -> None:
    chat, complete = server.chat, server.complete
    monkeypatch.setattr(server, "chat", lambda request: fault(500) if "return_token_ids" in request else chat(request))
    monkeypatch.setattr(
        server, "complete", lambda request: fault(500) if "skip_special_tokens" in request else complete(request)
    )
    work.write({"id": "a", "prompt": "one"})
    server.user_turns = ["two<|im_end|>"]
    if rejecting == "token ids":
        assert work.run("--token_ids") == 0
        assert work.report()["recipe"]["token_ids"] is False
    else:
        assert work.run_mode("--data_path", str(work.data), "--max_turns", "2") == 0
        assert work.rows()["a"]["messages"] == turns("one", "re: one", "two", "re: two")


@pytest.mark.parametrize("mode", ["token ids", "user turns"])
def test_server_that_fails_while_it_is_asked_what_it_understands_is_not_taken_for_one_that_cannot(
    work: Workdir, server: FakeServer, start_server: Any, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    ill = start_server()
    monkeypatch.setattr(ill, "chat", lambda request: fault(503))
    monkeypatch.setattr(ill, "complete", lambda request: fault(503))
    server.has_token_ids = True
    work.write({"id": "a", "prompt": "one"})
    if mode == "token ids":
        assert work.run("--server", ill.url, "--token_ids") == 0
        assert json.loads(work.output.read_text())["input_ids"]
    else:
        assert work.run_mode("--data_path", str(work.data), "--server", ill.url, "--max_turns", "1") == 0


@pytest.mark.parametrize("mode", ["token ids", "user turns"])
def test_one_failure_while_a_server_is_asked_what_it_understands_changes_nothing(
    work: Workdir, server: FakeServer, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    server.has_token_ids = True
    failures = [fault(503)]
    chat, complete = server.chat, server.complete
    monkeypatch.setattr(server, "chat", lambda request: failures.pop() if failures else chat(request))
    monkeypatch.setattr(server, "complete", lambda request: failures.pop() if failures else complete(request))
    work.write({"id": "a", "prompt": "one"})
    if mode == "token ids":
        assert work.run("--token_ids") == 0
        assert work.rows()["a"]["input_ids"]
    else:
        server.user_turns = ["two<|im_end|>"]
        assert work.run_mode("--data_path", str(work.data), "--max_turns", "2") == 0
        assert server.completions[0]["skip_special_tokens"] is False


def test_server_that_is_still_loading_is_waited_for(
    work: Workdir, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, listed = [fault(503, "Loading model")] * 3, server.models
    listing = property(lambda _: loading.pop() if loading else listed, lambda *_: None)
    monkeypatch.setattr(FakeServer, "models", listing, raising=False)
    work.write({"prompt": "one"})
    assert work.run("--max_retries", "3") == 0
