"""YAMLs of the first Medusa fork of axolotl: a hint for every key that axolotl has changed since, and for no other."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from example_files import LORA, OLD_YAMLS, known_keys, old_yaml, table_after, with_hints_applied

from axolotl_medusa.training.renamed_keys import RENAMED_BY_AXOLOTL, renamed_key_hints
from axolotl_medusa.training.yaml_problems import config_problems

pytestmark = pytest.mark.usefixtures("no_network")

PROBES: dict[str, Any] = {
    "lora_model_dir": "adapter",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    "lora_fan_in_fan_out": False,
    "adapter": "lora",
    "dataset_prepared_path": "prepared",
    "wandb_project": "medusa",
    "wandb_entity": "me",
    "wandb_watch": "gradients",
    "wandb_run_id": "run",
    "wandb_log_model": "end",
    "early_stopping_patience": 3,
    "resume_from_checkpoint": "checkpoint-1",
    "local_rank": 0,
    "xformers_attention": True,
    "save_steps": 40,
    "debug": True,
    "deepspeed": "deepspeed/zero2.json",
    "fsdp": ["full_shard"],
    "fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
}
"""A value for each key that the old YAML leaves blank."""
TOGETHER = {"early_stopping_patience": {"save_steps": 40}, "xformers_attention": {"flash_attention": None}}
ANYTHING = {
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "max_packed_sequence_len": 2048,
    "noisy_embedding_alpha": 5.0,
    "dataset_processes": 2,
    "evaluation_strategy": "steps",
    "wandb_run_id": "run",
    "eval_table_size": 5,
    "eval_max_new_tokens": 64,
}
SET_BY_AXOLOTL = {"local_rank", *(key for key in RENAMED_BY_AXOLOTL if key.endswith("_derived_model"))}


def changed_in_axolotl(
    key: str, value: Any, validated: Callable[..., Any], warnings: list[str], cfg: Mapping[str, Any]
) -> bool:
    """Whether axolotl refuses `key`, does not know it, takes it for another, or warns that it is not what it was."""
    before = set(warnings)
    if key not in known_keys():
        return True
    try:
        result = validated({**cfg, key: value})
    except (ValueError, DeprecationWarning):
        return True
    if key not in result and key != "model_type":  # an alias of type_of_model
        return True
    new = [line for line in warnings if line not in before and key in line]
    return any("deprecated" in line or "instead" in line for line in new)


def test_old_yaml_is_accepted_by_the_plugin_and_refused_by_axolotl(validated):
    cfg = {**old_yaml(), "plugins": ["axolotl_medusa.MedusaPlugin"]}
    assert config_problems(cfg) == []
    with pytest.raises(ValueError, match="sharegpt"):
        validated(cfg)
    hints = renamed_key_hints(cfg)
    assert sorted(hint.split(":")[0].split(" (")[0] for hint in hints) == [
        "datasets type sharegpt",
        "flash_attention",
        "is_llama_derived_model",
    ]


def test_old_yaml_with_the_hints_applied_is_accepted_without_a_deprecation(validated, axolotl_warnings):
    cfg = with_hints_applied(old_yaml())
    assert renamed_key_hints(cfg) == []
    result = validated(cfg)
    assert [line for line in axolotl_warnings if "deprecated" in line] == []
    assert {key for key, value in cfg.items() if value is not None} <= known_keys(), "blank keys may stay"
    for key in ("medusa_num_heads", "medusa_heads_coefficient", "learning_rate", "sequence_len", "optimizer"):
        assert result[key] == cfg[key]


def test_old_yaml_hints_come_before_axolotl_stops(validated, caplog):
    logging.getLogger("axolotl_medusa.training.plugin").addHandler(caplog.handler)
    with pytest.raises(ValueError, match="sharegpt"):
        validated({**old_yaml(), "plugins": ["axolotl_medusa.MedusaPlugin"]})
    logging.getLogger("axolotl_medusa.training.plugin").removeHandler(caplog.handler)
    assert any("flash_attention: use attn_implementation" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("key", sorted({*PROBES, *old_yaml()} - {"datasets", "plugins", "base_model"}))
def test_old_key_has_a_hint_where_axolotl_changed_it(key, validated, axolotl_warnings):
    value = old_yaml().get(key)
    value = PROBES[key] if value is None else value
    cfg = {**with_hints_applied(old_yaml()), **TOGETHER.get(key, {}), "adapter": "lora", **LORA}
    if key in ("flash_attention", "xformers_attention"):
        del cfg["attn_implementation"]
    del cfg["special_tokens"]
    hinted = bool(renamed_key_hints({key: value}))
    if key in SET_BY_AXOLOTL:
        assert hinted
    elif key in ("fsdp", "fsdp_config", "deepspeed"):
        assert hinted is (key != "fsdp_config"), "their values have changed, not their names"
    else:
        assert hinted is changed_in_axolotl(key, value, validated, axolotl_warnings, cfg)


@pytest.mark.parametrize("key", sorted(set(RENAMED_BY_AXOLOTL) - SET_BY_AXOLOTL))
def test_hint_is_for_a_key_that_axolotl_did_change(key, validated, axolotl_warnings):
    cfg = with_hints_applied(old_yaml())
    if key.endswith("_attention"):
        del cfg["attn_implementation"]
    assert changed_in_axolotl(key, ANYTHING.get(key, True), validated, axolotl_warnings, cfg)


def test_hint_names_a_key_that_axolotl_knows():
    named = {key: re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", hint) for key, hint in RENAMED_BY_AXOLOTL.items()}
    values = {"flash_attention_2"}
    assert {word for words in named.values() for word in words} - known_keys() - values == set()


def test_hint_for_blank_and_false_keys_is_none():
    assert renamed_key_hints({"debug": None, "xformers_attention": False, "fsdp": None, "deepspeed": None}) == []


def test_fsdp_1_of_an_old_yaml_is_a_hint():
    (hint,) = renamed_key_hints({"fsdp": ["full_shard", "auto_wrap"]})
    assert "fsdp_version: 2" in hint


def test_deepspeed_folder_of_an_old_yaml_is_a_hint_where_the_file_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (hint,) = renamed_key_hints({"deepspeed": "deepspeed/zero2.json"})
    assert "deepspeed_configs/zero2.json" in hint
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "zero2.json").touch()
    assert renamed_key_hints({"deepspeed": "deepspeed/zero2.json"}) == []


def test_page_lists_the_keys_of_old_yamls_that_have_hints():
    tables = (table_after(heading, OLD_YAMLS) for heading in ("## Replace values", "## Replace or remove keys"))
    listed = " ".join(row[0] for table in tables for row in table)
    values = {**PROBES, **{key: value for key, value in old_yaml().items() if value is not None}}
    hinted = {key for key, value in values.items() if renamed_key_hints({key: value})}
    assert {key for key in hinted if f"`{key}" not in listed} == set()
