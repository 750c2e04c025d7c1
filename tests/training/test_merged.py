"""Heads beside a model that `axolotl merge-lora` merged: they belong to that model and decode with it."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from axolotl.utils.dict import DictDefault
from conftest import VOCAB, add_lora, make_model
from peft import PeftModel
from safetensors.torch import load_file
from training_outputs import save_base, save_tokenizer, write_run
from transformers import AutoModelForCausalLM

from axolotl_medusa.decoding.load_decoder import find_original
from axolotl_medusa.decoding.load_target import load_target
from axolotl_medusa.model.sources import find_source
from axolotl_medusa.training.plugin import MedusaPlugin


@pytest.fixture
def run(tmp_path):
    """A run with an adapter, and its model merged by peft as axolotl's slower way merges it."""

    def make(form="shared", recipe="medusa-2", **model):
        base, out = save_base(tmp_path / "base", make_model(**model)), tmp_path / "out"
        adapter = out if recipe == "medusa-2" else tmp_path / "adapter"
        targets = ["q_proj", "lm_head"]
        add_lora(make_model(**model), targets).save_pretrained(adapter)
        yaml = {} if recipe == "medusa-2" else {"lora_model_dir": str(adapter)}
        write_run(out, add_lora(make_model(**model), targets), recipe, base, form, yaml=yaml)
        merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
        merged.save_pretrained(out / "merged")
        save_tokenizer(out / "merged")
        return out, adapter

    return make


def merge_hook(out, adapter):
    cfg = DictDefault({"output_dir": str(out), "base_model": str(out.parent / "base"), "merge_lora": True})
    cfg["lora_model_dir"] = str(adapter)
    MedusaPlugin().post_lora_merge(cfg, str(adapter), str(out / "merged"))


@pytest.mark.parametrize("recipe", ["medusa-1", "medusa-2"])
@pytest.mark.parametrize("form", ["shared", "separate"])
def test_heads_beside_the_merged_model_belong_to_it(form, recipe, run):
    out, adapter = run(form, recipe)
    merge_hook(out, adapter)
    merged = out / "merged"
    source = find_source(merged)
    assert source.adapter_dir is None and source.model_dir() == merged
    model, file = load_target(merged, dtype=torch.float32)  # compares the hash of lm_head
    trained = load_file(out / "medusa_heads" / "medusa_lm_head.safetensors")
    assert trained.keys() == file.tensors.keys()
    for name, tensor in file.tensors.items():
        expected = model.lm_head.weight if name == "lm_heads.0.weight" and form == "shared" else trained[name]
        assert torch.equal(tensor, expected), name
    alone = find_source(merged / "medusa_heads")
    assert alone.model_dir() == merged and alone.config["base_model_name_or_path"] == str(merged)
    assert (merged / "medusa_heads" / "tokenizer_config.json").is_file()
    original = find_original(merged, None, None)
    assert original.model_dir() == (merged if recipe == "medusa-1" else out.parent / "base")


def test_second_merge_replaces_the_heads_of_the_first(run):
    out, adapter = run()
    merge_hook(out, adapter)
    first = (out / "merged" / "medusa_heads" / "medusa_lm_head.safetensors").read_bytes()
    (out / "merged" / "medusa_heads" / "medusa_lm_head.safetensors").write_bytes(b"damaged")
    merge_hook(out, adapter)
    assert (out / "merged" / "medusa_heads" / "medusa_lm_head.safetensors").read_bytes() == first


def test_merge_that_changes_the_logits_leaves_no_heads(run, caplog):
    """Tied embeddings, of which the adapter trains lm_head alone: one matrix is left for both."""
    out, adapter = run(family="llama-tied")
    with caplog.at_level(logging.WARNING):
        merge_hook(out, adapter)
    assert "no heads beside the merged model" in caplog.text
    assert not (out / "merged" / "medusa_heads").exists()


def test_merge_without_heads_says_so(run, caplog):
    out, adapter = run()
    (out / "medusa_heads").rename(out / "elsewhere")
    with caplog.at_level(logging.WARNING):
        merge_hook(out, adapter)
    assert f"there are none in {adapter}" in caplog.text


def test_merged_model_of_another_size_is_one_line(run):
    out, adapter = run()
    config = json.loads((out / "medusa_heads" / "config.json").read_text())
    make_model(vocab_size=VOCAB + 5).save_pretrained(out / "merged")
    with pytest.raises(SystemExit, match=rf"\[{VOCAB + 5}, {config['hidden_size']}\], but the heads"):
        merge_hook(out, adapter)
