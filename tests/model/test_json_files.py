"""Limits of JSON files: what real files hold is within them, what only takes memory or depth is not."""

from __future__ import annotations

import json
import os
import tracemalloc

import pytest

from axolotl_medusa.model import json_files
from axolotl_medusa.model.json_files import MAX_DEPTH, MAX_JSON_BYTES, parse_json, read_json, read_value

NUM_TENSORS = 100_000


def refusal(text: str | bytes) -> str:
    with pytest.raises(ValueError) as error:
        parse_json(text, "a.json")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    return str(error.value)


def test_index_of_a_very_large_model_is_within_the_limits():
    names = [f"model.layers.{number // 400}.mlp.experts.{number % 400}.up_proj.weight" for number in range(NUM_TENSORS)]
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00100.safetensors")}
    for indent in (None, 2):
        assert parse_json(json.dumps(index, indent=indent), "index") == index


def test_log_of_a_long_run_is_within_the_limits():
    entry = {"epoch": 0.5, "grad_norm": 1.734375, "learning_rate": 9.876543e-05, "loss": 1.2345678, "step": 500}
    entry |= {f"medusa{head}_loss": 2.3456789 for head in range(5)}
    state = {"log_history": [entry] * 20_000}
    for indent in (None, 2):
        assert parse_json(json.dumps(state, indent=indent), "state") == state


@pytest.mark.parametrize("text", ["[[]," * 200_000 + "[]" + "]" * 200_000, "[" + "[]," * 300_000 + "[]]"])
def test_values_that_take_far_more_memory_than_their_text_are_not_made(text):
    tracemalloc.start()
    try:
        assert "a.json is not JSON (its values would take" in refusal(text)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_memory_is_measured_by_the_whole_file_where_the_text_is_a_part_of_it():
    text = "[" + "{}," * 100_000 + "{}]"
    assert "its values would take" in refusal(text)
    assert len(parse_json(text, "header", num_bytes=10_000_000)) == 100_001


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1, 3_000])
@pytest.mark.parametrize(
    "nest", [lambda value: f"[{value}]", lambda value: f'{{"a": {value}}}'], ids=["list", "object"]
)
def test_nesting_ends_at_a_level(nest, depth):
    text = "1"
    for _ in range(depth):
        text = nest(text)
    if depth <= MAX_DEPTH:
        assert parse_json(text, "a.json") is not None
    else:
        assert f"a.json nests deeper than {MAX_DEPTH} levels" in refusal(text)


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe", "[1,]", "nul", "1" * 5_000], ids=lambda text: repr(text)[:20])
def test_what_is_no_json_is_one_line(text):
    assert "a.json is not JSON (" in refusal(text)


def test_files_are_read_up_to_a_size_and_pipes_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}')
    assert read_json(file) == {"a": 1}
    monkeypatch.setattr(json_files, "MAX_JSON_BYTES", 7)
    with pytest.raises(ValueError, match=r"a\.json is longer than 7 bytes"):
        read_json(file)
    file.write_text("[1]")
    assert read_value(file) == [1]
    with pytest.raises(ValueError, match=r"a\.json holds a list, expected an object"):
        read_json(file)
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("pipe.json", "none.json"):
        with pytest.raises(ValueError, match=rf"{name} is missing"):
            read_value(tmp_path / name)


def test_read_json_larger_file_is_not_read_to_its_end(tmp_path):
    file = tmp_path / "large.json"
    with file.open("wb") as stream:
        stream.truncate(2**40)  # a hole: no memory holds as much
    with pytest.raises(ValueError, match=f"is longer than {MAX_JSON_BYTES:,} bytes"):
        read_json(file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.json", "is missing: complete the directory"),
        ("", "is missing: complete the directory"),
        ("x" * 5000, r"cannot be read \(File name too long\)"),
    ],
    ids=["absent", "directory", "long"],
)
def test_read_json_what_is_no_file_is_one_line(name, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read_json(tmp_path / name)
    assert "\n" not in str(error.value)


def test_read_json_file_of_another_user_is_one_line(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    file.write_text("{}")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(type(file), "open", refuse)  # root may read everything
    with pytest.raises(ValueError, match=r"config\.json cannot be read \(Permission denied\)"):
        read_json(file)
