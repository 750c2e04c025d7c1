"""Servers whose context is too short: paid answers are kept, --max_tokens is fitted, or the run stops at once."""

import json
from typing import Any

import pytest
from planned_server import FakeServer, Fault, Workdir, fault, turns

OVERFLOWS: dict[str, Fault] = {
    "vLLM": fault(400, "This model's maximum context length is 64 tokens. However, you requested 70 tokens"),
    "vLLM, max_tokens": fault(
        400,
        "'max_tokens' or 'max_completion_tokens' is too large: 48. This model's maximum context length is 64 tokens",
    ),
    "vLLM, later": fault(400, "You passed 65 input tokens. However, the model's context length is only 64 tokens"),
    "vLLM, prompt": fault(400, "The decoder prompt (length 70) is longer than the maximum model length of 64."),
    "SGLang": fault(400, "The input (70 tokens) is longer than the model's context length (64 tokens)."),
    "SGLang, both": fault(400, "Requested token count exceeds the model's maximum context length of 64 tokens."),
    "SGLang, limit": fault(400, "Input length (70 tokens) exceeds the maximum allowed length (64 tokens)."),
    "TGI": fault(422, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 64. Given: 40"),
    "TGI, prompt": fault(422, "Input validation error: `inputs` must have less than 64 tokens. Given: 70"),
    "llama.cpp": fault(400, '{"error": {"code": 400, "type": "exceed_context_size_error", "n_ctx": 64}}'),
    "llama.cpp, text": fault(400, "request (70 tokens) exceeds the available context size (64 tokens)"),
    "LiteLLM": fault(400, "litellm.ContextWindowExceededError: OpenAIException"),
    "LiteLLM, mapped": fault(500, "litellm.InternalServerError: This model's maximum context length is 64 tokens"),
    "OpenAI": fault(400, '{"error": {"code": "context_length_exceeded"}}'),
    "Ollama": fault(400, '{"error": {"message": "the input length exceeds the context length"}}'),
}
TEXTS = [f"Tell me about river number {number} in five sentences." for number in range(8)]


def lists_context(server: FakeServer, **entry: Any) -> None:
    """Makes a server list its model with further fields."""
    server.models = fault(200, json.dumps({"data": [{"id": "fake-model", **entry}]}))


# ---- a later turn overflows ----


@pytest.mark.parametrize("overflow", OVERFLOWS.values(), ids=OVERFLOWS)
def test_answers_before_the_context_was_full_are_kept_and_marked_and_counted(
    work: Workdir, server: FakeServer, overflow: Fault
) -> None:
    work.write({"id": "o", "messages": [{"role": "user", "content": text} for text in TEXTS]})
    server.faults[TEXTS[3]] = [overflow]
    assert work.run("--max_retries", "0") == 0
    row = work.rows()["o"]
    assert row["messages"] == turns(*(text for asked in TEXTS[:3] for text in (asked, f"re: {asked}")))
    assert row["finish_reasons"] == ["stop"] * 3 + ["context_full"]
    assert row["usage"] == {"prompt_tokens": 21, "completion_tokens": 9}
    report = work.report()
    assert (report["succeeded"], report["context_full"], report["completion_tokens"]) == (1, 1, 9)
    assert len(server.requests) == 4, "nothing is asked of a server that has no room"


def test_conversation_that_the_context_ended_is_marked_with_cut_mark(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "messages": turns("one", "old", "two")}, {"id": "b", "prompt": "three"})
    server.faults["two"] = [OVERFLOWS["vLLM"]]
    assert work.run("--cut", "mark") == 0
    assert [work.rows()[name]["cut"] for name in "ab"] == [True, False]


def test_context_that_is_full_for_the_models_own_question_ends_the_conversation(
    work: Workdir, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_complete = server.complete
    monkeypatch.setattr(
        server, "complete", lambda request: OVERFLOWS["TGI"] if request["max_tokens"] > 1 else really_complete(request)
    )
    work.write({"id": "a", "prompt": "one"})
    assert work.run_mode("--data_path", str(work.data)) == 0
    assert work.rows()["a"]["finish_reasons"] == ["stop", "context_full"]


def test_other_refusal_of_a_later_turn_is_no_full_context(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "messages": turns("one", "old", "two")})
    server.faults["two"] = [fault(400, "the messages are too rude")]
    assert work.run() == 1
    assert work.report()["context_full"] == 0


# ---- --max_tokens ----


@pytest.mark.parametrize(
    ("listed", "fitted"), [(300, 150), (4096, 2048), (100_000, 2048), (None, 2048), ("many", 2048)]
)
@pytest.mark.parametrize("name", ["max_model_len", "context_length", "context_window"])
def test_default_max_tokens_fits_the_context_that_the_server_lists(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str], listed: Any, fitted: int, name: str
) -> None:
    lists_context(server, **{name: listed})
    work.write({"prompt": "one"})
    assert work.run() == 0
    assert server.requests[0]["max_tokens"] == work.report()["recipe"]["max_tokens"] == fitted
    assert ("half of the server's context of 300 tokens" in capsys.readouterr().err) == (fitted == 150)


def test_adapter_has_the_context_of_its_base(work: Workdir, server: FakeServer) -> None:
    listed = [{"id": "base", "max_model_len": 300}, {"id": "mine", "parent": "base", "max_model_len": None}]
    server.models = fault(200, json.dumps({"data": listed}))
    work.write({"prompt": "one"})
    assert work.run("--model", "mine") == 0
    assert server.requests[0]["max_tokens"] == 150


def test_user_turns_fit_the_context_too(work: Workdir, server: FakeServer) -> None:
    lists_context(server, max_model_len=300)
    server.user_turns = ["two"]
    work.write({"prompt": "one"})
    assert work.run_mode("--data_path", str(work.data), "--max_turns", "2") == 0
    assert server.completions[0]["max_tokens"] == 150


@pytest.mark.parametrize("wanted", ["300", "2048"])
def test_max_tokens_that_the_context_cannot_hold_is_one_line_before_any_request(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str], wanted: str
) -> None:
    lists_context(server, max_model_len=300)
    work.write({"prompt": "one"})
    assert work.run("--max_tokens", wanted) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"found --max_tokens {wanted} and a server whose context holds 300 tokens" in line
    assert "--max_tokens 150" in line
    assert not server.requests


@pytest.mark.parametrize("overflow", OVERFLOWS.values(), ids=OVERFLOWS)
def test_server_that_lists_no_context_and_has_no_room_at_all_stops_the_run_at_once(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str], overflow: Fault
) -> None:
    work.write(*({"prompt": f"p{index}"} for index in range(20)))
    server.faults = {text: [overflow] * 99 for text in ("Hi", *(f"p{index}" for index in range(20)))}
    assert work.run("--num_threads", "2") == 2
    assert "cannot hold --max_tokens 2048 after the shortest prompt" in capsys.readouterr().err.splitlines()[-1]
    assert len(server.requests) <= 4
    assert not work.failed.exists() or not work.failures()


def test_prompt_that_alone_overflows_fails_alone(work: Workdir, server: FakeServer) -> None:
    work.write(*({"id": f"r{index}", "prompt": f"p{index}"} for index in range(4)))
    server.faults = {"p0": [OVERFLOWS["vLLM"]], "p2": [OVERFLOWS["vLLM"]]}
    assert work.run("--num_threads", "1") == 1
    assert set(work.failures()) == {"r0", "r2"}
    assert server.asked()["Hi"] == 1, "whether there is room at all is asked once"
