"""data_generation/prompt_files.py and raw_rows.py: every layout, archive and dataset becomes the same rows."""

import gzip
import json
import random
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from parts import prompt_files, raw_rows
from parts.prompt_files import InputError, InputSize, Row, check_rows, read_rows

PROMPT = ({"role": "user", "content": " Why? "},)
PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def turns(*texts: str) -> list[dict[str, str]]:
    """Returns alternating user and assistant turns."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def write(path: Path, *rows: Any) -> str:
    """Writes rows as JSON lines; returns the path as the flag has it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_one(tmp_path: Path, row: Any) -> Row:
    """Returns the only row of a file of one line."""
    (found,) = read_rows(write(tmp_path / "p.jsonl", row))
    return found


# ---- layouts ----


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "\n Why? \r\n\n"),
        ("p.TXT", "\ufeff Why? "),
        ("p.jsonl", '\ufeff{"prompt": " Why? "}\n\n'),
        ("p.jsonl", '" Why? "\n'),
        ("p.json", '\ufeff\n [{"prompt": " Why? ", "messages": null}]'),
        ("p.json", '[" Why? "]'),
        ("p.jsonl", '{"messages": [{"role": "user", "content": " Why? "}], "prompt": "passed over"}'),
        ("p.jsonl", '{"messages": [], "prompt": " Why? "}'),
        ("p.jsonl", '{"conversations": [{"from": "human", "value": " Why? "}]}'),
        ("p.jsonl", '{"conversations": [{"role": "user", "content": " Why? ", "weight": 0}]}'),
        ("p.json", '[{"conversations": [{"from": "user", "value": " Why? "}]}]'),
        ("p.jsonl", '{"data": [" Why? "]}'),
    ],
)
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_read_rows_in_any_layout_gives_the_same_row_and_id(tmp_path: Path, name: str, text: str, packed: str) -> None:
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(PACK.get(packed, bytes)(text.encode()))
    # The id is pinned: if it changes, no user's half-done output can be resumed.
    assert [(row.id[:8], row.turns, row.reason) for row in read_rows(str(path))] == [("b045cbf6", PROMPT, "")]


def test_read_rows_knows_speakers_by_all_their_names(tmp_path: Path) -> None:
    speakers = ["system", "Human", "gpt", "user", "Assistant", "HUMAN", "chatgpt", "user", "bing", "user", "Bard"]
    roles = ["system", *["user", "assistant"] * 5]
    sharegpt = read_one(tmp_path, {"conversations": [{"from": speaker, "value": "x"} for speaker in speakers]})
    openai = read_one(tmp_path, {"messages": [{"role": speaker, "content": "x"} for speaker in speakers]})
    assert [turn["role"] for turn in sharegpt.turns] == roles
    assert sharegpt == openai


def test_read_rows_keeps_an_answer_that_comes_first(tmp_path: Path) -> None:
    conversation = [{"from": "gpt", "value": "old"}, {"from": "human", "value": "one"}]
    row = read_one(tmp_path, {"conversations": conversation})
    assert row.turns == ({"role": "assistant", "content": "old"}, {"role": "user", "content": "one"})


def test_read_rows_takes_an_answer_of_null_for_empty(tmp_path: Path) -> None:
    row = read_one(tmp_path, {"messages": [*turns("one"), {"role": "assistant", "content": None}]})
    assert row.turns == tuple(turns("one", ""))


def test_read_rows_of_ultrachat_200k_takes_messages_and_the_prompts_id(tmp_path: Path) -> None:
    row = read_one(tmp_path, {"prompt": "one", "prompt_id": "f0e3", "messages": turns("one", "old", "two")})
    assert (row.id, row.turns) == ("f0e3", tuple(turns("one", "old", "two")))


def test_read_rows_of_the_first_ultrachat_takes_texts_in_turn(tmp_path: Path) -> None:
    row = read_one(tmp_path, {"id": "7", "data": ["one", "old", "two", "older"]})
    assert (row.id, row.turns) == ("7", tuple(turns("one", "old", "two", "older")))


