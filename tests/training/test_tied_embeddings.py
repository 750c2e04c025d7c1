"""An adapter on the lm_head of a tied model: who merges it rightly, and that training says so."""

from __future__ import annotations

import json
import logging

import pytest
from axolotl.utils.dict import DictDefault
from conftest import AXOLOTL_YAML, LORA, add_lora, make_model

from axolotl_medusa.training.plugin import MedusaPlugin
from axolotl_medusa.training.tied_embeddings import merge_would_part, parts_tied_embeddings

TARGETS = {"lm_head": ["q_proj", "lm_head"], "attention": ["q_proj"], "tokens": ["embed_tokens"]}
ADVICE = "axolotl-medusa export out --to vllm --out DIR --model merged"


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gemma"])
@pytest.mark.parametrize("targets", TARGETS)
def test_adapter_parts_tied_embeddings_where_it_changes_one_of_them(family, targets):
    model = add_lora(make_model(family), targets=TARGETS[targets])
    assert parts_tied_embeddings(model) is (family != "llama" and targets != "attention")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"modules_to_save": ["lm_head"]}, True),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, True),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
        ({"trainable_token_indices": [3, 4]}, False),
        ({}, False),
    ],
)
def test_adapter_with_copies_of_embeddings_parts_them_unless_peft_ties_them(options, parts):
    assert parts_tied_embeddings(add_lora(make_model("llama-tied"), targets=["q_proj"], **options)) is parts


@pytest.fixture
def advice(caplog):
    """Lines of the plugin that say how to merge."""
    logger = logging.getLogger("axolotl_medusa.training.plugin")
    logger.addHandler(caplog.handler)
    yield lambda: {record.getMessage() for record in caplog.records if "merge-lora" in record.getMessage()}
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("family", "only_heads", "warns"),
    [("llama-tied", False, True), ("llama-tied", True, False), ("llama", False, False)],
)
def test_training_says_how_to_merge_lm_head_of_a_tied_model(family, only_heads, warns, advice):
    model = make_model(family)
    keys = {"medusa_only_heads": only_heads, "medusa_num_heads": 2, "medusa_num_layers": 1, "medusa_lm_head": "shared"}
    cfg = DictDefault({**AXOLOTL_YAML, **LORA, **keys, "output_dir": "out", "medusa_logging": False})
    plugin = MedusaPlugin()
    plugin.post_model_build(cfg, model)
    plugin.post_lora_load(cfg, add_lora(model, targets=["lm_head"]))
    lines = advice()
    assert len(lines) == warns and all(ADVICE in line for line in lines)


@pytest.mark.parametrize(
    ("family", "targets", "warns"),
    [("llama-tied", ["lm_head"], True), ("llama-tied", ["q_proj"], False), ("llama", ["lm_head"], False)],
)
def test_merge_lora_itself_says_so_too(family, targets, warns, tmp_path, monkeypatch, advice):
    make_model(family).save_pretrained(tmp_path / "base")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps({"target_modules": targets}))
    monkeypatch.chdir(tmp_path)
    cfg = DictDefault({**AXOLOTL_YAML, **LORA, "base_model": "./base", "output_dir": "out", "medusa_num_heads": 2})
    assert merge_would_part(cfg) is warns
    MedusaPlugin().register(cfg)
    assert advice() == set(), "only the command that merges says so"
    MedusaPlugin().register(DictDefault({**cfg, "merge_lora": True, "lora_model_dir": "out"}))
    lines = advice()
    assert len(lines) == warns and all(ADVICE in line for line in lines)


def test_merge_lora_without_an_adapter_on_disk_is_axolotls_to_speak_of():
    assert not merge_would_part({"output_dir": "nowhere", "base_model": "org/model"})
