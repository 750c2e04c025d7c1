"""The tokenizer without transformers does what transformers' does."""

from __future__ import annotations

import pytest
from example_tokenizers import make_tokenizer

from axolotl_medusa.onnx_decoding.tokenizer import LightTokenizer

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hé\n\n  there"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "<s> 3 < 4"},
]


@pytest.mark.parametrize("family", ["zephyr", "qwen3"])
def test_template_and_tokens_are_those_of_transformers(family, tmp_path):
    theirs = make_tokenizer(family)
    theirs.save_pretrained(tmp_path)
    ours = LightTokenizer(tmp_path)
    for add in (True, False):
        text = theirs.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=add)
        assert ours.apply_chat_template(TURNS, add_generation_prompt=add) == text
        assert ours(text, add_special_tokens=False)["input_ids"] == theirs(text, add_special_tokens=False)["input_ids"]
    ids = theirs("é</s> x")["input_ids"]
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_tokenizer_without_a_template_has_none(tmp_path):
    theirs = make_tokenizer("llama")
    theirs.chat_template = None
    theirs.save_pretrained(tmp_path)
    assert LightTokenizer(tmp_path).chat_template is None