def test_id_is_the_given_one_whatever_else_there_is(tmp_path: Path) -> None:
    assert read_one(tmp_path, {"id": 5, "prompt_id": "p", "prompt": "x"}).id == "5"
    unnamed = read_one(tmp_path, {"id": None, "prompt": "x"})
    assert unnamed.id == unnamed.digest[:16]


def test_read_rows_with_limit_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('"one"\n"two"\nbroken\n')
    assert [row.turns[0]["content"] for row in read_rows(str(path), limit=2)] == ["one", "two"]
    assert check_rows(str(path), limit=2) == (2, 2)


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts_heldout.jsonl"])
def test_prompts_of_the_repository_load_with_unique_ids_and_texts(name: str) -> None:
    path = str(Path(prompt_files.__file__).parents[1] / name)
    rows = list(read_rows(path))
    assert len({row.digest for row in rows}) == len(rows) > 0
    assert check_rows(path) == InputSize(len(rows), len(rows))


# ---- rows without a usable prompt ----


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("", "found an empty user turn"),
        ({"prompt": " "}, "found an empty user turn"),
        ({"prompt": None}, "found no user turn"),
        ({"data": []}, "found no user turn"),
        ({"conversations": [], "messages": None}, "found no user turn"),
        ({"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}, "no user turn"),
        ({"messages": [{"role": "user", "content": None}]}, "found an empty user turn"),
        ({"messages": turns("one", "old", "\n")}, "found an empty user turn"),
        ({"prompt": "\ud83d"}, "found half of a surrogate pair"),
    ],
    ids=str,
)
def test_row_without_a_usable_prompt_comes_with_its_place_and_reason(tmp_path: Path, row: Any, reason: str) -> None:
    path = write(tmp_path / "p.jsonl", "fine", row)
    fine, found = read_rows(path)
    assert (fine.turns, fine.reason) == (({"role": "user", "content": "fine"},), "")
    assert found.turns == ()
    assert found.reason.startswith(f"{path}:2: ")
    assert reason in found.reason
    assert found.id == found.digest[:16]
    assert check_rows(path) == (2, 2)


# ---- malformed input ----


@pytest.mark.parametrize(
    ("name", "content", "place", "expected"),
    [
        ("p.jsonl", '{"prompt": "x"}\n{"prompt": \n', ":2", "expected JSON"),
        ("p.jsonl", "[" * 100_000, ":1", "expected JSON"),
        ("p.jsonl", '{"prompt": "x"}\n\n7\n', ":3", "expected a text or an object with 'messages'"),
        ("p.jsonl", '{"text": "x"}', ":1", "found the keys ['text'], expected a text or an object with"),
        ("p.jsonl", '{"prompt": ["x"]}', ":1", "found the turn {'content': ['x']"),
        ("p.jsonl", '{"data": "x"}', ":1", "found 'data' to be 'x'"),
        ("p.jsonl", '{"messages": {}}', ":1", "found 'messages' to be {}"),
        ("p.jsonl", '{"messages": ["x"]}', ":1", "found the turn 'x'"),
        ("p.jsonl", '{"messages": [{"role": "narrator", "content": "x"}]}', ":1", "by one of system, developer, user,"),
        ("p.jsonl", '{"messages": [{"role": ["user"], "content": "x"}]}', ":1", "found the turn"),
        ("p.jsonl", '{"conversations": [{"value": "x"}]}', ":1", "('role' or 'from')"),
        ("p.jsonl", '{"id": 1.5, "prompt": "x"}', ":1", "found the id 1.5, expected a text or an integer"),
        ("p.jsonl", '{"prompt_id": "", "prompt": "x"}', ":1", "found the prompt_id ''"),
        ("p.jsonl", '{"id": "\\ud83d", "prompt": "x"}', ":1", "expected valid Unicode"),
        ("p.jsonl", "\n", "", "found no rows, expected at least one"),
        ("p.json", "[]", "", "found no rows"),
        ("p.txt", "fine\n\udcff\n", ":2", "expected UTF-8"),
        ("p.json", '[{"prompt": "x"}, 3]', ": row 2", "expected a text or an object"),
        ("p.json", '[{"prompt": "x"}, {"pro', ": row 2", "premature EOF, expected JSON"),
        ("p.json", '["\udcff"]', ": row 1", "invalid bytes in UTF8 string"),
        ("p.json", '["x"] y', ": row 2", "trailing garbage, expected JSON"),
        ("p.json", ' {"prompt": "x"}', "", 'found \'{"prompt": "x"}\', expected a list of rows'),
        ("p.json", "", "", "found '', expected a list of rows"),
        ("p.csv", "x", "", "found the ending '.csv', expected .txt, .jsonl, .json, each also with .gz or .zst"),
        ("p.gz", "x", "", "found the ending ''"),
    ],
)
def test_malformed_input_is_one_line_with_its_place(
    tmp_path: Path, name: str, content: str, place: str, expected: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError) as caught:
        check_rows(str(path))
    assert str(caught.value).startswith(f"{path}{place}: found ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_id_on_two_conversations_is_an_error(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"}, {"id": "a", "prompt": "y"}]
    with pytest.raises(InputError, match="found the id 'a' on two different conversations, the later in row 3"):
        check_rows(write(tmp_path / "p.jsonl", *rows))


