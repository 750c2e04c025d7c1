"""What a load measures, and what it says of servers that answer wrongly."""

from __future__ import annotations

import builtins
import threading

import pytest
from fake_streaming import FAULTS, streaming

from axolotl_medusa.live.load import Answer, Load, run_load
from axolotl_medusa.live.server import ServerError

CHAT = [{"role": "user", "content": "Hello"}]


def test_answers_are_counted_and_timed_in_the_order_of_the_questions():
    questions = [CHAT, "Once upon", [{"role": "user", "content": "Bye"}]]
    with streaming(tokens=4, token_s=0.01) as server:
        found = run_load(server.url, "fake", questions, 2, 3)
    assert [answer.tokens for answer in found.answers] == [3, 3, 3]
    assert [answer.text for answer in found.answers] == ["H0 H1 H2 ", "O0 O1 O2 ", "B0 B1 B2 "]
    for answer in found.answers:
        assert answer.first_s >= 0.01 and answer.seconds >= answer.first_s + 0.02
    assert found.seconds >= 0.06 and found.tokens_per_s == pytest.approx(9 / found.seconds)
    paths = dict(server.requests)
    assert set(paths) == {"/v1/chat/completions", "/v1/completions"}
    for body in paths.values():
        assert body["temperature"] == 0 and body["max_tokens"] == 3 and body["seed"] == 0 and body["stream"]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_as_many_requests_are_in_flight_as_asked_for(concurrency):
    with streaming() as server:
        server.together = threading.Barrier(concurrency)  # passes only if that many come at a time
        run_load(server.url, "fake", [CHAT] * 6, concurrency, 4)
    assert server.most_in_flight == concurrency and len(server.requests) == 6


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_answer_ends_the_load_in_one_line(fault):
    with streaming(fault=fault) as server, pytest.raises(ServerError) as error:
        run_load(server.url, "fake", [CHAT] * 4, 2, 4)
    words = {
        "status": "status 503: overloaded",
        "error": "the engine died",
        "garbage": "not JSON",
        "cut": "",
        "no usage": "without counting its tokens",
    }
    assert server.url in str(error.value) and words[fault] in str(error.value) and "\n" not in str(error.value)


def test_server_that_is_not_there_is_one_line():
    with pytest.raises(ServerError, match="stopped answering"):
        run_load("http://127.0.0.1:9", "fake", [CHAT], 1, 1)


def test_medians_are_over_requests():
    answers = (Answer("", 3, 0.1, 0.5), Answer("", 1, 0.3, 0.3), Answer("", 5, 0.2, 0.6))
    found = Load(2, answers, 3.0)
    assert found.tokens_per_s == 3.0 and found.first_token_s == 0.2
    assert found.per_token_s == pytest.approx(0.15)
    assert Load(1, answers[1:2], 1.0).per_token_s is None


def test_missing_aiohttp_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name == "aiohttp":
            raise ImportError("No module named aiohttp")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RuntimeError, match="pip install aiohttp"):
        run_load("http://127.0.0.1:9", "fake", [CHAT], 1, 1)
