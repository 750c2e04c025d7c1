"""Through axolotl's own command: what would end in a traceback or in useless heads ends in one line, before a model loads."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.e2e

BAD_ROWS = [
    {"messages": []},
    {"messages": [{"role": "user", "content": "Name a tree."}, {"role": "assistant", "content": None}]},
]


def test_new_pad_token_in_medusa_1_stops_before_the_model_loads(make_yaml, axolotl, tmp_path):
    keys = {"special_tokens": {"pad_token": "<|padding|>"}, "tokens": ["<|extra|>"]}
    result = axolotl("train", make_yaml(**keys), ok=False)
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("axolotl-medusa: base_model") and "'<|im_end|>', which it has" in last
    assert "Traceback" not in result.output and not (tmp_path / "out" / "medusa_heads").exists()


@pytest.mark.parametrize("skip", [False, True])
def test_rows_without_text_are_named_or_left_out(skip, make_yaml, axolotl, chats, tmp_path):
    file = tmp_path / "rows.jsonl"
    good = chats.read_text(encoding="utf-8")
    file.write_text(good + "".join(json.dumps(row) + "\n" for row in BAD_ROWS), encoding="utf-8")
    data = [{"path": str(file), "type": "chat_template"}]
    result = axolotl("train", make_yaml(datasets=data, medusa_skip_bad_rows=skip, max_steps=1), ok=skip)
    assert f"2 of 42 rows cannot be rendered by the chat template, {file}:41: messages is empty;" in result.output
    assert (tmp_path / "out" / "medusa_heads").is_dir() is skip and "Traceback" not in result.output
