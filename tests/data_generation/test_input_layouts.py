"""Inputs as people have them, through generate.py: turns spelled otherwise, logs and public datasets, tool turns."""

import json
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from planned_server import FakeServer, Workdir, turns

SYSTEM = {"role": "system", "content": "Be kind."}
PARTS = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a fruit."}]


def sent(server: FakeServer) -> list[Any]:
    """Returns the messages of all requests."""
    return [request["messages"] for request in server.requests]


# ---- turns spelled otherwise ----


@pytest.mark.parametrize("speaker", ["role", "from"])
@pytest.mark.parametrize("text", ["content", "value", "text"])
def test_turns_of_any_spelling_are_read_alike(work: Workdir, server: FakeServer, speaker: str, text: str) -> None:
    spoken = [
        {speaker: "system", text: "Be kind."},
        {speaker: "human", text: "Name a fruit."},
        {speaker: "gpt", text: "x"},
    ]
    work.write({"id": "a", "conversations": spoken}, {"id": "b", "messages": spoken})
    assert work.run() == 0
    assert sent(server) == [[SYSTEM, *turns("Name a fruit.")]] * 2


@pytest.mark.parametrize(
    "turn",
    [{"from": "human", "role": None, "value": "one"}, {"role": "user", "content": None, "value": "one"}],
    ids=str,
)
def test_name_without_a_value_is_passed_over(work: Workdir, server: FakeServer, turn: dict[str, Any]) -> None:
    work.write({"conversations": [turn]})
    assert work.run() == 0
    assert sent(server) == [turns("one")]


def test_turn_without_any_text_is_malformed(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    work.write({"prompt": "one"}, {"conversations": [{"from": "human", "words": "two"}]})
    assert work.run() == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"{work.data}:2: found the turn {{'from': 'human', 'words': 'two'}}, expected a text ('content', 'value'"
        in line
    )
    assert not server.requests


def test_input_of_which_nothing_can_be_used_is_an_error(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    work.write({"id": "a", "messages": []}, {"id": "b", "prompt": " "}, {"id": "b", "prompt": " "})
    for _ in range(2):
        assert work.run() == 2
        assert "none of the 3 rows gave a conversation" in capsys.readouterr().err.splitlines()[-1]
    work.write({"id": "a", "messages": []}, {"id": "c", "prompt": "one"})
    assert work.run() == 0


# ---- layouts ----


@pytest.mark.parametrize(
    "row",
    [
        {"conversation_id": "9", "model": "m", "conversation": turns("one", "x"), "turn": 1, "redacted": False},
        {
            "conversation_hash": "9",
            "conversation": [{**turn, "toxic": False, "country": None} for turn in turns("one", "x")],
        },
        turns("one", "x"),
        ["one", "x"],
        {
            "custom_id": "9",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": turns("one")},
        },
        {"request": {"model": "m", "messages": turns("one")}, "response": {"choices": []}},
        {"input": {"messages": turns("one")}, "preferred_output": turns("x"), "non_preferred_output": turns("y")},
        {"model": "m", "input": "one", "output": []},
        {
            "model": "m",
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "one"}]}, {"type": "reasoning"}],
        },
        {"prompt": turns("one"), "completion": turns("x")},
        {
            "messages": [
                {"role": "user", "content": "one", "name": "Ann"},
                {"role": "assistant", "refusal": "No.", "weight": 0},
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": {"value": "one", "annotations": []}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "o"}, {"type": "text", "text": "ne"}]}]},
    ],
    ids=lambda row: json.dumps(row)[:40],
)
def test_layout_that_people_have_is_read(work: Workdir, server: FakeServer, row: Any) -> None:
    work.write(row)
    assert work.run() == 0
    assert sent(server) == [turns("one")]
    (name,) = work.rows()
    assert (name == "9") == ("custom_id" in row)


def test_list_of_lists_of_turns_is_read(work: Workdir, server: FakeServer) -> None:
    pytest.importorskip("ijson")
    work.data = work.data.with_suffix(".json")
    work.data.write_text(json.dumps([turns("one", "x"), [SYSTEM, *turns("two")]]))
    assert work.run("--num_threads", "1") == 0
    assert sent(server) == [turns("one"), [SYSTEM, *turns("two")]]


