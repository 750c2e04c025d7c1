"""examples/medusa/README.md agrees with the YAMLs beside it, and what it says to edit is valid."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from example_files import EXAMPLES, LORA, MEDUSA_1, README, SELF_DISTILLATION, STAGE_2, load, table_after

from axolotl_medusa.training.yaml_problems import config_problems

pytestmark = pytest.mark.usefixtures("no_network")


def test_readme_table_names_every_yaml_and_agrees_with_it():
    header, *rows = table_after("# Recipes")
    assert header[0] == "file"
    assert sorted(row[0].strip("`") for row in rows) == [file.name for file in EXAMPLES]
    for file, model, recipe, heads, rate, coefficient, lora, context, _, launch in rows:
        cfg = load(Path(file.strip("`")).stem)
        if not cfg["base_model"].startswith("."):
            bits = ", 4 bits" if cfg.get("load_in_4bit") else ""
            assert model == cfg["base_model"].split("/")[1] + bits
        assert ("Medusa-1" in recipe) is cfg["medusa_only_heads"]
        assert ("self-distillation" in recipe) is bool(cfg.get("medusa_self_distillation"))
        assert ("stage 2" in recipe) is ("medusa_init_from" in cfg)
        assert heads == f"{cfg['medusa_num_heads']} {cfg['medusa_lm_head']}"
        assert float(rate) == cfg["learning_rate"]
        schedule = cfg.get("medusa_scheduler", "constant")
        assert coefficient == f"{cfg['medusa_heads_coefficient']} {schedule}"
        frozen = ", frozen" if cfg["medusa_only_heads"] else ""
        assert lora == (f"r {cfg['lora_r']}{frozen}" if cfg.get("adapter") else "–")
        assert int(context) == cfg["sequence_len"]
        assert (Path(str(cfg.get("deepspeed"))).name in launch) is bool(cfg.get("deepspeed"))


RECIPE_COLUMNS = {1: MEDUSA_1, 2: STAGE_2, 3: SELF_DISTILLATION}


@pytest.mark.parametrize("column", RECIPE_COLUMNS)
@pytest.mark.parametrize("name", ["vicuna_7b_stage2", "qwen3"])
def test_switching_the_recipe_as_the_readme_says_is_valid(name, column, validated, with_local_paths):
    header, *rows = table_after("## The recipes and the paper")
    assert header[column].startswith("Medusa-1" if column == 1 else "Medusa-2")
    lines = {row[0].strip("`"): yaml.safe_load(row[column]) for row in rows}
    lines = {key: float(value) if key == "learning_rate" else value for key, value in lines.items()}
    expected = {"medusa_self_distillation": False, **RECIPE_COLUMNS[column]}
    assert lines == {key: expected[key] for key in lines}
    cfg = {**with_local_paths(load(name)), **lines}
    assert config_problems(cfg) == []
    assert validated(cfg).medusa_scheduler == lines["medusa_scheduler"]


def test_readme_lora_lines_are_those_of_the_examples():
    section = README[README.index("## Switch recipe") : README.index("## Prompts")]
    block = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    assert yaml.safe_load(block) == {key: load("vicuna_7b_stage2")[key] for key in yaml.safe_load(block)}
    assert LORA.items() <= yaml.safe_load(block).items()
