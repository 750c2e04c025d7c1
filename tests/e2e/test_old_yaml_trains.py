"""The YAML of the first Medusa fork of axolotl trains once the plugin is added and its hints are followed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from axolotl_process import log_history
from conftest import make_model
from example_files import old_yaml, with_hints_applied
from transformers import LlamaTokenizer

from axolotl_medusa.model.heads_directory import read_heads

pytestmark = pytest.mark.e2e

# What a CPU cannot do replaced.
CPU = {
    "attn_implementation": "sdpa",
    "bf16": False,
    "optimizer": "adamw_torch",
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
}
SHORT = {"sequence_len": 1024, "max_steps": 2}


@pytest.fixture
def vicuna(tmp_path) -> Path:
    """A random 2-layer Llama with a tokenizer of the class and special tokens that the YAML names, one token a byte."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokenizer = LlamaTokenizer(vocab={token: number for number, token in enumerate(vocabulary)}, merges=[])
    tokenizer.save_pretrained(tmp_path / "vicuna")
    make_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024).save_pretrained(tmp_path / "vicuna")
    return tmp_path / "vicuna"


@pytest.fixture
def sharegpt(tmp_path) -> Path:
    """200 conversations in one JSON array, as ShareGPT has them."""
    rows = []
    for number in range(200):
        answer = " ".join(str(number + k) for k in range(3 + number % 9))
        turns = [{"from": "human", "value": f"Count from {number}."}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "conversations": turns})
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def test_old_yaml_with_the_hints_applied_trains_and_writes_heads(axolotl, vicuna, sharegpt, tmp_path):
    cfg = {**with_hints_applied(old_yaml()), **CPU, **SHORT}
    cfg |= {"base_model": str(vicuna), "base_model_config": str(vicuna), "output_dir": str(tmp_path / "out")}
    cfg["datasets"][0]["path"] = str(sharegpt)
    file = tmp_path / "old.yml"
    file.write_text(yaml.safe_dump(cfg), encoding="utf-8")
    axolotl("train", file)
    heads = read_heads(tmp_path / "out" / "medusa_heads").head_tensors()
    moved = {name for name, tensor in heads.items() if ".linear." in name and tensor.abs().max() > 0}
    assert len(moved) == 2 * cfg["medusa_num_heads"], "every head's weight and bias left zero"
    logs = [entry for entry in log_history(tmp_path / "out") if "loss" in entry]
    assert len(logs) == 2 and "medusa4_loss" in logs[-1]
