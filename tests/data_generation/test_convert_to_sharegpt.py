"""data_generation/convert_to_sharegpt.py: what becomes of every text."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

import convert_to_sharegpt
from parts.chat_template import ChatTemplate

TEMPLATE = Path(__file__).resolve().parents[1] / "data" / "chat_templates" / "chatml_default_system.jinja"


def chatml(*turns: str) -> str:
    return "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns)


ONE_ROUND = chatml("user\nHi", "assistant\nHello\n\nyou")
CUT = ONE_ROUND + "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\nOnce up"


class Files:
    """Runs the command on files in a directory, with the tokenizer in another."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.input, self.output = directory, directory / "raw.jsonl", directory / "out.jsonl"
        self.failed = directory / "out.jsonl.failed.jsonl"
        self.tokenizer = directory / "tokenizer"
        self.tokenizer.mkdir()
        (self.tokenizer / "chat_template.jinja").write_text(TEMPLATE.read_text())
        (self.tokenizer / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
        )

    def write(self, *rows: Any) -> None:
        self.input.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, *flags: str) -> int:
        paths = ["--data_path", self.input, "--output_path", self.output, "--tokenizer", self.tokenizer]
        return convert_to_sharegpt.main([str(word) for word in (*paths, *flags)])

    def rows(self, path: Path | None = None) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (path or self.output).read_text().splitlines()]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def sharegpt(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def test_convert_of_rendered_conversations_gives_them_back(files: Files) -> None:
    chats = [
        [
            *([{"role": "system", "content": "Be kind."}] if number % 2 else []),
            *({"role": ("user", "assistant")[turn % 2], "content": f"{number}\n turn {turn}"} for turn in range(4)),
        ]
        for number in range(20)
    ]
    template = ChatTemplate.load(str(files.tokenizer))
    files.write(*({"id": number, "text": template.render(chat)} for number, chat in enumerate(chats)))
    assert files.run("--format", "messages") == 0
    assert files.rows() == [{"id": str(number), "messages": chat} for number, chat in enumerate(chats)]
    assert not files.failed.exists()


@pytest.mark.parametrize("layout", ["jsonl", "bare jsonl", "json", "bare json", "gz"])
def test_convert_of_each_layout_of_the_input_gives_the_same(files: Files, layout: str) -> None:
    texts = [ONE_ROUND, chatml("user\nÄ", "assistant\nB")]
    rows: list[Any] = texts if "bare" in layout else [{"text": text} for text in texts]
    files.write(*rows)
    if layout.endswith(" json") or layout == "json":
        pytest.importorskip("ijson")
        files.input = files.directory / "raw.json"
        files.input.write_text(json.dumps(rows, indent=1))
    if layout == "gz":
        packed = files.directory / "raw.jsonl.gz"
        packed.write_bytes(gzip.compress(files.input.read_bytes()))
        files.input = packed
    assert files.run() == 0
    rows = files.rows()
    assert [row["conversations"] for row in rows] == [sharegpt("Hi", "Hello\n\nyou"), sharegpt("Ä", "B")]
    assert [len(row["id"]) for row in rows] == [16, 16]
    assert rows[0]["id"] != rows[1]["id"]


@pytest.mark.parametrize(
    ("cut", "row"),
    [
        ("keep", {"conversations": sharegpt("Hi", "Hello\n\nyou", "More", "Once up")}),
        ("mark", {"conversations": sharegpt("Hi", "Hello\n\nyou", "More", "Once up"), "cut": True}),
        ("drop", {"conversations": sharegpt("Hi", "Hello\n\nyou")}),
    ],
)
def test_convert_of_a_cut_answer_does_as_told(
    files: Files, cut: str, row: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    files.write({"id": "a", "text": CUT}, {"id": "b", "text": ONE_ROUND.rstrip()})
    assert files.run("--cut", cut) == 0
    mark = {"cut": False} if cut == "mark" else {}
    assert files.rows() == [{"id": "a", **row}, {"id": "b", "conversations": sharegpt("Hi", "Hello\n\nyou"), **mark}]
    assert "2 converted + 0 dropped + 0 unreadable = 2 rows; 1 with a cut answer, 0 used" in capsys.readouterr().out


@pytest.mark.parametrize(
    "tail",
    [
        "<|im_start|>user\nMore",  # cut user turn
        chatml("user\nMore"),  # user turn without an answer
        chatml("user\nMore") + "<|im_start|>assistant\n",
        chatml("user\nMore", "assistant\n  "),  # empty answer, and all after it
        chatml("user\nMore", "assistant\n", "user\nC", "assistant\nD"),
        chatml("user\n \n", "assistant\nWhat?"),  # empty user turn
    ],
)
@pytest.mark.parametrize("cut", ["mark", "drop"])
def test_convert_ends_with_the_last_round_that_is_whole(files: Files, tail: str, cut: str) -> None:
    files.write({"id": "a", "text": ONE_ROUND + tail})
    assert files.run("--cut", cut) == 0
    (row,) = files.rows()
    assert row["conversations"] == sharegpt("Hi", "Hello\n\nyou")
    assert row.get("cut", False) is False


def test_convert_uses_a_text_up_to_what_is_out_of_place_and_counts_it(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    files.write({"id": "a", "text": ONE_ROUND + chatml("assistant\nand on", "user\nx", "assistant\ny")})
    assert files.run() == 0
    assert files.rows() == [{"id": "a", "conversations": sharegpt("Hi", "Hello\n\nyou")}]
    assert "1 used up to a turn out of place" in capsys.readouterr().out


def test_convert_of_unreadable_rows_writes_why_and_counts_all(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {
        "no JSON": '{"text": ',
        "no text": '{"id": "n", "prompt": "x"}',
        "a number": "3",
        "another format": json.dumps({"id": "f", "text": "USER: Hi ASSISTANT: x"}),
        "no answer": json.dumps({"id": "u", "text": chatml("user\nHi")}),
        "no turns": json.dumps({"id": "e", "text": ""}),
        "only a system turn": json.dumps({"id": "s", "text": "<|im_start|>system\nBe ki"}),
        "half a pair": json.dumps({"id": "p", "text": chatml("user\nHi", "assistant\n\ud83d")}),
        "a bad id": json.dumps({"id": [1], "text": ONE_ROUND}),
    }
    dropped = json.dumps({"id": "d", "text": chatml("user\nHi") + "<|im_start|>assistant\nOnce"})
    files.input.write_text("\n".join([*bad.values(), "", dropped, json.dumps({"text": ONE_ROUND})]))
    assert files.run("--cut", "drop") == 1
    captured = capsys.readouterr()
    assert f"1 converted + 1 dropped + {len(bad)} unreadable = {len(bad) + 2} rows; 1 with" in captured.out
    assert captured.err == f"convert_to_sharegpt.py: {len(bad)} rows could not be read; {files.failed} says why\n"
    failed = files.rows(files.failed)
    assert [row["reason"].startswith(f"{files.input}:{count}: found ") for count, row in enumerate(failed, 1)] == [
        True
    ] * len(bad)
    assert [row["id"] for row in failed[3:7]] == ["f", "u", "e", "s"]
    assert failed[0]["id"] == f"{files.input}:1"
    assert "found 'USER: Hi ASSISTANT: x' at the beginning, expected" in failed[3]["reason"]
    assert "found 1 turns without an answer" in failed[4]["reason"]
    files.write({"text": ONE_ROUND})
    assert files.run("--overwrite") == 0
    assert not files.failed.exists()


def test_convert_with_what_it_cannot_use_is_one_line_and_writes_nothing(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal() -> str:
        assert files.run() == 2
        error = capsys.readouterr().err
        assert error.startswith("convert_to_sharegpt.py: error: ")
        assert error.count("\n") == 1
        assert sorted(path.name for path in files.directory.iterdir()) == names
        return error

    files.write()
    names = ["raw.jsonl", "tokenizer"]
    assert "found no rows" in refusal()
    files.input.write_bytes(json.dumps({"text": ONE_ROUND}).encode() + b"\n\xff\xfe\n")
    assert "expected UTF-8" in refusal()
    files.write({"text": ONE_ROUND})
    (files.tokenizer / "chat_template.jinja").write_text("{{ messages }}{{ raise_exception('broken') }}")
    assert "says 'broken'" in refusal()
    (files.tokenizer / "chat_template.jinja").unlink()
    assert "no chat template" in refusal()
    files.input = files.directory / "nowhere.jsonl"
    assert "found no file" in refusal()
    files.input = files.output
    files.output.write_text("precious")
    names = ["out.jsonl", *names]
    assert "named twice" in refusal()
    files.input = files.directory / "raw.jsonl"
    assert "there already" in refusal()
    assert files.output.read_text() == "precious"


def test_convert_replaces_a_file_of_failures_only_when_it_may(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.write({"id": "bad", "text": "no turns"}, {"text": ONE_ROUND})
    files.failed.write_text("precious")
    assert files.run() == 2
    assert f"found {files.failed} there already" in capsys.readouterr().err
    assert files.failed.read_text() == "precious" and not files.output.exists()
    assert files.run("--overwrite") == 1
    assert [row["id"] for row in files.rows(files.failed)] == ["bad"]
    before = files.failed.read_bytes(), files.output.read_bytes()
    with files.input.open("ab") as lines:
        lines.write(b"\xff\xfe\n")
    assert files.run("--overwrite") == 2, "a run that ends in an error leaves both files as they were"
    assert (files.failed.read_bytes(), files.output.read_bytes()) == before
    assert {path.name for path in files.directory.iterdir()} == {
        "raw.jsonl", "tokenizer", "out.jsonl", "out.jsonl.failed.jsonl"
    }  # fmt: skip
