"""Tokens that the base model does not have: refused in Medusa-1 before anything is loaded, and told of in Medusa-2."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from axolotl.utils.dict import DictDefault
from conftest import AXOLOTL_YAML, LORA, make_model
from example_tokenizers import make_tokenizer

from axolotl_medusa.training.plugin import MedusaPlugin
from axolotl_medusa.training.vocabulary import check_rows, new_tokens

PAD = {"special_tokens": {"pad_token": "<|padding|>"}}


@pytest.fixture
def base(tmp_path) -> Path:
    """A model whose embeddings have exactly its tokenizer's tokens."""
    tokenizer = make_tokenizer("zephyr")
    make_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def loads_datasets(validated, base):
    """What happens after axolotl's validation and before it loads data or a model."""

    def run(**keys):
        cfg = validated({**AXOLOTL_YAML, "base_model": str(base), "medusa_num_heads": 3, "output_dir": "out", **keys})
        cfg.tokenizer_config, cfg.base_model_config = str(base), str(base)
        MedusaPlugin().load_datasets(cfg)

    return run


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        (PAD, r"'<\|padding\|>'.*special_tokens pad_token: use '</s>', which it has"),
        (
            {"tokens": ["<|extra|>", "<|two|>"]},
            r"'<\|extra\|>', '<\|two\|>'.*tokens: remove them.*added_tokens_overrides",
        ),
        (
            {"special_tokens": {"additional_special_tokens": ["<|a|>", "<|b|>", "<|c|>", "<|d|>"]}},
            "and 1 more.*tokens: remove",
        ),
        ({**PAD, "tokens": ["<|extra|>"]}, "pad_token: use .*tokens: remove"),
        ({**PAD, **LORA}, "pad_token: use"),
    ],
)
def test_new_token_in_medusa_1_is_refused_with_what_to_use_instead(keys, advice, loads_datasets):
    with pytest.raises(SystemExit, match=rf"embeddings for 264 tokens.*{advice}"):
        loads_datasets(medusa_only_heads=True, **keys)


def test_token_that_the_model_has_is_accepted(loads_datasets):
    loads_datasets(medusa_only_heads=True, special_tokens={"pad_token": "<unk>"}, tokens=["<think>"])


def test_model_with_room_for_a_new_token_is_accepted(loads_datasets, base):
    """Embeddings are often padded: axolotl does not resize them then."""
    make_model("llama", vocab_size=272).save_pretrained(base)
    loads_datasets(medusa_only_heads=True, **PAD)


def test_tokenizer_of_another_model_is_named_as_the_fault(loads_datasets, base):
    make_model("llama", vocab_size=200).save_pretrained(base)
    with pytest.raises(SystemExit, match=r"embeddings for 200 tokens.*set tokenizer_config to the right one"):
        loads_datasets(medusa_only_heads=True)


@pytest.mark.parametrize(
    ("keys", "served"),
    [({}, "serve the model in out"), (LORA, "axolotl-medusa export out --to vllm .* --model merged")],
)
def test_new_token_in_medusa_2_says_what_to_serve(keys, served, loads_datasets, caplog):
    logger = logging.getLogger("axolotl_medusa.training.vocabulary")
    logger.addHandler(caplog.handler)
    loads_datasets(**PAD, **keys)
    logger.removeHandler(caplog.handler)
    (line,) = {record.getMessage() for record in caplog.records if "new to base_model" in record.getMessage()}
    assert re.search(served, line)


def test_new_tokens_are_those_without_a_row():
    tokenizer = make_tokenizer("zephyr")
    assert new_tokens(tokenizer, len(tokenizer)) == []
    assert len(new_tokens(tokenizer, len(tokenizer) - 2)) == 2


def test_embeddings_of_another_size_in_medusa_1_are_refused_whatever_resized_them():
    with pytest.raises(ValueError, match=r"have 100 rows, and axolotl made 128.*resize_token_embeddings_to_32x"):
        check_rows(DictDefault(medusa_only_heads=True, base_model="m"), before=100, after=128)
    check_rows(DictDefault(medusa_only_heads=True), before=100, after=100)
    check_rows(DictDefault(medusa_only_heads=False), before=100, after=128)
