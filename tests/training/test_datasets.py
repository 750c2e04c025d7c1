"""Data sets in which there is nothing to learn are found before anything is loaded."""

from __future__ import annotations

import itertools
import json

import pytest
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from axolotl_medusa.training import datasets
from axolotl_medusa.training.datasets import dataset_problems, token_columns_only

USER, ASSISTANT, SYSTEM = ({"role": role, "content": "text"} for role in ("user", "assistant", "system"))
HUMAN, GPT = ({"from": role, "value": "text"} for role in ("human", "gpt"))
SHAREGPT = {"field_messages": "conversations", "message_property_mappings": {"role": "from", "content": "value"}}


def write(tmp_path, rows, name="data.jsonl"):
    path = tmp_path / name
    path.write_text(json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows))
    return path


def problems(path, key="datasets", **entry) -> list[str]:
    return dataset_problems({key: [{"path": str(path), "type": "chat_template", **entry}]})


GOOD = {
    "messages": ([{"messages": [USER, ASSISTANT]}], {}),
    "second-row": ([{"messages": [USER]}, {"messages": [SYSTEM, USER, ASSISTANT]}], {}),
    "row-without-messages-first": ([{}, {"messages": None}, {"messages": [ASSISTANT]}], {}),
    "sharegpt": ([{"conversations": [HUMAN, GPT]}], SHAREGPT),
    "other-property-for-the-role": ([{"messages": [{"who": "gpt"}]}], {"message_property_mappings": {"role": "who"}}),
    "other-role-to-train": ([{"messages": [USER]}], {"roles_to_train": ["user"]}),
    "assistant-to-train-spelled-gpt": ([{"messages": [{"role": "gpt"}]}], {"roles_to_train": ["assistant"]}),
    "gpt-to-train-spelled-assistant": ([{"messages": [ASSISTANT]}], {"roles_to_train": ["gpt"]}),
    "turns-that-say-themselves": ([{"messages": [{**USER, "train": True}]}], {"message_field_training": "train"}),
    "own-spelling-of-the-role": ([{"messages": [{"role": "bot"}]}], {"roles": {"assistant": ["bot"]}}),
    "labels": ([{"input_ids": [1, 2], "labels": [-100, 2]}], {"type": None}),
    "labels-empty-type": ([{"labels": [-100]}, {"labels": [0]}], {"type": ""}),
}
NO_TURN = "none of its 1 rows has an assistant turn"
BAD = {
    "no-assistant-turn": ([{"messages": [USER, SYSTEM]}] * 3, {}, "none of its 3 rows has an assistant turn"),
    "other-field": ([{"conversations": [HUMAN, GPT]}], {}, NO_TURN),
    "other-role-to-train": (
        [{"messages": [USER, ASSISTANT]}],
        {"roles_to_train": ["tool"]},
        NO_TURN,
    ),
    "other-property": (
        [{"messages": [USER, ASSISTANT]}],
        {"message_property_mappings": {"role": "who"}},
        NO_TURN,
    ),
    "role-that-axolotl-maps-to-no-assistant": (
        [{"messages": [{"role": "model"}]}],
        {},
        NO_TURN,
    ),
    "empty-turns": ([{"messages": []}, {}], {}, "none of its 2 rows has an assistant turn"),
    "no-rows": ([], {}, "none of its 0 rows has an assistant turn"),
    "all-labels-masked": (
        [{"labels": [-100, -100]}, {"labels": []}, {}],
        {"type": None},
        "none of its 3 rows has a label other than -100",
    ),
}


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize("case", GOOD)
def test_dataset_problems_file_with_something_to_learn_has_none(case, name, tmp_path):
    rows, entry = GOOD[case]
    assert problems(write(tmp_path, rows, name), **entry) == []


