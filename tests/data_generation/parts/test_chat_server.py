"""One server: its model, its answers, what it understands, and the API key that must never show."""

import asyncio
import json
import time
from email.utils import formatdate
from typing import Any

import aiohttp
import pytest
from planned_server import HANG, FakeServer, Fault, completion, fault

from parts import chat_server
from parts.chat_server import CHAT, Answer, ChatServer, PassingError, RowError, ServerError


def with_server(server: FakeServer, use: Any, *, timeout_s: float = 10.0, **options: Any) -> Any:
    """Runs `use` with a ChatServer that knows its model."""

    async def run() -> Any:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session:
            one = ChatServer(session, server.url, **{"model": None, **options})
            await one.find_model()
            return await use(one)

    return asyncio.run(run())


def ask(one: ChatServer) -> Any:
    """Sends the prompt "one"."""
    return one.ask(CHAT, {"messages": [{"role": "user", "content": "one"}], "max_tokens": 9})


def test_answer_has_text_reason_tokens_and_model(server: FakeServer) -> None:
    assert with_server(server, ask) == Answer("re: one", "stop", 7, 3, "fake-model")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_that_the_server_reports_apart_is_kept_apart(server: FakeServer, name: str) -> None:
    body = json.loads(completion("So."))
    body["choices"][0]["message"][name] = "Hm."
    server.faults["one"] = [fault(200, json.dumps(body))]
    answer = with_server(server, ask)
    assert (answer.text, answer.reasoning) == ("So.", "Hm.")


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        [],
        7,
        {"prompt_tokens": None},
        {"prompt_tokens": "many"},
        {"prompt_tokens": float("inf")},
        {"prompt_tokens": -1},
    ],
)
def test_usage_that_the_server_leaves_out_or_garbles_counts_as_zero(server: FakeServer, usage: Any) -> None:
    server.faults["one"] = [fault(200, completion("fine", usage=usage))]
    answer = with_server(server, ask)
    assert (answer.prompt_tokens, answer.completion_tokens) == (0, 0)


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 503, 599])
def test_status_that_may_pass_is_a_passing_error(server: FakeServer, status: int) -> None:
    server.faults["one"] = [fault(status, "later", Retry_After="7")]
    with pytest.raises(PassingError, match=f"HTTP {status}: later") as error:
        with_server(server, ask)
    assert error.value.retry_after_s == 7


@pytest.mark.parametrize("status", [307, 400, 401, 404, 422])
def test_status_that_will_not_pass_is_the_rows_error(server: FakeServer, status: int) -> None:
    server.faults["one"] = [fault(status, "too long")]
    with pytest.raises(RowError, match=f"HTTP {status}: too long"):
        with_server(server, ask)


def test_timeout_is_a_passing_error_with_a_reason(server: FakeServer) -> None:
    server.faults["one"] = [HANG]
    with pytest.raises(PassingError, match="Timeout"):
        with_server(server, ask, timeout_s=0.2)


@pytest.mark.parametrize(
    ("body", "error", "reason"),
    [
        (completion(""), RowError, "empty answer"),
        (completion(" \n"), RowError, "empty answer"),
        (completion(None, "length"), RowError, r"empty answer \(finish_reason 'length'\)"),
        (completion("half", "abort"), RowError, "finish_reason 'abort'"),
        (completion("\ud83d"), PassingError, "expected a completion"),
        (json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": {}}]}), PassingError, "a completion"),
        ("<html>", PassingError, "found '<html>', expected a completion"),
        ("", PassingError, "expected a completion"),
        ("[]", PassingError, "expected a completion"),
        ('{"choices": []}', PassingError, "expected a completion"),
        ('{"choices": [{"message": "text"}]}', PassingError, "expected a completion"),
    ],
)
def test_answer_that_cannot_be_used_says_why(
    server: FakeServer, body: str, error: type[Exception], reason: str
) -> None:
    server.faults["one"] = [fault(200, body)]
    with pytest.raises(error, match=reason):
        with_server(server, ask)


@pytest.mark.parametrize(
    ("models", "found"),
    [
        (fault(200, '{"data": []}'), "found 0 models"),
        (fault(200, '{"data": [{"id": "m1"}, {"id": "m2"}]}'), r"found 2 models \['m1', 'm2'\]"),
        (fault(200, "<html>"), "found '<html>', expected a list of models"),
        (fault(404), "found HTTP 404"),
    ],
)
def test_model_that_cannot_be_discovered_has_to_be_named(server: FakeServer, models: Fault, found: str) -> None:
    server.models = models
    with pytest.raises(ServerError, match=found):
        with_server(server, ask)
    assert not server.requests
    assert with_server(server, ask, model="mine").model == "mine"
    assert server.requests[0]["model"] == "mine"


def test_root_of_the_model_is_kept(server: FakeServer) -> None:
    server.models = fault(200, '{"data": [{"id": "m", "root": "/models/m"}]}')

    async def root(one: ChatServer) -> str:
        return one.model_root

    assert with_server(server, root) == "/models/m"


@pytest.mark.parametrize("status", [401, 403])
def test_refused_key_is_an_error_even_with_a_named_model(server: FakeServer, status: int) -> None:
    server.models = fault(status)
    with pytest.raises(ServerError, match=f"found HTTP {status}"):
        with_server(server, ask, model="m")


def test_url_that_is_none_is_an_error(server: FakeServer) -> None:
    server.url = "localhost:8000"
    with pytest.raises(ServerError, match="expected one like http://host:8000/v1"):
        with_server(server, ask)


def test_retry_after_is_seconds_or_a_date() -> None:
    assert chat_server.asked_wait_s("12") == 12
    assert 50 < chat_server.asked_wait_s(formatdate(time.time() + 60, usegmt=True)) <= 60
    for unusable in [None, "", "soon", "-3", "nan", "inf", formatdate(0, usegmt=True)]:
        assert chat_server.asked_wait_s(unusable) == 0


def test_understands_keeps_the_fields_for_later_requests(server: FakeServer) -> None:
    async def use(one: ChatServer) -> Any:
        found = await one.understands(CHAT, {"messages": [{"role": "user", "content": "x"}]}, {"extra": 1})
        assert isinstance(found, Answer)
        return await ask(one)

    with_server(server, use)
    assert server.requests[0]["extra"] == 1


def test_api_key_is_sent_and_masked_where_the_server_echoes_it(server: FakeServer) -> None:
    secret = "sk-very-secret"
    server.faults["one"] = [fault(400, f"bad key {secret}" + "x" * 264 + secret)]
    with pytest.raises(RowError) as error:
        with_server(server, ask, api_key=secret)
    assert server.authorizations == [f"Bearer {secret}"]
    assert secret[:5] not in str(error.value)
