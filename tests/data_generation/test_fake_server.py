"""The fake server does what the tests that use it rely on."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fake_server import FAULTS, FakeServer, answer_text, chat_prompt, fake_server, question_text, token_ids


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    plan = {name: [name, name] for name in FAULTS}
    flags = ["--plan", json.dumps(plan), "--retry_after_s", "3", "--questions", "5", "--token_ids"]
    with fake_server(*flags) as running:
        yield running


def post(server: FakeServer, path: str, request: dict[str, Any]) -> tuple[int, bytes, str | None]:
    """Returns status, body and Retry-After."""
    connection = http.client.HTTPConnection(server.root.removeprefix("http://"), timeout=0.3)
    try:
        connection.request("POST", f"/v1/{path}", json.dumps(request))
        response = connection.getresponse()
        return response.status, response.read(), response.headers["Retry-After"]
    finally:
        connection.close()


def conversation(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}]


def test_fake_server_answers_as_a_function_of_the_request(server: FakeServer) -> None:
    request = {"messages": conversation("one"), "return_token_ids": True}
    status, body, _ = post(server, "chat/completions", request)
    answer = json.loads(body)
    (choice,) = answer["choices"]
    text = answer_text(conversation("one"))
    assert status == 200
    assert choice["message"] == {"role": "assistant", "content": text}
    assert choice["finish_reason"] == "stop"
    assert answer["prompt_token_ids"] == token_ids(chat_prompt(conversation("one")))
    assert choice["token_ids"] == token_ids(text + "</>")
    assert text != answer_text(conversation("two"))


def test_fake_server_writes_as_many_questions_as_it_is_told(server: FakeServer) -> None:
    texts = set()
    for seed in range(40):
        _, body, _ = post(server, "completions", {"prompt": "<user>", "seed": seed})
        texts.add(json.loads(body)["choices"][0]["text"])
        assert question_text("<user>", seed, 5) in texts
    assert texts == {f"What is {number}?" for number in range(5)}


FAILED_EXCHANGE = {
    "cut_before": http.client.RemoteDisconnected,
    "cut_body": http.client.IncompleteRead,
    "stall": TimeoutError,
    "stall_body": TimeoutError,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fake_server_does_what_is_planned_and_then_answers(server: FakeServer, fault: str) -> None:
    request = {"messages": conversation(fault)}
    before = server.stats()
    for _ in range(2):
        if fault in FAILED_EXCHANGE:
            with pytest.raises(FAILED_EXCHANGE[fault]):
                post(server, "chat/completions", request)
            continue
        status, body, retry_after = post(server, "chat/completions", request)
        assert status == {"status_500": 500, "status_503": 503, "rate_limit": 429}.get(fault, 200)
        assert (retry_after == "3") is (fault == "rate_limit")
        with pytest.raises((UnicodeDecodeError, json.JSONDecodeError)):
            json.loads(body)
    assert post(server, "chat/completions", request)[0] == 200
    server.wait_for(before["requests"] + 3)
    after = server.stats()
    assert after["asked"][fault] == 3
    assert after["faults"][fault] == 2
    assert after["answered"] == before["answered"] + 1


def test_fake_server_fails_a_text_only_so_often_in_a_row() -> None:
    with fake_server("--fault", "status_500=1", "--max_faults", "2") as server:
        statuses = [post(server, "chat/completions", {"messages": conversation("one")})[0] for _ in range(6)]
    assert statuses == [500, 500, 200, 500, 500, 200]
