"""data_generation/clean.py: what is repaired, what is left out, and that each thing is counted."""

import json
from pathlib import Path
from typing import Any

import pytest
from planned_server import turns

import clean
from parts.chat_template import ChatTemplate

TEMPLATES = Path(__file__).resolve().parents[1] / "data" / "chat_templates"
SYSTEM = {"role": "system", "content": "Be kind."}
LATE = {"role": "system", "content": "Be brief."}
USER, ANSWER = turns("one", "x")


class Files:
    """Runs the command on files in a directory."""

    def __init__(self, directory: Path) -> None:
        self.input, self.output = directory / "in.jsonl", directory / "out.jsonl"
        self.failed = directory / "out.jsonl.failed.jsonl"

    def write(self, *rows: Any) -> None:
        self.input.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, *flags: str) -> int:
        return clean.main(["--data_path", str(self.input), "--output_path", str(self.output), *flags])

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(Path(f"{self.output}.report.json").read_text())
        assert report["written"] + sum(report["left_out"].values()) == report["rows"]
        return report


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


REPAIRS: dict[str, tuple[list[Any], list[Any], dict[str, int]]] = {
    "nothing": ([SYSTEM, *turns("one", "x", "two", "y")], [SYSTEM, *turns("one", "x", "two", "y")], {}),
    "two user turns": ([USER, USER, ANSWER], turns("one\n\none", "x"), {"user turns joined": 1}),
    "user turn at the end": (
        [*turns("one", "x", "two")],
        turns("one", "x"),
        {"user turns without an answer left out": 1},
    ),
    "late system turn": (
        [*turns("one", "x"), LATE, *turns("two", "y")],
        turns("one", "x", "Be brief.\n\ntwo", "y"),
        {"system turns joined to a user turn": 1},
    ),
    "system turn before the answer": (
        [USER, LATE, ANSWER],
        turns("one\n\nBe brief.", "x"),
        {"system turns joined to a user turn": 1},
    ),
    "system turn at the end": (
        [*turns("one", "x"), LATE],
        turns("one", "x"),
        {"system turns joined to a user turn": 1, "system turns without a user turn after them left out": 1},
    ),
    "two system turns": (
        [SYSTEM, LATE, USER, ANSWER],
        [{"role": "system", "content": "Be kind.\n\nBe brief."}, USER, ANSWER],
        {"system turns joined": 1},
    ),
    "blank system turn": (
        [{**SYSTEM, "content": " "}, USER, ANSWER],
        [USER, ANSWER],
        {"blank system turns left out": 1},
    ),
    "blank user turn": ([{**USER, "content": None}, USER, ANSWER], [USER, ANSWER], {"blank user turns left out": 1}),
    "null answer": (
        [*turns("one", "x", "two"), {**ANSWER, "content": None}, *turns("three", "z")],
        turns("one", "x"),
        {"conversations ended before a blank answer": 1, "user turns without an answer left out": 1},
    ),
    "answer first": ([ANSWER, USER, ANSWER], [USER, ANSWER], {"answers before any user turn left out": 1}),
    "two answers": (
        [USER, ANSWER, {**ANSWER, "content": "y"}, USER, ANSWER],
        [USER, ANSWER],
        {"conversations ended before a second answer in a row": 1},
    ),
    "tool turns": (
        [USER, ANSWER, USER, {**ANSWER, "tool_calls": [{"id": "c"}]}, {"role": "tool", "content": "7"}, ANSWER],
        [USER, ANSWER],
        {"conversations ended before a tool turn": 1, "user turns without an answer left out": 1},
    ),
    "cut thoughts": (
        [USER, ANSWER, USER, {**ANSWER, "content": "<think>Hm"}],
        [USER, ANSWER],
        {"conversations ended before thoughts without an answer": 1, "user turns without an answer left out": 1},
    ),
    "other names": (
        [{"from": "human", "text": "one"}, {"from": "gpt", "value": "x"}],
        [USER, ANSWER],
        {"turns spelled anew": 1},
    ),
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": "one"}]}, ANSWER],
        [USER, ANSWER],
        {"turns spelled anew": 1},
    ),
}


