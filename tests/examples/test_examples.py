"""Every YAML in examples/medusa is accepted by axolotl and by us, follows its recipe and opens with what it says it is."""

from __future__ import annotations

import re

import pytest
import yaml
from example_files import (
    BIG,
    FINE_TUNE,
    FOLDER,
    GPUS,
    LORA,
    MEDUSA_1,
    NAMES,
    ROOT,
    SELF_DISTILLATION,
    STAGE_2,
    header_of,
    known_keys,
    load,
    text_of,
)

from axolotl_medusa.training.renamed_keys import renamed_key_hints
from axolotl_medusa.training.yaml_problems import config_problems

pytestmark = pytest.mark.usefixtures("no_network")

EVERYWHERE = {
    "medusa_num_heads": 5,
    "medusa_num_layers": 1,
    "medusa_decay_coefficient": 0.8,
    "medusa_lr_multiplier": 4.0,
    "num_epochs": 2,
    "lr_scheduler": "cosine",
    "sample_packing": True,
    "weight_decay": 0.0,
}
RECIPES = {
    "vicuna_7b_medusa1": MEDUSA_1,
    "vicuna_7b_stage2": {**STAGE_2, "adapter": "lora", "medusa_init_from": "./outputs/vicuna-7b-medusa1"},
    "vicuna_7b_qlora_stage1": {**MEDUSA_1, **LORA, "adapter": "qlora", "load_in_4bit": True},
    "vicuna_7b_qlora_stage2": {
        **STAGE_2,
        "adapter": "qlora",
        "load_in_4bit": True,
        "medusa_init_from": "./outputs/vicuna-7b-qlora-stage1",
    },
    "zephyr_7b_self_distillation": {**SELF_DISTILLATION, "adapter": "lora"},
    "mistral_7b_instruct": MEDUSA_1,
    "qwen3": {**SELF_DISTILLATION, "adapter": "lora"},
    "qwen3_fine_tune": {**STAGE_2, **FINE_TUNE, "adapter": "lora"},
    "qwen3_32b": {**SELF_DISTILLATION, "adapter": "lora"},
}


@pytest.mark.parametrize("name", NAMES)
def test_example_is_accepted_by_the_plugin_and_by_axolotl(name, validated, with_local_paths, axolotl_warnings):
    cfg = with_local_paths(load(name))
    assert config_problems(cfg) == []
    assert renamed_key_hints(cfg) == []
    assert set(cfg) <= known_keys()
    result = validated(cfg)
    assert {key: result[key] for key in cfg if key.startswith(("medusa_", "lora_"))} == {
        key: value for key, value in cfg.items() if key.startswith(("medusa_", "lora_"))
    }
    assert result.attn_implementation == ("sdpa" if name == "smollm2" else "flash_attention_2")
    assert not any(result[f"lora_{part}_kernel"] for part in ("mlp", "qkv", "o", "embedding"))
    assert [line for line in axolotl_warnings if "deprecated" in line or "ignored" in line] == []


@pytest.mark.parametrize("name", NAMES)
def test_example_names_files_that_exist(name):
    cfg = load(name)
    named = re.findall(r"[\w./-]+\.(?:py|yml|jinja)\b", header_of(name))
    named += re.findall(r"deepspeed_configs/\w+\.json", text_of(name))
    named += [cfg["chat_template_jinja"]] if cfg.get("chat_template_jinja") else []
    missing = [path for path in named if not (ROOT / path).is_file() and not (FOLDER / path).is_file()]
    assert missing == []
    prompts = re.findall(r"--data_path (\S+)", text_of(name))
    assert [path for path in prompts if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("name", NAMES)
def test_example_opens_with_what_it_needs_and_how_to_run(name):
    header = header_of(name)
    for start in ("Needs:", "Data:", "Run:"):
        assert re.search(rf"^{start}", header, re.MULTILINE), start
    pattern = rf"accelerate launch (--num_processes \d+ )?-m axolotl\.cli\.train examples/medusa/{name}\.yml"
    assert re.search(pattern, header)


@pytest.mark.parametrize("name", BIG)
def test_example_for_gpus_says_what_comes_next_and_its_limits(name):
    header, cfg = header_of(name), load(name)
    output = cfg["output_dir"].removeprefix("./")
    assert re.search(r"^Limits:", header, re.MULTILINE)
    assert f'"model": "{output}/medusa_heads"' in header
    merges = f"axolotl merge-lora examples/medusa/{name}.yml" in header
    assert merges is not cfg["medusa_only_heads"]
    assert not merges or f"{output}/merged" in header


@pytest.mark.parametrize("name", BIG)
def test_example_has_the_values_of_its_recipe(name):
    expected = {**EVERYWHERE, **RECIPES[name]}
    expected["optimizer"] = "adamw_torch_fused" if name == "qwen3_32b" else "adamw_bnb_8bit"
    cfg = load(name)
    assert {key: cfg.get(key) for key in expected} == expected
    if not cfg.get("adapter"):
        assert not any(key.startswith("lora_") for key in cfg)
    assert bool(cfg.get("medusa_self_distillation")) is bool(RECIPES[name].get("medusa_self_distillation"))
    per_step = cfg["micro_batch_size"] * cfg["gradient_accumulation_steps"] * GPUS.get(name, 1)
    assert per_step == 8
    if name in ("vicuna_7b_medusa1", "vicuna_7b_stage2", "zephyr_7b_self_distillation"):
        assert (cfg["micro_batch_size"], cfg["gradient_accumulation_steps"]) == (2, 4)


def test_every_example_has_a_recipe():
    assert set(RECIPES) == set(BIG)


def test_stage_2_starts_where_stage_1_writes():
    for stage_2, stage_1 in (
        ("vicuna_7b_stage2", "vicuna_7b_medusa1"),
        ("vicuna_7b_qlora_stage2", "vicuna_7b_qlora_stage1"),
    ):
        assert load(stage_2)["medusa_init_from"] == load(stage_1)["output_dir"] != load(stage_2)["output_dir"]


def test_qwen3_marks_the_lines_that_make_it_medusa_1(validated):
    marked = re.findall(r"^(\w+): \S+ # Medusa-1: (\S+)$", text_of("qwen3"), re.MULTILINE)
    changes = {key: yaml.safe_load(value) for key, value in marked}
    changes["learning_rate"] = float(changes["learning_rate"])
    assert len(marked) == 6 and "six lines" in header_of("qwen3")
    expected = {"medusa_self_distillation": False, **MEDUSA_1}
    assert changes == {key: expected[key] for key in changes}
    cfg = {**load("qwen3"), **changes}
    assert config_problems(cfg) == []
    assert validated(cfg).medusa_only_heads is True