@pytest.mark.parametrize("key", ["datasets", "test_datasets"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize("case", BAD)
def test_dataset_problems_file_with_nothing_to_learn_is_one_line_that_names_it(case, name, key, tmp_path):
    rows, entry, message = BAD[case]
    path = write(tmp_path, rows, name)
    (line,) = problems(path, key, **entry)
    assert line.startswith(f"datasets path {path}: {message}; expected at least one")


def test_dataset_problems_each_bad_file_has_its_line(tmp_path):
    bad = [write(tmp_path, [{"messages": [USER]}], f"bad{i}.jsonl") for i in range(3)]
    good = write(tmp_path, [{"messages": [ASSISTANT]}], "good.jsonl")
    entries = [{"path": str(path), "type": "chat_template"} for path in (bad[0], good, bad[1])]
    lines = dataset_problems({"datasets": entries, "test_datasets": [{"path": str(bad[2]), "type": "chat_template"}]})
    assert [line.partition(": ")[0] for line in lines] == [f"datasets path {path}" for path in bad]


def test_dataset_problems_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path, [{"messages": [USER]}])
    (line,) = problems("~/data.jsonl")
    assert str(path) in line


@pytest.mark.parametrize(
    "cfg", [{}, {"datasets": None}, {"datasets": [], "test_datasets": None}, {"datasets": [{"type": "chat_template"}]}]
)
def test_dataset_problems_without_local_files_are_none(cfg):
    assert dataset_problems(cfg) == []


@pytest.mark.parametrize(
    "entry",
    [
        {"path": "org/data-on-a-hub", "type": "chat_template"},
        {"path": "{}/absent.jsonl", "type": "chat_template"},
        {"path": "{}", "type": "chat_template"},
        {"path": "{}/data.parquet", "type": "chat_template"},
        {"path": "{}/data.jsonl", "type": "alpaca"},
        {"path": "{}/data.jsonl", "type": {"field_instruction": "q"}},
    ],
)
def test_dataset_problems_what_only_axolotl_can_read_is_left_to_it(entry, tmp_path):
    write(tmp_path, [{"messages": [USER]}], "data.parquet")
    write(tmp_path, [{"messages": [USER]}], "data.jsonl")
    assert dataset_problems({"datasets": [{**entry, "path": entry["path"].format(tmp_path)}]}) == []


def test_dataset_problems_file_is_read_only_to_its_first_good_row(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [USER, ASSISTANT]}) + "\nnot JSON\n")
    assert problems(path) == []


def test_dataset_problems_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n" + json.dumps({"messages": [USER]}) + "\n\n   \n")
    (line,) = problems(path)
    assert "none of its 1 rows" in line


def test_dataset_problems_json_file_of_lines_is_read_as_lines(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"messages": [USER]}) + "\n" + json.dumps({"messages": [ASSISTANT]}) + "\n")
    assert problems(path) == []


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_dataset_problems_lines_after_a_byte_order_mark_are_read_as_axolotl_reads_them(name, tmp_path):
    path = tmp_path / name
    path.write_text(json.dumps({"messages": [USER, ASSISTANT]}) + "\n", encoding="utf-8-sig")
    assert problems(path) == []
    assert Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache")).num_rows == 1


def test_dataset_problems_array_after_a_byte_order_mark_is_refused_where_the_library_cannot_read_it(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"messages": [USER, ASSISTANT]}]), encoding="utf-8-sig")
    try:
        Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
    except (DatasetGenerationError, ValueError):
        with pytest.raises(ValueError, match=rf"{path} begins with a byte order mark.* install datasets 5"):
            problems(path)
    else:
        assert problems(path) == []


def test_dataset_problems_objects_on_several_lines_are_read_as_axolotl_reads_them(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("\n".join(json.dumps({"messages": turns}, indent=2) for turns in ([USER], [USER, ASSISTANT])))
    assert problems(path) == []
    assert Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache")).num_rows == 2


def test_dataset_problems_line_that_is_not_json_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [USER]}) + "\n\n{'messages': 1}\n")
    with pytest.raises(ValueError, match=rf"{path}:3 is not JSON \(.*\): expected one object a line"):
        problems(path)


