"""data_generation/split.py: every row on one side, the same prompt never on both."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

import split

MESSAGE_KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}


def row(number: int, prompt: str, answer: str = "yes", layout: str = "messages") -> dict[str, Any]:
    """One conversation in any of the layouts; its id is only a label."""
    if layout == "input_ids":
        ids = [*prompt.encode(), *answer.encode()]
        labels = [-100] * len(prompt.encode()) + ids[len(prompt.encode()) :]
        return {"id": str(number), "input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
    if layout in ("text", "prompt"):
        return {"id": str(number), layout: prompt}
    speaker, text = MESSAGE_KEYS[layout]
    users = {"messages": ("user", "assistant"), "conversations": ("human", "gpt")}[layout]
    turns = [{speaker: users[0], text: prompt}, {speaker: users[1], text: answer}]
    return {"id": str(number), layout: turns}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Files:
    """Runs the command on files in a directory."""

    def __init__(self, directory: Path) -> None:
        self.input, self.train, self.eval = (directory / f"{name}.jsonl" for name in ("in", "train", "eval"))

    def run(self, *flags: str) -> int:
        paths = ["--data_path", self.input, "--train_path", self.train, "--eval_path", self.eval]
        return split.main([str(word) for word in (*paths, *flags)])

    def sides(self) -> tuple[list[str], list[str]]:
        return self.train.read_text().splitlines(True), self.eval.read_text().splitlines(True)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.mark.parametrize("layout", ["messages", "conversations", "input_ids", "text", "prompt"])
def test_split_of_each_layout_copies_every_line_to_one_side(
    files: Files, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(files.input, [row(number, f"prompt {number}", layout=layout) for number in range(400)])
    assert files.run("--eval_fraction", "0.25") == 0
    train, held_out = files.sides()
    assert sorted(train + held_out) == sorted(files.input.read_text().splitlines(True))
    # 400 draws of 0.25: 100 ± 5 standard deviations of 8.7; the seed is fixed, so this never fails by chance.
    assert 56 < len(held_out) < 144
    assert capsys.readouterr().out == f"{len(train)} train + {len(held_out)} eval + 0 removed = 400 rows\n"


def test_split_copies_lines_byte_for_byte_and_ends_the_last(files: Files) -> None:
    line = b'{"messages" :[{"content":"\\u00e9N \xc3\xa9","role":"user"}],  "x": 1.0}\r\n'
    lines = [line.replace(b"N", b"%d" % number) + b"\n" * (number % 3) for number in range(50)]
    original = b"".join(lines).rstrip()
    files.input.write_bytes(original)
    assert files.run("--eval_fraction", "0.3") == 0
    train, held_out = files.train.read_bytes(), files.eval.read_bytes()
    kept = [line for line in (original + b"\n").splitlines(True) if not line.isspace()]
    assert sorted((train + held_out).splitlines(True)) == sorted(kept)
    assert [line for line in kept if line in train] == train.splitlines(True)  # order kept


def test_split_does_not_depend_on_the_order_of_rows_or_on_other_rows(files: Files) -> None:
    rows = [row(number, f"prompt {number}") for number in range(200)]
    write(files.input, rows)
    files.run()
    train, held_out = map(set, files.sides())
    random.Random(1).shuffle(rows)
    write(files.input, rows[:150])
    files.run("--overwrite")
    fewer_train, fewer_held_out = map(set, files.sides())
    assert fewer_train <= train
    assert fewer_held_out <= held_out
    files.run("--overwrite", "--seed", "1")
    assert set(files.sides()[1]) != fewer_held_out


@pytest.mark.parametrize("flags", [("--eval_fraction", "0.5"), ("--eval_rows", "60")])
@pytest.mark.parametrize("layout", ["messages", "conversations", "input_ids"])
def test_split_keeps_rows_of_one_prompt_on_one_side(files: Files, flags: tuple[str, str], layout: str) -> None:
    spellings = ["what is {}?", "What  is\n{}? ", "WHAT IS {}?"] if layout != "input_ids" else ["what is {}?"] * 3
    rows = [
        row(number, spelling.format(number), f"answer {version}", layout)
        for number in range(40)
        for version, spelling in enumerate(spellings)
    ]
    write(files.input, rows)
    assert files.run(*flags) == 0
    train, held_out = ({json.loads(line)["id"] for line in side} for side in files.sides())
    assert not train & held_out
    assert len(train) + len(held_out) == 40
    assert len(held_out) == 20 or flags[0] == "--eval_fraction"


def test_split_by_rows_gives_exactly_as_many_where_prompts_allow_it(files: Files) -> None:
    rows = [row(number, "the same prompt") for number in range(30)]
    rows += [row(number, f"prompt {number}") for number in range(30, 60)]
    write(files.input, rows)
    for seed in range(5):
        assert files.run("--eval_rows", "7", "--seed", str(seed), "--overwrite") == 0
        train, held_out = files.sides()
        assert (len(train), len(held_out)) == (53, 7)  # never the 30 rows that share a prompt


@pytest.mark.parametrize("flags", [("--eval_fraction", "0.3"), ("--eval_rows", "10")])
def test_split_with_deduplicate_keeps_one_of_each(
    files: Files, flags: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(number, f"prompt {number % 50}") for number in range(120)] + [row(500, "prompt 1", "another answer")]
    write(files.input, rows)
    assert files.run(*flags, "--deduplicate") == 0
    train, held_out = files.sides()
    assert sorted(int(json.loads(line)["id"]) for line in train + held_out) == [*range(50), 500]
    assert f"{len(train)} train + {len(held_out)} eval + 70 removed = 121 rows" in capsys.readouterr().out


def test_split_reads_gzip(files: Files, tmp_path: Path) -> None:
    write(files.input, [row(number, f"prompt {number}") for number in range(50)])
    packed = tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(files.input.read_bytes()))
    files.run("--eval-rows", "5")
    plain = files.sides()
    files.input = packed
    files.run("--eval-rows", "5", "--overwrite")
    assert files.sides() == plain


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "in.jsonl:3: found [1], expected an object with one of"),
        ('{"messages": []}', "in.jsonl:3: found {'messages': []}"),
        ('{"messages": [{"role": "user", "cont', "in.jsonl:3: found"),
        ('{"messages": [{"role": "narrator", "content": "x"}]}', "found the turn"),
        ('{"input_ids": [1, 2], "labels": [1]}', "expected two lists of the same length"),
        ('{"text": 3}', "found 'text' to be 3, expected a text"),
    ],
)
def test_split_of_a_malformed_row_writes_nothing(
    files: Files, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(files.input, [row(1, "a"), row(2, "b")])
    with files.input.open("a") as file:
        file.write(line + "\n")
    assert files.run("--eval_rows", "1") == 2
    error = capsys.readouterr().err
    assert error.startswith("split.py: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in files.input.parent.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        (20, ("--eval_fraction", "0"), "20 train + 0 eval"),
        (20, ("--eval_fraction", "1"), "0 train + 20 eval"),
        (20, ("--eval_rows", "20"), "0 train + 20 eval"),
        (0, (), "0 train + 0 eval"),
        (20, ("--eval_rows", "2", "--eval_fraction", "0.5"), "expected one of them"),
    ],
)
def test_split_with_an_empty_side_is_an_error(
    files: Files, rows: int, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(files.input, [row(number, str(number)) for number in range(rows)])
    assert files.run(*flags) == 2
    assert message in capsys.readouterr().err
    assert not files.train.exists()
    assert not files.eval.exists()


def test_split_refuses_to_overwrite_or_to_mix_up_files(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    write(files.input, [row(number, str(number)) for number in range(20)])
    files.eval.write_text("precious")
    assert files.run() == 2
    assert "eval.jsonl there already" in capsys.readouterr().err
    assert files.eval.read_text() == "precious"
    assert files.run("--overwrite", "--eval_rows", "3") == 0
    assert len(files.sides()[1]) == 3
    files.eval = files.train
    assert files.run("--overwrite") == 2
    assert "named twice" in capsys.readouterr().err
    files.eval = files.input
    assert files.run("--overwrite") == 2
    assert "named twice" in capsys.readouterr().err
    files.input = files.input.with_name("missing.jsonl")
    assert files.run("--overwrite") == 2
    assert "found no file" in capsys.readouterr().err
