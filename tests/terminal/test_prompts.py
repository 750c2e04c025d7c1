"""Prompt files, and the tokens that the model sees."""

from __future__ import annotations

import json

import pytest
from example_tokenizers import make_tokenizer
from tokenizers.processors import TemplateProcessing

from axolotl_medusa.terminal.prompts import Prompt, conversation_tokens, prompt_tokens, read_prompts

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "prompts.jsonl"


def test_rows_of_both_kinds_are_read(file):
    rows = [
        {"id": "p1", "prompt": "Hi", "category": "talk"},
        {"id": 7, "messages": [USER, ANSWER], "model": "m"},
        {"prompt": "Grüße"},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    expected = [
        Prompt("p1", (USER,), "talk"),
        Prompt("7", (USER, ANSWER)),
        Prompt("3", ({"role": "user", "content": "Grüße"},)),
    ]
    assert read_prompts(file) == expected
    assert read_prompts(file, 2) == expected[:2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompts, expected lines such as"),
        ('{"prompt": "a"}\n{', "prompts.jsonl line 2 is not JSON"),
        ('{"text": "a"}', 'line 1 is no prompt, expected an object with either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', "line 1 is no prompt"),
        ("[]", "line 1 is no prompt"),
        ('{"prompt": 3}', 'line 1: expected "prompt" to be text'),
        ('{"messages": []}', 'line 1: expected "prompt" to be text'),
        ('{"messages": [{"role": "user"}]}', 'line 1: expected "prompt" to be text'),
    ],
)
def test_malformed_files_are_refused_in_one_line(text, message, file):
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(file)
    assert "\n" not in str(error.value)


def test_missing_files_bytes_and_limits_are_refused(file):
    with pytest.raises(ValueError, match=r"cannot be read \(No such file or directory\): expected a JSONL file"):
        read_prompts(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_prompts(file)
    with pytest.raises(ValueError, match="limit is 0, expected at least 1"):
        read_prompts(file, 0)


def test_answers_after_the_last_user_turn_are_left_out_of_the_prompt():
    tokenizer = make_tokenizer("mistral")
    found = tokenizer.decode(prompt_tokens(tokenizer, Prompt("a", (USER, ANSWER, USER, ANSWER))))
    assert found == "<s>[INST] Hi[/INST] Hello</s>[INST] Hi[/INST]"
    whole = tokenizer.decode(conversation_tokens(tokenizer, Prompt("a", (USER, ANSWER))))
    assert whole == "<s>[INST] Hi[/INST] Hello</s>"


def test_special_tokens_are_the_templates_or_the_tokenizers_but_not_both():
    tokenizer = make_tokenizer("mistral")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    prompt = Prompt("a", (USER,))
    assert tokenizer.decode(prompt_tokens(tokenizer, prompt)) == "<s>[INST] Hi[/INST]"
    tokenizer.chat_template = None
    assert tokenizer.decode(prompt_tokens(tokenizer, prompt)) == "<s>Hi"


def test_without_a_chat_template_one_turn_is_continued_as_it_is():
    tokenizer = make_tokenizer("vicuna")
    assert tokenizer.decode(prompt_tokens(tokenizer, Prompt("a", (USER,)))) == "Hi"
    with pytest.raises(ValueError, match="prompt a has 3 turns, but the tokenizer has no chat template"):
        prompt_tokens(tokenizer, Prompt("a", (USER, ANSWER, USER)))


def test_a_prompt_without_user_turn_is_refused():
    with pytest.raises(ValueError, match="prompt a has no user turn, expected one to answer"):
        prompt_tokens(make_tokenizer("zephyr"), Prompt("a", (ANSWER,)))