def test_dataset_problems_json_array_that_is_cut_off_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"messages": []}, {"mess')
    with pytest.raises(ValueError, match=str(path)):
        problems(path)


@pytest.mark.parametrize(
    "end", [b"", b", garbage", b', {"messages": [' + b"[" * 100_000], ids=["none", "garbage", "deep"]
)
def test_dataset_problems_json_array_is_read_only_to_its_first_good_row(end, tmp_path):
    """The rest of the file is a hole of a terabyte: whoever reads it is stopped by the memory or the time that it takes."""
    path = tmp_path / "data.json"
    good = json.dumps([{"messages": [USER]}, {"messages": [USER, ASSISTANT]}], indent=2).encode()[:-2]
    with path.open("wb") as file:
        file.write(good + end + b" " * 4096)
        file.truncate(2**40)
    assert problems(path) == []


def test_dataset_problems_json_array_in_small_pieces_is_the_array(tmp_path, monkeypatch):
    rows = [{"messages": 'naïve ☃ "]},'}, [1.5, -2e-3, "]"], None, 12345, True, {}, [], {"a": {"b": [1, [2]]}}]
    path = tmp_path / "data.json"
    for piece, indent in itertools.product((1, 2, 3, 5, 64), (None, 1)):
        monkeypatch.setattr(datasets, "_CHUNK", piece)
        for content in (rows, [], rows[:1]):
            path.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
            with path.open("rb") as file:
                assert list(datasets._rows(path, file)) == content


ROW = json.dumps({"messages": [USER]})
DAMAGED = {
    "cut-off": f"[{ROW}, {ROW[:-5]}",
    "no-comma": f"[{ROW} {ROW}]",
    "comma-at-the-end": f"[{ROW},]",
    "text-after-it": f"[{ROW}] {ROW}",
    "nested-too-deeply": "[" * 200_000,
    "number-of-5000-digits": f"[{'1' * 5000}]",
}


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_dataset_problems_damaged_file_is_one_line_that_names_it(content, name, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path}(:1)? is not JSON \(.*\): expected ") as error:
        problems(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_dataset_problems_file_that_is_not_utf_8_is_one_line_that_names_it(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b'[{"messages": "\xff\xfe"}]\n')
    with pytest.raises(ValueError, match=rf"{path}(:1)? is not JSON \('utf-8' codec can't decode"):
        problems(path)


def test_dataset_problems_file_that_may_not_be_read_is_one_line_that_names_it(tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, [{"messages": [ASSISTANT]}])
    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(ValueError, match=rf"{path} cannot be read \(Permission denied\)"):
        problems(path)


@pytest.mark.parametrize(("name", "start"), [("data.json", b"[["), ("data.jsonl", b"[")])
def test_dataset_problems_row_without_end_is_one_line_and_is_not_read_whole(name, start, tmp_path):
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(start)
        file.truncate(2**40)
    with pytest.raises(ValueError, match=rf"{path}(:1)? is not JSON \(") as error:
        problems(path)
    assert name == "data.json" or "a row of more than 67,108,864 bytes" in str(error.value)


def test_dataset_problems_a_long_look_without_a_good_row_is_left_to_axolotl(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_LONGEST_LOOK", 1000)
    monkeypatch.setattr(datasets, "_CHUNK", 100)
    for name in ("data.json", "data.jsonl"):
        assert problems(write(tmp_path, [{"messages": [USER]}] * 3, name)) != []
        assert problems(write(tmp_path, [{"messages": [USER]}] * 100, name)) == []


@pytest.mark.parametrize("labels", [3, "text", {"a": 1}])
def test_dataset_problems_labels_of_another_shape_are_none(labels, tmp_path):
    (line,) = problems(write(tmp_path, [{"labels": labels}]), type=None)
    assert "none of its 1 rows has a label" in line


def test_dataset_problems_json_array_after_a_blank_line_is_still_an_array(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("\n  " + json.dumps([{"messages": [USER, ASSISTANT]}], indent=2))
    assert problems(path) == []


@pytest.mark.parametrize("rows", [["text"], [{"messages": "text"}], [{"messages": ["text"]}], [[1, 2]]])
def test_dataset_problems_rows_of_another_shape_are_one_line_that_names_the_file(rows, tmp_path):
    path = write(tmp_path, rows)
    try:
        lines = problems(path)
    except ValueError as error:
        lines = [str(error)]
    assert len(lines) == 1 and str(path) in lines[0]


def test_dataset_problems_train_on_inputs_makes_every_turn_one_to_learn(tmp_path):
    path = write(tmp_path, [{"messages": [USER]}])
    assert dataset_problems({"train_on_inputs": True, "datasets": [{"path": str(path), "type": "chat_template"}]}) == []


def test_dataset_problems_unicode_is_read_as_utf_8(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        json.dumps({"messages": [{"role": "assistant", "content": "naïve ☃"}]}, ensure_ascii=False).encode()
    )
    assert problems(path) == []


def test_columns_that_are_not_tokens_are_dropped():
    from datasets import Dataset

    row = {"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [-100, 2], "position_ids": [0, 1], "length": 2}
    dataset = Dataset.from_list([{**row, "id": "a", "messages": [{"role": "user", "content": "x"}], "count": 0}])
    assert token_columns_only(dataset).to_list() == [row]
    assert token_columns_only(None) is None


@pytest.mark.parametrize(
    "entry",
    [
        {"roles": {"assistant": 1}},
        {"roles": ["assistant"]},
        {"roles_to_train": 3},
        {"message_property_mappings": ["role"]},
        {"message_property_mappings": {"role": ["from"]}},
        {"field_messages": ["messages"]},
    ],
    ids=str,
)
def test_dataset_problems_entry_of_another_shape_is_axolotls_to_refuse(entry, tmp_path):
    path = write(tmp_path, [{"messages": [USER, ASSISTANT]}])
    assert all("\n" not in line for line in problems(path, **entry))


@pytest.mark.parametrize("datasets", [3, "data.jsonl", [["path"]], [None], {"path": "x"}], ids=str)
def test_dataset_problems_datasets_of_another_shape_are_axolotls_to_refuse(datasets):
    assert dataset_problems({"datasets": datasets}) == []
