"""--split_turns: one row for each answer, so that a template that drops earlier thoughts drops none that is trained."""

import json
from pathlib import Path
from typing import Any

import pytest
from planned_server import END_ID, FakeServer, Workdir, completion, fault, prompt_ids, turns

from parts.chat_template import ChatTemplate

QWEN3 = Path(__file__).resolve().parents[1] / "data" / "chat_templates" / "qwen3.jinja"
SYSTEM = {"role": "system", "content": "Be kind."}
THREE = {"id": "a", "messages": [SYSTEM, *turns("one", "old", "two", "old", "three")]}
TEXTS = ("one", "two", "three")


def thinking(server: FakeServer) -> None:
    """Makes a server think before each of three answers."""
    server.faults = {text: [fault(200, completion(f"<think>\nabout {text}\n</think>\n\nre: {text}"))] for text in TEXTS}


def split_rows(work: Workdir) -> list[dict[str, Any]]:
    """Returns the output's rows in order."""
    return [json.loads(line) for line in work.output.read_text().splitlines()]


def marked(*messages: dict[str, str]) -> list[dict[str, Any]]:
    """Returns turns of which only the last is to be trained on."""
    return [{**turn, "train": turn is messages[-1]} for turn in messages]


def test_each_answer_has_a_row_with_its_thoughts_and_what_the_model_was_shown(
    work: Workdir, server: FakeServer
) -> None:
    thinking(server)
    work.write(THREE, {"id": "b", "prompt": "four"})
    assert work.run("--split_turns", "--thinking", "on", "--num_threads", "1") == 0
    rows = split_rows(work)
    shown = [SYSTEM, *turns("one", "re: one", "two", "re: two", "three")]
    for number, text in enumerate(TEXTS):
        answer = {"role": "assistant", "content": f"<think>\nabout {text}\n</think>\n\nre: {text}"}
        assert rows[number] == {
            "id": f"a#{number + 1}",
            "row": "a",
            "turn": number + 1,
            "turns": 3,
            "messages": marked(*shown[: 2 * number + 2], answer),
            "finish_reasons": ["stop"],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3},
            "model": "fake-model",
        }
        assert server.requests[number]["messages"] == shown[: 2 * number + 2]
    assert rows[3]["messages"] == marked(*turns("four", "re: four"))
    assert set(rows[3]) == set(rows[0]), "all rows have the same columns"
    report = work.report()
    assert (report["succeeded"], report["completion_tokens"]) == (2, 12)


def test_template_that_drops_earlier_thoughts_renders_those_of_every_split_row(
    work: Workdir, server: FakeServer
) -> None:
    (work.data.parent / "chat_template.jinja").write_text(QWEN3.read_text())
    template = ChatTemplate.load(str(work.data.parent))
    rendered = {}
    for flags in ([], ["--split_turns"]):
        thinking(server)
        work.write(THREE)
        assert work.run("--thinking", "on", *flags) == 0
        rendered[bool(flags)] = [template.render(row["messages"]) for row in split_rows(work)]
        work.output.unlink()
    (whole,) = rendered[False]
    assert [f"about {text}" in whole for text in TEXTS] == [False, False, True]
    assert all(f"about {text}" in row for text, row in zip(TEXTS, rendered[True], strict=True))


def test_split_rows_hold_the_ids_that_the_server_saw_and_said(work: Workdir, server: FakeServer) -> None:
    server.has_token_ids = True
    work.write(THREE)
    assert work.run("--split_turns", "--token_ids") == 0
    for number, (text, row) in enumerate(zip(TEXTS, split_rows(work), strict=True)):
        shown = [SYSTEM, *turns("one", "re: one", "two", "re: two", "three")][: 2 * number + 2]
        prompt, answer = prompt_ids(shown), [*f"re: {text}".encode(), END_ID]
        assert row["input_ids"] == prompt + answer
        assert row["labels"] == [-100] * len(prompt) + answer
        assert row["masked_answers"] == 0


def test_user_turns_of_the_model_are_counted_with_the_answer_to_them(work: Workdir, server: FakeServer) -> None:
    server.user_turns = ["two"]
    work.write({"id": "a", "prompt": "one"})
    assert work.run_mode("--data_path", str(work.data), "--split_turns") == 0
    spent = [tuple(row["usage"].values()) for row in split_rows(work)]
    assert spent == [(7, 3), (7 + 5 + 5, 3 + 2 + 2)], "the last row has the question that was never asked too"


@pytest.mark.parametrize("cut", ["keep", "mark", "drop"])
def test_split_rows_of_a_cut_answer(work: Workdir, server: FakeServer, cut: str) -> None:
    work.write(THREE)
    server.faults["two"] = [fault(200, completion("cut sh", "length"))]
    assert work.run("--split_turns", "--cut", cut) == 0
    rows = split_rows(work)
    assert [row["finish_reasons"] for row in rows] == [["stop"], ["length"], ["stop"]][: 1 if cut == "drop" else 3]
    assert [row.get("cut") for row in rows] == {"keep": [None] * 3, "mark": [False, True, False], "drop": [None]}[cut]


def test_split_rows_where_the_context_was_full_are_marked_in_the_last(work: Workdir, server: FakeServer) -> None:
    work.write(THREE)
    server.faults["three"] = [fault(400, "exceed_context_size_error")]
    assert work.run("--split_turns", "--cut", "mark") == 0
    rows = split_rows(work)
    assert [row["finish_reasons"] for row in rows] == [["stop"], ["stop", "context_full"]]
    assert [row["cut"] for row in rows] == [False, True]


def test_split_rows_in_sharegpt_are_marked_too(work: Workdir, server: FakeServer) -> None:
    work.write({"id": "a", "messages": turns("one", "old", "two")})
    assert work.run("--split_turns", "--format", "sharegpt") == 0
    last = split_rows(work)[-1]["conversations"]
    assert [turn["train"] for turn in last] == [False, False, False, True]
    assert last[-1] == {"from": "gpt", "value": "re: two", "train": True}


# ---- going on ----


def test_split_output_that_is_whole_is_not_asked_for_again(work: Workdir, server: FakeServer) -> None:
    work.write(THREE)
    assert work.run("--split_turns") == work.run("--split_turns") == 0
    assert len(server.requests) == 3
    assert work.report()["skipped_already_done"] == 1


@pytest.mark.parametrize("kept", ["one row", "two rows", "two rows and a half", "all but the line break"])
def test_resume_of_a_torn_split_conversation_makes_it_whole_again(
    work: Workdir, server: FakeServer, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    work.write({"id": "b", "prompt": "four"}, THREE)
    assert work.run("--split_turns", "--num_threads", "1") == 0
    before = work.output.read_bytes()
    lines = before.splitlines(keepends=True)
    torn = {"one row": lines[:2], "two rows": lines[:3], "two rows and a half": [*lines[:3], lines[3][:20]]}
    work.output.write_bytes(b"".join(torn.get(kept, [before[:-1]])))
    capsys.readouterr()
    assert work.run("--split_turns", "--num_threads", "1") == 0
    assert "last line of" in capsys.readouterr().err
    assert work.output.read_bytes() == before
    assert len(server.requests) == (4 if kept == "all but the line break" else 7)


def test_split_rows_and_whole_ones_do_not_mix(
    work: Workdir, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    work.write(THREE, {"id": "b", "prompt": "four"})
    assert work.run("--split_turns", "--limit", "1") == 0
    assert work.run() == 2
    assert "a row for each answer" in capsys.readouterr().err.splitlines()[-1]
