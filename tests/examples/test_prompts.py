"""What the examples train and what they mask, in the prompt formats of their models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from example_files import ROOT, load
from example_tokenizers import make_tokenizer
from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.usefixtures("no_network")


def masked(tokenizer: PreTrainedTokenizerFast, cfg: Mapping[str, Any], row: dict[str, Any]) -> tuple[str, list[str]]:
    """A row as axolotl tokenises it: the whole text, and the pieces of it that have labels."""
    from axolotl.prompt_strategies.chat_template import load as load_strategy
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.datasets import SFTDataset

    dataset = SFTDataset(**cfg["datasets"][0]).model_dump(exclude_none=True)
    full = DictDefault({"train_on_inputs": False, **cfg})
    tokenized = load_strategy(tokenizer, full, ds_cfg=dataset).tokenize_prompt(row)
    pieces: list[list[int]] = [[]]
    for token, label in zip(tokenized["input_ids"], tokenized["labels"], strict=True):
        if label == -100:
            pieces.append([])
        else:
            assert label == token
            pieces[-1].append(token)
    return tokenizer.decode(tokenized["input_ids"]), [tokenizer.decode(piece) for piece in pieces if piece]


def test_vicuna_template_is_the_format_that_vicuna_was_tuned_on():
    """FastChat's `vicuna_v1.1` conversation, written out: separators " " and "</s>", "ROLE: " before each turn."""
    tokenizer = make_tokenizer("vicuna")
    tokenizer.chat_template = (ROOT / load("vicuna_7b_medusa1")["chat_template_jinja"]).read_text(encoding="utf-8")
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    turns = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "How are you?"},
    ]
    expected = f"<s>{system} USER: Hello! ASSISTANT: Hi!</s>USER: How are you? ASSISTANT:"
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == expected
    own = [{"role": "system", "content": "Be brief."}, *turns[:2]]
    assert tokenizer.apply_chat_template(own, tokenize=False) == "<s>Be brief. USER: Hello! ASSISTANT: Hi!</s>"
    with pytest.raises(Exception, match="found tool"):
        tokenizer.apply_chat_template([*turns[:2], {"role": "tool", "content": "1"}], tokenize=False)


def test_vicuna_trains_answers_and_their_end_only():
    cfg, tokenizer = load("vicuna_7b_medusa1"), make_tokenizer("vicuna")
    tokenizer.chat_template = (ROOT / cfg["chat_template_jinja"]).read_text(encoding="utf-8")
    turns = [("human", "Hello!"), ("gpt", "Hi!"), ("human", "More"), ("gpt", "Yes")]
    row = {"id": "1", "conversations": [{"from": role, "value": text} for role, text in turns]}
    text, trained = masked(tokenizer, cfg, row)
    assert text.endswith("USER: Hello! ASSISTANT: Hi!</s>USER: More ASSISTANT: Yes</s>")
    assert trained == ["Hi!</s>", "Yes</s>"]


@pytest.mark.parametrize(
    ("answer", "rendered", "trained"),
    [
        ("Yes.", "<think>\n\n</think>\n\nYes.<|im_end|>", ["Yes.<|im_end|>"]),
        (
            "<think>\nHm.\n</think>\n\nYes.",
            "<think>\nHm.\n</think>\n\nYes.<|im_end|>",
            ["Hm.\n</think>\n\nYes.<|im_end|>"],
        ),
    ],
    ids=["without thinking", "with thinking"],
)
def test_qwen3_trains_the_answer_and_its_thoughts_but_no_inserted_think_block(answer, rendered, trained):
    turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}]
    text, found = masked(make_tokenizer("qwen3"), load("qwen3"), {"messages": turns})
    assert text.rstrip("\n").endswith(f"<|im_start|>assistant\n{rendered}")
    assert found == trained