def test_repeated_rows_are_counted_and_no_error(tmp_path: Path) -> None:
    named = [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"}, {"id": "a", "messages": turns("x")}]
    assert check_rows(write(tmp_path / "p.jsonl", *named, "x", "x")) == (5, 3)
    # A prompt's id is no conversation's: the same prompt may have been talked about twice.
    talks = [{"prompt_id": "p", "messages": turns("x", "old", text)} for text in ("one", "two")]
    assert check_rows(write(tmp_path / "p.jsonl", *talks)) == (2, 1)


def test_given_id_that_is_the_hash_of_its_turns_is_no_conflict(tmp_path: Path) -> None:
    row = read_one(tmp_path, "x")
    assert check_rows(write(tmp_path / "p.jsonl", "x", {"id": row.id, "messages": list(row.turns)})) == (2, 1)


@pytest.mark.parametrize(("named", "bytes_per_row"), [(True, 120), (False, 80)])
def test_check_rows_holds_few_bytes_a_row(tmp_path: Path, named: bool, bytes_per_row: int) -> None:
    prompts = (f"{count}" * 99 for count in range(20_000))
    path = write(
        tmp_path / "p.jsonl", *({"id": f"id {prompt}", "prompt": prompt} if named else prompt for prompt in prompts)
    )
    tracemalloc.start()
    check_rows(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # One or two numbers of 32 bytes and the dictionary with its buffers: 103 and 66 bytes with CPython 3.11.
    assert peak < 20_000 * bytes_per_row


def test_id_key_has_60_bits() -> None:
    keys = [prompt_files.id_key(str(count)) for count in range(1000)]
    assert len(set(keys)) == 1000
    # A thousand uniform keys all miss the upper half with a chance of 1 in 2**1000.
    assert 2**59 < max(keys) < 2**60
    assert prompt_files.id_key("\ud83d")


# ---- archives and streaming ----


def damage(name: str, packed: bytes) -> bytes:
    """Returns an archive with one thing wrong."""
    half = len(packed) // 2
    return {
        "cut": packed[:half],
        "cut at its end": packed[:-1],
        "changed": packed[:half] + bytes([packed[half] ^ 255]) + packed[half + 1 :],
        "followed by something else": packed + b"rubbish",
        "something else": b"rubbish",
    }[name]


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.jsonl.zst", "p.json.gz", "p.json.zst", "p.txt.zst"])
@pytest.mark.parametrize("wrong", ["cut", "cut at its end", "changed", "followed by something else", "something else"])
def test_damaged_archive_is_one_line(tmp_path: Path, name: str, wrong: str) -> None:
    path = tmp_path / name
    prompts = [f"{count**9}" for count in range(999)]
    text = (json.dumps(prompts) if ".json." in name else "\n".join(f'"{prompt}"' for prompt in prompts)).encode()
    packed = {
        ".gz": gzip.compress,
        ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    }[path.suffix](text)
    path.write_bytes(packed)
    assert check_rows(str(path)) == (999, 999)
    path.write_bytes(damage(wrong, packed))
    with pytest.raises(InputError) as caught:
        check_rows(str(path))
    assert str(caught.value).startswith(f"{path}: found a damaged archive (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_archive_of_several_parts_is_read_to_its_end(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"p.txt{packed}"
    prompts = [str(count) for count in range(20_000)]
    lines = "\n".join(prompts).encode()
    path.write_bytes(PACK[packed](lines[:7]) + PACK[packed](b"") + PACK[packed](lines[7:]))
    assert [row.turns[0]["content"] for row in read_rows(str(path))] == prompts


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.json.gz", "p.json.zst"])
def test_rows_come_before_the_whole_file_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    digits = random.Random(0).randbytes(2_000_000).hex()  # packed to half its size
    rows = [f'{{"prompt": "{digits[start : start + 400]}"}}' for start in range(0, len(digits), 400)]
    text = ("[" + ", ".join(rows) if ".json" in path.suffixes else "\n".join(rows)) + "broken"
    path.write_bytes(PACK.get(path.suffix, bytes)(text.encode()))
    check_rows(str(path), limit=1)  # imports what it needs
    stream = read_rows(str(path))
    tracemalloc.start()
    assert next(stream).turns[0]["content"] == digits[:400]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000, "of 4 MB, no more than some buffers"
    with pytest.raises(InputError, match="expected JSON"):
        list(stream)


@pytest.mark.parametrize(
    ("name", "library"),
    [("p.json", "ijson"), ("p.txt.zst", "zstandard"), ("p.parquet", "pyarrow"), ("a/b", "datasets")],
)
def test_library_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in (library, f"{library}.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    if "/" not in name:
        Path(name).write_text("[]")
    with pytest.raises(InputError, match=rf"^{name}: found no library '{library}' .*`pip install {library}`$"):
        check_rows(name)


# ---- datasets ----


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as a parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def ultrachat(*prompts: str) -> list[dict[str, Any]]:
    """Returns rows in the layout of UltraChat-200k."""
    return [{"prompt": text, "prompt_id": f"id {text}", "messages": turns(text, "old")} for text in prompts]


def prompts_of(data_path: Path | str, split: str | None = None) -> list[str]:
    """Returns the first turns of an input."""
    return [row.turns[0]["content"] for row in read_rows(str(data_path), split)]


def test_parquet_file_is_read_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_rows, "BATCH_ROWS", 2)
    path = tmp_path / "train_sft-00000-of-00003-a1b2.parquet"
    write_parquet(path, ultrachat(*"abcde"))
    rows = list(read_rows(str(path), limit=5))
    assert [(row.id, row.turns) for row in rows] == [(f"id {text}", tuple(turns(text, "old"))) for text in "abcde"]
    assert prompts_of(path, "train_sft") == list("abcde")
    assert check_rows(str(path)) == (5, 5)
    with pytest.raises(InputError, match=r"found no split 'test', expected --split to be one of train_sft$"):
        check_rows(str(path), "test")


def test_parquet_row_that_is_malformed_is_named_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_rows, "BATCH_ROWS", 2)
    path = tmp_path / "p.parquet"
    write_parquet(path, [{"messages": [{"role": role, "content": "x"}]} for role in ("user", "user", "narrator")])
    with pytest.raises(InputError, match=rf"^{path}: row 3: found the turn"):
        check_rows(str(path))
    write_parquet(path, [{"text": "x"}])
    with pytest.raises(InputError, match=rf"^{path}: row 1: found the keys \['text'\]"):
        check_rows(str(path))


def test_parquet_directory_has_the_splits_that_its_files_are_named_after(tmp_path: Path) -> None:
    for name, prompts in {
        "data/train_sft-00001-of-00002.parquet": "cd",
        "data/train_sft-00000-of-00002.parquet": "ab",
        "data/test_sft-00000-of-00001.parquet": "e",
        "other/validation/0000.parquet": "f",
        "test.parquet": "g",
        "part-3.parquet": "h",
    }.items():
        write_parquet(tmp_path / name, ultrachat(*prompts))
    splits = {"train_sft": "abcd", "test_sft": "e", "validation": "f", "test": "g", "train": "h"}
    for split, prompts in splits.items():
        assert prompts_of(tmp_path, split) == list(prompts)
    names = "test_sft, train_sft, validation, train, test"
    for split, found in {None: "several splits and no --split", "trian": "no split 'trian'"}.items():
        with pytest.raises(InputError) as caught:
            check_rows(str(tmp_path), split)
        assert str(caught.value) == f"{tmp_path}: found {found}, expected --split to be one of {names}"
    assert prompts_of(tmp_path / "other") == ["f"]


def test_directory_without_parquet_and_file_with_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found a directory without \.parquet files"):
        check_rows(str(tmp_path))
    with pytest.raises(InputError, match=r"found the split 'train' for a file without splits, expected no --split"):
        check_rows(write(tmp_path / "p.jsonl", "x"), "train")


def test_parquet_is_read_piece_by_piece_though_its_rows_are_one_group(tmp_path: Path) -> None:
    digits = random.Random(0).randbytes(3_000_000).hex()
    path = tmp_path / "p.parquet"
    rows = [{"id": str(count), "data": [digits[count * 300 : count * 300 + 300]]} for count in range(20_000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, use_dictionary=False, compression="none")
    assert pyarrow.parquet.read_metadata(path).num_row_groups == 1
    before = pyarrow.total_allocated_bytes()
    stream = read_rows(str(path))
    assert next(stream).turns[0]["content"] == digits[:300]
    assert pyarrow.total_allocated_bytes() - before < 3_000_000, "of 6 MB, no more than some buffers"
    assert sum(1 for _ in stream) == 19_999


def test_damaged_parquet_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    write_parquet(path, ultrachat("a"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=rf"^{path}: found something that cannot be read as parquet \(.*\)$"):
        check_rows(str(path))


def test_named_dataset_is_read_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str) -> Any:
        assert name == "org/talks-v1.5"
        return datasets.DatasetDict(
            {
                "train": datasets.Dataset.from_list(ultrachat("a", "b")),
                "test": datasets.Dataset.from_list(ultrachat("c")),
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert prompts_of("org/talks-v1.5", "train") == ["a", "b"]
    assert [row.id for row in read_rows("org/talks-v1.5", "test")] == ["id c"]
    with pytest.raises(
        InputError, match=r"^org/talks-v1.5: found several splits and no --split, .* one of train, test$"
    ):
        check_rows("org/talks-v1.5")
    with pytest.raises(InputError, match=r"found no split 'trian', expected --split to be one of train, test$"):
        check_rows("org/talks-v1.5", "trian")


@pytest.mark.parametrize("name", ["no_such_dataset_anywhere", "no_such_org/no_such_dataset"])
def test_name_of_neither_file_nor_dataset_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str) -> Any:
        raise datasets.exceptions.DatasetsError("it is not there\nor cannot be reached")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as caught:
        check_rows(name)
    text = f"{name}: found neither such a file nor a dataset that can be loaded (it is not there)"
    assert str(caught.value) == text


@pytest.mark.parametrize("name", ["gone.jsonl", "dir/gone.txt", "gone.parquet", "./gone", "/no/such/dir", "a/b/c", ""])
def test_missing_file_is_not_looked_for_among_datasets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=rf"^{name}: found no such file"):
        check_rows(name)


def test_file_is_read_as_a_file_though_a_dataset_could_have_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "talks" / "train.parquet", ultrachat("a"))
    assert prompts_of("talks") == ["a"]
    assert prompts_of("talks/train.parquet", "train") == ["a"]
