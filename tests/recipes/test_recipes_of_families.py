"""Recipes for every family that is tested here: axolotl and the plugin accept them, without a warning."""

from __future__ import annotations

import json

import pytest
import yaml
from conftest import FAMILIES
from example_files import known_keys
from recipe_models import write_model

from axolotl_medusa.cli import main
from axolotl_medusa.recipes.yaml_text import KEYS
from axolotl_medusa.training.renamed_keys import renamed_key_hints
from axolotl_medusa.training.yaml_problems import config_problems

pytestmark = pytest.mark.usefixtures("no_network")

METHODS = ("medusa-1", "medusa-2", "self-distillation")
HAS_NO_LINEAR = ("gpt2",)
"""Families whose layers LoRA does not know as linear ones."""

CASES = [
    *((family, "medusa-1") for family in FAMILIES),
    *((family, "self-distillation") for family in FAMILIES if family not in HAS_NO_LINEAR),
    ("llama", "medusa-2"),
    ("llama-tied", "medusa-2"),
]


def write_stage_1(output_dir, heads):
    directory = output_dir / "medusa_heads"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(
        json.dumps({"medusa_num_heads": heads, "medusa_num_layers": 1, "original_lm_head": True})
    )
    (directory / "medusa_lm_head.safetensors").touch()


def accepted(file, validated, axolotl_warnings):
    cfg = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert config_problems(cfg) == []
    assert renamed_key_hints(cfg) == []
    assert set(cfg) <= known_keys()
    result = validated(cfg)
    asked = {key: value for key, value in cfg.items() if key.startswith(("medusa_", "lora_"))}
    assert {key: result[key] for key in asked} == asked
    assert [line for line in axolotl_warnings if "deprecated" in line or "ignored" in line] == []
    return cfg


@pytest.mark.parametrize(("family", "method"), CASES)
def test_recipe_of_a_family_is_accepted(family, method, tmp_path, monkeypatch, validated, axolotl_warnings, capsys):
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "tiny", family)
    write_stage_1(tmp_path / "outputs" / "tiny-medusa1", heads=5)
    assert main(["recipe", str(model), "--method", method, "--out", "my.yml"]) == 0
    cfg = accepted(tmp_path / "my.yml", validated, axolotl_warnings)
    assert set(cfg) <= KEYS
    assert cfg["base_model"] == str(model) and cfg["sequence_len"] == 128
    assert cfg["medusa_only_heads"] is (method == "medusa-1")
    assert ("adapter" in cfg) is (method != "medusa-1")
    tied = FAMILIES[family].get("tie_word_embeddings", False)
    assert ("lora_target_modules" in cfg) is (method != "medusa-1" and not tied)
    printed = capsys.readouterr().out
    for title in ("generate:\n", "train:\n  accelerate launch -m axolotl.cli.train my.yml\n", "serve:\n"):
        assert title in printed


@pytest.mark.parametrize("family", HAS_NO_LINEAR)
def test_family_without_linear_layers_trains_heads_alone(family, tmp_path, capsys):
    model = write_model(tmp_path / "tiny", family)
    assert main(["recipe", str(model), "--method", "self-distillation"]) == 1
    assert "expected --method medusa-1, which leaves the model as it is" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [["--gpus", "0"], ["--gpus", "4"], ["--gpus", "16"]],
    ids=" ".join,
)
@pytest.mark.parametrize("method", METHODS[1:])
def test_recipe_for_other_machines_is_accepted(method, options, tmp_path, monkeypatch, validated, axolotl_warnings):
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "tiny")
    write_stage_1(tmp_path / "outputs" / "tiny-medusa1", heads=3 if "0" in options else 5)
    assert main(["recipe", str(model), "--method", method, *options, "--out", "my.yml"]) == 0
    accepted(tmp_path / "my.yml", validated, axolotl_warnings)