@pytest.mark.parametrize(("before", "after", "repairs"), REPAIRS.values(), ids=REPAIRS)
def test_conversation_is_repaired_and_each_repair_is_counted(
    files: Files, before: list[Any], after: list[Any], repairs: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    files.write({"id": "a", "messages": before})
    assert files.run() == 0
    assert files.rows() == [{"id": "a", "messages": after}]
    assert files.report()["repairs"] == repairs
    assert files.report()["repaired"] == bool(repairs)
    printed = capsys.readouterr().out
    assert all(f"  {count} {what}\n" in printed for what, count in repairs.items())


def test_every_row_renders_afterwards_and_a_second_pass_does_nothing(files: Files) -> None:
    files.write(*({"messages": before} for before, _, _ in REPAIRS.values()))
    assert files.run("--system", "join") == 0
    for name in ("gemma", "mistral", "llama3", "qwen3"):
        template = ChatTemplate.load(str(TEMPLATES / f"{name}.jinja"))
        template.special_tokens |= {"bos_token": "<s>", "eos_token": "</s>"}
        assert all(template.render(row["messages"]) for row in files.rows())
    first = files.output.read_bytes()
    files.input.write_bytes(first)
    assert files.run("--system", "join", "--overwrite") == 0
    assert files.output.read_bytes() == first
    assert files.report()["repairs"] == {}


@pytest.mark.parametrize(
    ("system", "after"),
    [("keep", [SYSTEM, USER, ANSWER]), ("join", turns("Be kind.\n\none", "x")), ("drop", [USER, ANSWER])],
)
def test_system_turns_are_kept_joined_or_dropped(files: Files, system: str, after: list[Any]) -> None:
    files.write({"id": "a", "messages": [SYSTEM, USER, ANSWER]})
    assert files.run("--system", system) == 0
    assert files.rows()[0]["messages"] == after


def test_rows_of_which_nothing_is_left_are_counted_and_written_down(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    bad: dict[str, Any] = {
        "empty": {"messages": []},
        "only a user": {"messages": [USER]},
        "an image": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
        "half a pair": {"messages": [{"role": "user", "content": "\ud83d"}, ANSWER]},
        "no turns": {"text": "x"},
        "marks": {"messages": [USER, {**ANSWER, "train": True}]},
    }
    files.write(*({"id": name, **row} for name, row in bad.items()), {"id": "good", "messages": [USER, ANSWER]})
    with files.input.open("a") as lines:
        lines.write("{broken\n")
    assert files.run() == 1
    assert [row["id"] for row in files.rows()] == ["good"]
    reasons = {row["id"]: row["reason"] for row in map(json.loads, files.failed.read_text().splitlines())}
    assert list(reasons) == [*bad, f"{files.input}:8"]
    assert all("found" in reason for reason in reasons.values())
    assert files.report()["left_out"] == {"no answer is left": 2, "not text": 1, "unreadable": 4}
    printed = capsys.readouterr()
    assert "1 written + 2 no answer is left + 1 not text + 4 unreadable = 8 rows; 0 repaired" in printed.out
    assert "7 rows were left out" in printed.err


def test_file_of_which_nothing_can_be_used_is_one_line_and_writes_nothing(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    files.write({"messages": []})
    assert files.run() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected rows that can be used" in line
    assert not files.output.exists() and not files.failed.exists()


def test_output_in_sharegpt_and_ids_of_rows_without_one(files: Files) -> None:
    files.write({"messages": [SYSTEM, USER, ANSWER]}, [USER, {**ANSWER, "content": "y"}])
    assert files.run("--format", "sharegpt") == 0
    first, second = files.rows()
    assert first["conversations"][0] == {"from": "system", "value": "Be kind."}
    assert second["conversations"] == [{"from": "human", "value": "one"}, {"from": "gpt", "value": "y"}]
    assert len(first["id"]) == 16 and first["id"] != second["id"]
    assert files.report()["repairs"] == {"turns spelled anew": 2}


def test_output_that_is_there_is_not_replaced(files: Files) -> None:
    files.write({"messages": [USER, ANSWER]})
    files.output.write_text("precious")
    assert files.run() == 2
    assert files.output.read_text() == "precious"
