"""The YAMLs of the first Medusa fork of axolotl train once the plugin is added and its hints are followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl_process import log_history
from conftest import make_model
from example_files import FORK, fork_yaml, with_hints_applied
from example_tokenizers import ZEPHYR
from transformers import LlamaTokenizer

from axolotl_medusa.model.heads_directory import read_heads

pytestmark = pytest.mark.e2e

# What a CPU cannot do replaced.
CPU = {"attn_implementation": "sdpa", "bf16": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Random 2-layer models with tokenizers of the class and special tokens that the YAMLs name, one token a byte."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "max_position_embeddings": 4096}
    folder, found = tmp_path_factory.mktemp("models"), {}
    for kind, family in (("LlamaForCausalLM", "llama"), ("MistralForCausalLM", "mistral")):
        tokenizer = LlamaTokenizer(vocab={token: number for number, token in enumerate(vocabulary)}, merges=[])
        tokenizer.chat_template = ZEPHYR if family == "mistral" else None
        found[kind] = folder / family
        tokenizer.save_pretrained(found[kind])
        make_model(family, vocab_size=len(tokenizer), **sizes).save_pretrained(found[kind])
    return found


@pytest.fixture(scope="module")
def sharegpt(tmp_path_factory) -> Path:
    """80 conversations in one JSON array, as ShareGPT has them."""
    rows = []
    for number in range(80):
        answer = " ".join(str(number + k) for k in range(3 + number % 9))
        turns = [{"from": "human", "value": f"Count from {number}."}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "conversations": turns})
    file = tmp_path_factory.mktemp("data") / "sharegpt.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """Where the runs write: the second stages find the first there."""
    return tmp_path_factory.mktemp("outputs")


def on_cpu(name: str, models: dict[str, Path], sharegpt: Path, outputs: Path) -> dict[str, Any]:
    """A recipe of the fork, its hints followed, with another model, other data, and nothing that a CPU cannot do."""
    old = fork_yaml(name)
    cfg = {**with_hints_applied(old), **CPU, "base_model_config": None}
    if old["model_type"] == "MistralForCausalLM":  # the hint: where the tokenizer has no chat template
        cfg = {key: value for key, value in cfg.items() if not key.startswith("chat_template")}
    cfg |= {"base_model": str(models[old["model_type"]]), "output_dir": str(outputs / name)}
    cfg["datasets"][0]["path"] = str(sharegpt)
    if cfg.get("lora_model_dir"):
        cfg["lora_model_dir"] = str(outputs / "vicuna_7b_qlora_stage1")
    return cfg


def write(cfg: dict[str, Any], file: Path) -> Path:
    file.write_text(yaml.safe_dump(cfg), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", FORK)
def test_old_yaml_with_the_hints_applied_trains_and_writes_heads(name, axolotl, models, sharegpt, outputs, tmp_path):
    cfg = on_cpu(name, models, sharegpt, outputs)
    stage_1 = outputs / "vicuna_7b_qlora_stage1"
    if cfg.get("lora_model_dir") and not stage_1.is_dir():
        axolotl("train", write(on_cpu(stage_1.name, models, sharegpt, outputs), tmp_path / "stage1.yml"))
    result = axolotl("train", write(cfg, tmp_path / "old.yml"))
    output = Path(cfg["output_dir"])
    heads = read_heads(output / "medusa_heads").head_tensors()
    moved = {name for name, tensor in heads.items() if ".linear." in name and tensor.abs().max() > 0}
    assert len(moved) == 2 * cfg["medusa_num_heads"], "every head's weight and bias left zero"
    logs = [entry for entry in log_history(output) if "loss" in entry]
    assert len(logs) == 2 and "medusa4_loss" in logs[-1]
    assert (output / "adapter_model.safetensors").is_file() is (not cfg["medusa_only_heads"])
    assert (f"Medusa heads start from {stage_1}" in result.output) is bool(cfg.get("lora_model_dir"))


def test_old_yaml_as_it_is_ends_with_the_hints(axolotl, models, sharegpt, outputs, tmp_path):
    """What axolotl itself says of it is a traceback; nothing of ours may stand above one."""
    cfg = {**fork_yaml("zephyr_together"), "plugins": ["axolotl_medusa.MedusaPlugin"], "base_model_config": None}
    cfg["base_model"] = str(models["MistralForCausalLM"])
    result = axolotl("train", write(cfg, tmp_path / "old.yml"), ok=False)
    lines = [line for line in result.output.splitlines() if line.strip()]
    first = next(number for number, line in enumerate(lines) if line.startswith("axolotl-medusa: axolotl refuses"))
    assert "sharegpt" in lines[first] and "Traceback" not in result.output
    keys = {line.strip(" -").split(":")[0].split(" (")[0] for line in lines[first + 2 :]}
    assert keys == {"datasets type sharegpt", "flash_attention", "is_mistral_derived_model", "debug"}
