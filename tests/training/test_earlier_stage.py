"""`lora_model_dir` as the first fork's second stage has it: the heads there are used, or one line says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import AXOLOTL_YAML, LORA

from axolotl_medusa.training.earlier_stage import adapter_with_heads_problems, take_heads_of_earlier_stage

MEDUSA_2 = {**AXOLOTL_YAML, **LORA, "medusa_num_heads": 3}


def write_run(directory: Path, recipe: str, *files: str, **yaml: str) -> Path:
    """What training leaves: heads, and files of an adapter or a model."""
    heads = directory / "medusa_heads"
    heads.mkdir(parents=True)
    config = {"medusa_num_heads": 3, "medusa_num_layers": 1, "original_lm_head": False}
    (heads / "config.json").write_text(json.dumps(config))
    (heads / "medusa_lm_head.safetensors").touch()
    (heads / "medusa_meta.json").write_text(json.dumps({"recipe": recipe, "yaml": yaml}))
    for name in files:
        (directory / name).write_text("{}")
    return directory


def test_lora_model_dir_of_a_medusa_1_run_gives_its_heads(tmp_path, validated):
    stage_1 = str(write_run(tmp_path / "stage-1", "medusa-1"))
    cfg = validated({**MEDUSA_2, "lora_model_dir": stage_1})
    assert cfg.medusa_init_from == stage_1 and cfg.lora_model_dir is None


def test_lora_model_dir_of_a_medusa_1_run_on_an_adapter_gives_both(tmp_path):
    stage_1 = str(write_run(tmp_path / "stage-1", "medusa-1", lora_model_dir="earlier"))
    cfg = {**MEDUSA_2, "lora_model_dir": stage_1}
    lines = take_heads_of_earlier_stage(cfg)
    assert (cfg["medusa_init_from"], cfg["lora_model_dir"]) == (stage_1, "earlier") and len(lines) == 2


def test_lora_model_dir_of_a_medusa_2_run_gives_its_adapter_and_its_heads(tmp_path):
    run = str(write_run(tmp_path / "run", "medusa-2", "adapter_config.json"))
    cfg = {**MEDUSA_2, "lora_model_dir": run}
    (line,) = take_heads_of_earlier_stage(cfg)
    assert (cfg["medusa_init_from"], cfg["lora_model_dir"]) == (run, run) and run in line


def test_heads_that_the_yaml_names_come_before_those_beside_the_adapter(tmp_path):
    run = str(write_run(tmp_path / "run", "medusa-2", "adapter_config.json"))
    cfg = {**MEDUSA_2, "lora_model_dir": run, "medusa_init_from": "mine"}
    assert take_heads_of_earlier_stage(cfg) == [] and cfg["medusa_init_from"] == "mine"


@pytest.mark.parametrize("keys", [{}, {"lora_model_dir": None}, {"lora_model_dir": "org/adapter"}])
def test_other_lora_model_dirs_are_left_as_they_are(keys):
    cfg = {**MEDUSA_2, **keys}
    assert take_heads_of_earlier_stage(cfg) == [] and cfg == {**MEDUSA_2, **keys}


@pytest.mark.parametrize("command", ["merge_lora", "inference"])
def test_commands_that_only_read_an_adapter_leave_it(command, tmp_path):
    run = str(write_run(tmp_path / "run", "medusa-1"))
    cfg = {**MEDUSA_2, "lora_model_dir": run, command: True}
    assert take_heads_of_earlier_stage(cfg) == [] and cfg["lora_model_dir"] == run


def test_lora_model_dir_of_a_full_model_is_one_line(tmp_path, validated):
    run = str(write_run(tmp_path / "run", "medusa-2", "model.safetensors"))
    with pytest.raises(SystemExit, match="training wrote as an adapter; a full model is named as base_model"):
        validated({**MEDUSA_2, "lora_model_dir": run})


@pytest.mark.parametrize("modules", [["medusa_head"], ["medusa_head.0", "medusa_head.1"]])
def test_adapter_with_heads_among_its_modules_is_refused_with_the_way(modules, tmp_path, validated):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"modules_to_save": modules}))
    cfg = {**MEDUSA_2, "lora_model_dir": str(adapter)}
    with pytest.raises(SystemExit, match=rf"axolotl-medusa import {adapter} --to canonical.*medusa_init_from"):
        validated(cfg)
    assert adapter_with_heads_problems({**cfg, "medusa_init_from": "heads"}) == []
    (adapter / "adapter_config.json").write_text(json.dumps({"modules_to_save": ["lm_head"]}))
    assert adapter_with_heads_problems(cfg) == []
