"""What benchmarks write: the same JSON, with lists of numbers in a line."""

from __future__ import annotations

import json

from benchmarks.machine import description, write_result


def test_write_result_keeps_the_content_and_puts_numbers_in_one_line(tmp_path):
    result = {
        "a": [1, 2.5, -3e-7],
        "b": {"c": [[1, 2], [3]], "d": ["x, y", "[1]"], "e": [], "f": [{"g": [None, True]}]},
    }
    write_result(tmp_path / "x.json", result)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == result
    assert '"a": [1, 2.5, -3e-07],\n' in text and "[1, 2],\n" in text and '"g": [null, true]\n' in text


def test_description_names_processor_and_versions():
    found = description("torch")
    assert found["cpu"].keys() == {"name", "count", "machine", "memory_mib"} and found["cpu"]["count"] > 0
    assert found["versions"].keys() == {"python", "torch"}