def test_parquet_with_conversation_is_read(work: Workdir, server: FakeServer) -> None:
    work.data = work.data.with_suffix(".parquet")
    rows = [{"conversation_id": "c", "conversation": turns("one", "x"), "openai_moderation": [1.0]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), work.data)
    assert work.run() == 0
    assert sent(server) == [turns("one")]


def test_instructions_of_a_logged_response_are_its_system_turn(work: Workdir, server: FakeServer) -> None:
    work.write({"model": "m", "instructions": "Be kind.", "input": "one"})
    assert work.run() == 0
    assert sent(server) == [[SYSTEM, *turns("one")]]


@pytest.mark.parametrize(
    "row", [{"instruction": "Sum.", "input": "one", "output": "x"}, {"body": {"html": "x"}}], ids=str
)
def test_layout_that_is_none_of_these_is_malformed(work: Workdir, server: FakeServer, row: Any) -> None:
    work.write(row)
    assert work.run() == 2
    assert not server.requests


def test_row_with_an_image_is_left_out_and_stops_nothing(work: Workdir, server: FakeServer) -> None:
    image = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "http://x"}}]
    work.write({"id": "a", "messages": [{"role": "user", "content": image}]}, {"id": "b", "prompt": "one"})
    assert work.run() == 0
    assert set(work.rows()) == {"b"}
    (skipped,) = (json.loads(line) for line in work.output.with_name("answers.jsonl.skipped.jsonl").open())
    assert skipped["reason"] == f"{work.data}:1: found a content part of the type 'image_url', expected text"


# ---- tool turns ----

CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f"}}]}
RESULT = {"role": "tool", "content": "7", "tool_call_id": "c1"}
WITH_TOOLS = [
    SYSTEM,
    {"role": "user", "content": "one"},
    {**CALL, "content": None},
    RESULT,
    *({"role": "assistant", "content": "old"}, {"role": "user", "content": "two"}),
    {**CALL, "content": None},  # what it returned is not there
]


def test_tool_turns_are_left_out_and_counted_and_stop_nothing(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "messages": WITH_TOOLS}, {"id": "b", "prompt": "three"})
    assert work.run() == 0
    assert work.rows()["a"]["messages"] == [SYSTEM, *turns("one", "re: one", "two", "re: two")]
    assert work.report()["tool_turns_left_out"] == 3


def test_tool_turns_that_are_kept_are_sent_and_written(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "messages": WITH_TOOLS})
    assert work.run("--tool_turns", "keep") == 0
    begun = [SYSTEM, *turns("one"), CALL, RESULT]
    answered = [*begun, {"role": "assistant", "content": "re: 7"}, {"role": "user", "content": "two"}]
    assert sent(server) == [begun, answered], "the answer comes after what the tool returned"
    assert work.rows()["a"]["messages"] == [*answered, {"role": "assistant", "content": "re: two"}]
    assert work.report()["tool_turns_left_out"] == 1


def test_tool_turns_that_are_masked_are_marked_turn_by_turn(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "messages": WITH_TOOLS}, {"id": "b", "prompt": "three"})
    assert work.run("--tool_turns", "mask") == 0
    kept = work.rows()["a"]["messages"]
    assert [turn["train"] for turn in kept] == [False, False, False, False, True, False, True]
    assert [turn["train"] for turn in work.rows()["b"]["messages"]] == [False, True]
    assert "train" not in json.dumps(server.requests)


@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"from": "function_call", "value": '{"name": "f"}'},
        {"from": "gpt", "value": "<tool_call>f</tool_call>"},
    ],
    ids=["before tool_calls", "tool_calls", "ShareGPT's", "plain text"],
)
@pytest.mark.parametrize("speaker", ["tool", "function", "observation"])
def test_tool_calls_and_results_are_known_by_all_their_names(
    work: Workdir, server: FakeServer, call: dict[str, Any], speaker: str
) -> None:
    row = [*turns("one"), call, {"role": speaker, "content": "7"}, {"role": "assistant", "content": "old"}]
    work.write({"messages": row})
    assert work.run() == 0
    assert work.report()["tool_turns_left_out"] == 2
    work.output.unlink()
    assert work.run("--tool_turns", "keep") == 0
    (first, second) = sent(server)
    assert first == turns("one")
    assert [turn["role"] for turn in second] == ["user", "assistant", "tool"]
