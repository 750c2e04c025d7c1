"""The modes and what a row keeps: chat, the model playing both roles, from scratch, thinking, token ids, cut answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from planned_server import END_ID, FakeServer, Workdir, completion, fault, prompt_ids, turns

from parts.conversations import USER_MAX_TOKENS

SYSTEM = {"role": "system", "content": "Be kind."}


def with_reasoning(text: str, reasoning: str) -> Any:
    """Returns an answer whose reasoning the server reports apart."""
    body = json.loads(completion(text))
    body["choices"][0]["message"]["reasoning"] = reasoning
    return fault(200, json.dumps(body))


def reasoning_apart(reasoning: str, text: str | None, finish_reason: str, name: str = "reasoning") -> str:
    """Returns the body of an answer whose reasoning the server reports under a name of its own."""
    body = json.loads(completion(text, finish_reason))
    body["choices"][0]["message"][name] = reasoning
    return json.dumps(body)


# ---- chat ----


def test_chat_answers_every_user_turn_with_new_answers_as_history(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "messages": [SYSTEM, *turns("one", "old", "two", "older", "three", "oldest"), SYSTEM]})
    assert work.run() == 0
    history = [SYSTEM, *turns("one", "re: one", "two", "re: two", "three", "re: three")]
    assert [request["messages"] for request in server.requests] == [history[:2], history[:4], history[:6]]
    row = work.rows()["a"]
    assert row["messages"] == history
    assert row["finish_reasons"] == ["stop"] * 3
    assert row["usage"] == {"prompt_tokens": 21, "completion_tokens": 9}


def test_chat_needs_no_chat_template_and_no_completions(work: Workdir, server: FakeServer) -> None:
    server.has_completions = False
    work.write({"prompt": "one"})
    assert work.run() == 0


# ---- the model plays both roles ----


def test_default_answers_the_first_prompt_and_lets_the_model_go_on(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "messages": [SYSTEM, *turns("one", "old", "two")]})
    server.user_turns = ["And then?<|im_end|>\n<|im_start|>assistant\nNo", " Why? "]
    assert work.run_mode("--data_path", str(work.data)) == 0
    row = work.rows()["a"]
    assert row["messages"] == [
        SYSTEM,
        *turns("one", "re: one", "And then?", "re: And then?", "Why?", "re: Why?"),
    ]
    assert row["finish_reasons"] == ["stop"] * 3
    assert row["usage"] == {"prompt_tokens": 3 * 7 + 2 * 5, "completion_tokens": 3 * 3 + 2 * 2}
    assert [request["prompt"] for request in server.completions] == [
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\nre: one<|im_end|>\n<|im_start|>user\n",
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\nre: one<|im_end|>\n<|im_start|>user\nAnd then?<|im_end|>\n"
        "<|im_start|>assistant\nre: And then?<|im_end|>\n<|im_start|>user\n",
    ]
    assert all(request["stop"] == ["<|im_end|>"] for request in server.completions)
    assert all(request["skip_special_tokens"] is False for request in server.completions)


@pytest.mark.parametrize(
    "user_turn", ["", " <|im_end|>", "one", "x" * 9], ids=["nothing", "only the end", "the same again", "too long"]
)
def test_conversation_ends_where_the_model_has_nothing_to_ask(
    work: Workdir, server: FakeServer, user_turn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if user_turn == "x" * 9:
        reply = {"choices": [{"text": user_turn, "finish_reason": "length"}]}
        monkeypatch.setattr(server, "complete", lambda request: fault(200, json.dumps(reply)))
    server.user_turns = [user_turn]
    work.write({"id": "a", "prompt": "one"})
    assert work.run_mode("--data_path", str(work.data)) == 0
    assert work.rows()["a"]["messages"] == turns("one", "re: one")


def test_max_turns_bounds_the_answers(work: Workdir, server: FakeServer) -> None:
    server.user_turns = ["two", "three"]
    work.write({"id": "a", "prompt": "one"})
    assert work.run_mode("--data_path", str(work.data), "--max_turns", "1") == 0
    assert work.rows()["a"]["messages"] == turns("one", "re: one")
    assert not server.completions


def test_user_turns_have_their_own_temperature_and_length(work: Workdir, server: FakeServer) -> None:
    server.user_turns = ["two"]
    work.write({"id": "a", "prompt": "one"})
    flags = ["--user_temperature", "0.7", "--temperature", "0.1", "--max_tokens", "99"]
    assert work.run_mode("--data_path", str(work.data), *flags) == 0
    assert (server.completions[0]["temperature"], server.completions[0]["max_tokens"]) == (0.7, USER_MAX_TOKENS)
    assert {request["temperature"] for request in server.requests} == {0.1}
    seeds = [request["seed"] for request in server.requests + server.completions]
    assert len(set(seeds)) == len(seeds), "each request of a row has its own seed"


@pytest.mark.parametrize("rejected", [{"skip_special_tokens"}, {"skip_special_tokens", "stop"}])
def test_server_that_rejects_further_fields_is_asked_without_them(
    work: Workdir, server: FakeServer, rejected: set[str]
) -> None:
    server.rejected_fields, server.user_turns = rejected, ["two<|im_end|>"]
    work.write({"id": "a", "prompt": "one"})
    assert work.run_mode("--data_path", str(work.data), "--max_turns", "2") == 0
    assert work.rows()["a"]["messages"] == turns("one", "re: one", "two", "re: two")


def test_server_without_completions_is_one_line(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.has_completions = False
    work.write({"prompt": "one"})
    assert work.run_mode("--data_path", str(work.data)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "/v1/completions: found HTTP 404" in line
    assert "use --chat" in line
    assert not server.requests


def test_chat_template_is_looked_for_where_the_server_has_its_model(work: Workdir, server: FakeServer) -> None:
    server.models = fault(200, json.dumps({"data": [{"id": "m", "root": work.write_template()}]}))
    work.write({"id": "a", "prompt": "one"})
    assert work.run_without_chat() == 0
    assert set(work.rows()) == {"a"}


def test_missing_chat_template_is_one_line(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    work.write({"id": "a", "prompt": "one"})
    assert work.run_without_chat("--tokenizer", str(tmp_path)) == 2
    assert "--tokenizer" in capsys.readouterr().err.splitlines()[-1]


# ---- from scratch ----


def test_from_scratch_lets_the_model_write_the_first_prompt(work: Workdir, server: FakeServer) -> None:
    server.user_turns = ["Tell me", "More"]
    assert work.run_mode("--from_scratch", "1", "--max_turns", "2") == 0
    (row,) = work.rows().values()
    assert row["messages"] == turns("Tell me", "re: Tell me", "More", "re: More")
    assert server.completions[0]["prompt"] == "<|im_start|>user\n"


def test_from_scratch_leaves_out_prompts_that_it_has(work: Workdir, server: FakeServer) -> None:
    server.user_turns = ["Tell me", "tell  ME", "", "Else"]
    flags = ["--max_turns", "1", "--num_threads", "1"]
    assert work.run_mode("--from_scratch", "4", *flags) == 0
    prompts = [row["messages"][0]["content"] for row in work.rows().values()]
    assert prompts == ["Tell me", "Else"]
    report = work.report()
    assert (report["succeeded"], report["skipped_duplicates"], report["skipped_unusable"]) == (2, 1, 1)

    asked = len(server.completions)
    server.user_turns = ["TELL ME", "New"]
    assert work.run_mode("--from_scratch", "6", *flags) == 0
    assert len(server.completions) == asked + 2, "what was left out is not asked for again"
    prompts = [row["messages"][0]["content"] for row in work.rows().values()]
    assert prompts == ["Tell me", "Else", "New"], "prompts of an earlier run count too"
    report = work.report()
    assert (report["skipped_already_done"], report["skipped_left_out_before"]) == (2, 2)


# ---- thinking ----


@pytest.mark.parametrize(("thinking", "enabled"), [("on", True), ("strip", True), ("off", False)])
def test_thinking_is_told_to_the_chat_template(work: Workdir, server: FakeServer, thinking: str, enabled: bool) -> None:
    work.write({"prompt": "one"})
    assert work.run("--thinking", thinking) == 0
    assert server.requests[0]["chat_template_kwargs"] == {"enable_thinking": enabled}


def test_without_thinking_the_chat_template_is_told_nothing(work: Workdir, server: FakeServer) -> None:
    work.write({"prompt": "one"})
    assert work.run() == 0
    assert "chat_template_kwargs" not in server.requests[0]


@pytest.mark.parametrize(
    "answer",
    [
        with_reasoning("\n\nSo.", "Hm.\n"),
        fault(200, completion("<think>\nHm.\n</think>\n\nSo.")),
        fault(200, completion("Hm.\n</think>\n\nSo.")),
    ],
    ids=["apart", "in the text", "opened by the prompt"],
)
@pytest.mark.parametrize(("thinking", "kept"), [("on", "<think>\nHm.\n</think>\n\nSo."), ("strip", "So.")])
def test_reasoning_is_kept_or_stripped_and_never_shown_to_the_model_again(
    work: Workdir, server: FakeServer, answer: Any, thinking: str, kept: str
) -> None:
    server.faults["one"] = [answer]
    work.write({"id": "a", "messages": turns("one", "old", "two")})
    assert work.run("--thinking", thinking) == 0
    assert work.rows()["a"]["messages"] == turns("one", kept, "two", "re: two")
    assert server.requests[1]["messages"] == turns("one", "So.", "two")


def test_answer_cut_while_reasoning_is_a_failure(work: Workdir, server: FakeServer) -> None:
    server.faults["one"] = [fault(200, completion("<think>\nHm", "length"))]
    work.write({"id": "a", "prompt": "one"})
    assert work.run("--thinking", "strip") == 1
    assert "larger --max_tokens" in work.failures()["a"]


CUT_THOUGHTS = {
    "in the text": completion("<think>First I count the apples, then", "length"),
    "opened by the prompt": completion("First I count the apples, then", "length"),
    "apart": reasoning_apart("First I count the apples, then", None, "length"),
    "apart, by another name": reasoning_apart("First I count", "", "length", name="reasoning_content"),
    "ended, and nothing said": completion("<think>First I count.</think>\n", "length"),
}


@pytest.mark.parametrize("thinking", ["strip", "on"])
@pytest.mark.parametrize("body", CUT_THOUGHTS.values(), ids=CUT_THOUGHTS)
def test_thoughts_that_the_length_limit_cut_are_no_answer(
    work: Workdir, server: FakeServer, body: str, thinking: str
) -> None:
    work.write({"id": "a", "messages": turns("one", "old", "two", "old", "three")}, {"id": "b", "prompt": "four"})
    for prompt in ("two", "four"):
        server.faults[prompt] = [fault(200, body)]
    assert work.run("--thinking", thinking) == 1
    assert work.rows()["a"]["messages"] == turns("one", "re: one"), "what was answered before is kept"
    assert work.rows()["a"]["finish_reasons"] == ["stop", "cut_reasoning"]
    assert "larger --max_tokens" in work.failures()["b"]
    assert server.asked() == {"one": 1, "two": 1, "four": 1}, "thoughts are not sent back as history"
    report = work.report()
    assert (report["cut_answers"], report["cut_reasoning"], report["failed"]) == (2, 2, 1)
    assert work.run("--thinking", thinking, "--retry_failed", "--max_tokens", "4096") == 0
    assert set(work.rows()) == {"a", "b"}


def test_thoughts_that_were_cut_are_left_out_with_the_other_cut_answers(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "messages": turns("one", "old", "two")}, {"id": "b", "prompt": "three"})
    for prompt in ("two", "three"):
        server.faults[prompt] = [fault(200, CUT_THOUGHTS["in the text"])]
    assert work.run("--thinking", "strip", "--cut", "drop") == 0
    assert work.rows()["a"]["finish_reasons"] == ["stop"]
    report = work.report()
    assert (report["skipped_cut"], report["cut_answers"], report["cut_reasoning"]) == (1, 2, 2)


@pytest.mark.parametrize("name", ["in the text", "apart", "apart, by another name"])
def test_thoughts_that_were_cut_are_no_answer_whatever_was_asked(work: Workdir, server: FakeServer, name: str) -> None:
    work.write({"id": "a", "messages": turns("one", "old", "two")})
    server.faults["two"] = [fault(200, CUT_THOUGHTS[name])]
    assert work.run("--cut", "mark") == 0
    row = work.rows()["a"]
    assert (row["messages"], row["cut"]) == (turns("one", "re: one"), True)


def test_answer_that_was_cut_after_its_thoughts_is_an_answer(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two"})
    server.faults["one"] = [fault(200, completion("Hm.</think>So", "length"))]
    server.faults["two"] = [fault(200, reasoning_apart("Hm.", "So", "length"))]
    assert work.run("--thinking", "on") == 0
    for row, prompt in ((work.rows()["a"], "one"), (work.rows()["b"], "two")):
        assert row["messages"] == turns(prompt, "<think>\nHm.\n</think>\n\nSo")
        assert row["finish_reasons"] == ["length"]
    report = work.report()
    assert (report["cut_answers"], report["cut_reasoning"]) == (2, 0)


@pytest.mark.parametrize(
    "body",
    [completion("<think>Hm."), completion("<think>Hm.</think>"), reasoning_apart("Hm.", "", "stop")],
    ids=["in the text", "ended", "apart"],
)
def test_thoughts_without_an_answer_are_a_failure(work: Workdir, server: FakeServer, body: str) -> None:
    work.write({"id": "a", "prompt": "one"})
    server.faults["one"] = [fault(200, body)]
    assert work.run("--thinking", "strip") == 1
    assert "thoughts without an answer" in work.failures()["a"]


# ---- token ids ----


def test_token_ids_hold_what_the_server_saw_and_said(work: Workdir, server: FakeServer) -> None:
    server.has_token_ids = True
    work.write({"id": "a", "messages": [SYSTEM, *turns("one", "old", "two")]})
    assert work.run("--token_ids") == 0
    row = work.rows()["a"]
    first = prompt_ids([SYSTEM, *turns("one")])
    second = prompt_ids([SYSTEM, *turns("one", "re: one", "two")])
    answers = [[*b"re: one", END_ID], [*b"re: two", END_ID]]
    assert row["input_ids"] == second + answers[1]
    assert row["attention_mask"] == [1] * len(row["input_ids"])
    between = len(second) - len(first) - len(answers[0])
    assert row["labels"] == [-100] * len(first) + answers[0] + [-100] * between + answers[1]
    assert row["masked_answers"] == 0
    assert row["messages"] == [SYSTEM, *turns("one", "re: one", "two", "re: two")]


def test_token_ids_mask_answers_that_the_template_renders_differently_later(work: Workdir, server: FakeServer) -> None:
    server.has_token_ids = True
    server.faults["one"] = [
        fault(
            200,
            json.dumps(
                json.loads(completion("<think>Hm.</think>So."))
                | {
                    "prompt_token_ids": prompt_ids(turns("one")),
                    "choices": [
                        {
                            "message": {"content": "<think>Hm.</think>So."},
                            "finish_reason": "stop",
                            "token_ids": [*b"<think>Hm.</think>So.", END_ID],
                        }
                    ],
                }
            ),
        )
    ]
    work.write({"id": "a", "messages": turns("one", "old", "two")})
    assert work.run("--token_ids", "--thinking", "on") == 0
    row = work.rows()["a"]
    prompt = prompt_ids(turns("one", "So.", "two"))
    assert row["input_ids"] == [*prompt, *b"re: two", END_ID]
    assert row["labels"] == [-100] * len(prompt) + [*b"re: two", END_ID]
    assert row["masked_answers"] == 1


def test_token_ids_from_a_server_without_them_are_text_with_a_warning(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    work.write({"id": "a", "prompt": "one"})
    assert work.run("--token_ids") == 0
    assert "warning: a server does not return token ids" in capsys.readouterr().err
    assert "input_ids" not in work.rows()["a"]
    assert "return_token_ids" not in server.requests[0]
    assert work.report()["recipe"]["token_ids"] is False


# ---- layout and cut answers ----


def test_format_sharegpt_writes_its_speakers(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "messages": [SYSTEM, *turns("one")]})
    assert work.run("--format", "sharegpt") == 0
    row = work.rows()["a"]
    assert "messages" not in row
    assert row["conversations"] == [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "one"},
        {"from": "gpt", "value": "re: one"},
    ]


def test_layouts_do_not_mix_in_one_output(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    work.write({"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two"})
    assert work.run("--limit", "1") == 0
    before = work.output.read_bytes()
    for flags in (["--format", "sharegpt"], ["--token_ids"]):
        server.has_token_ids = True
        assert work.run(*flags) == 2
        assert str(work.output) in capsys.readouterr().err.splitlines()[-1]
    assert work.output.read_bytes() == before


@pytest.mark.parametrize("cut", ["keep", "mark"])
def test_cut_answer_is_kept_or_marked_and_counted(work: Workdir, server: FakeServer, cut: str) -> None:
    work.write({"id": "a", "messages": turns("one", "old", "two")}, {"id": "b", "prompt": "three"})
    server.faults["one"] = [fault(200, completion("cut sh", "length"))]
    assert work.run("--cut", cut) == 0
    rows = work.rows()
    assert rows["a"]["finish_reasons"] == ["length", "stop"]
    assert rows["a"]["messages"] == turns("one", "cut sh", "two", "re: two")
    assert [rows[name].get("cut") for name in "ab"] == ([True, False] if cut == "mark" else [None, None])
    assert work.report()["cut_answers"] == 1


def test_cut_drop_ends_the_conversation_before_the_cut_answer(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "messages": turns("one", "old", "two", "older", "three")}, {"id": "b", "prompt": "four"})
    for prompt in ("two", "four"):
        server.faults[prompt] = [fault(200, completion("cut sh", "length"))]
    assert work.run("--cut", "drop") == 0
    assert work.rows()["a"]["messages"] == turns("one", "re: one")
    assert work.rows()["a"]["finish_reasons"] == ["stop"]
    report = work.report()
    assert (report["succeeded"], report["skipped_cut"], report["cut_answers"]) == (1, 1, 2)
    assert server.asked() == {"one": 1, "two": 1, "four": 1}
    assert work.run("--cut", "drop") == 0
    assert len(server.requests) == 3, "a row that was left out is not asked for again"
    assert work.report()["skipped_left_out_before"] == 1
