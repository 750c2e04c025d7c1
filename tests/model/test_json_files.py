"""JSON files as strangers send them: whatever is wrong with one is a line that begins with its path."""

from __future__ import annotations

import pytest

from axolotl_medusa.model.json_files import MAX_DEPTH, MAX_JSON_BYTES, read_json, read_value

NOT_READ = {
    "empty": (b"", "is not JSON"),
    "cut-off": (b'{"a": 3, "b', "is not JSON"),
    "not-utf-8": (b'{"a": "\xff\xfe"}', "is not JSON"),
    "a-list": (b"[1, 2]", "holds a list, expected an object"),
    "a-number-without-end": (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON"),
    "nested-too-deeply-for-python": (b'{"a": ' + b"[" * 5_000, f"nests deeper than {MAX_DEPTH} levels"),
    "nested-too-deeply": (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", f"nests deeper than {MAX_DEPTH} levels"),
    "too-many-values": (b'{"a": [' + b"[]," * 100_000 + b"0]}", "its values would take 10 MB of memory"),
}


@pytest.mark.parametrize(("content", "message"), NOT_READ.values(), ids=NOT_READ)
def test_read_json_damaged_file_is_one_line_that_names_it(content, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_json(file)
    assert str(error.value).startswith(f"{file} ") and "\n" not in str(error.value)


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


def test_read_value_returns_what_a_file_holds(tmp_path):
    file = tmp_path / "a.json"
    nested = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    file.write_bytes(nested)
    assert str(read_value(file)).encode() == nested
    file.write_text('{"a": "ü", "b": null}', encoding="utf-8")
    assert read_value(file) == read_json(file) == {"a": "ü", "b": None}
