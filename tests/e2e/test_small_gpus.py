"""Backbones in 4 and 8 bit, for GPUs with little memory: Medusa-1 beside them without an adapter, Medusa-2 with QLoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from axolotl_process import log_history
from test_evaluate import FOUR_BIT_RTOL, QLORA, assert_same_model
from test_train import trained_heads

from axolotl_medusa.cli import main
from axolotl_medusa.model.heads_directory import read_heads
from axolotl_medusa.model.sources import find_source

pytestmark = pytest.mark.e2e

PLUGINS = ["axolotl_medusa.MedusaPlugin", "watch_layers.WatchLayersPlugin"]
LAYERS = {"load_in_4bit": "Linear4bit", "load_in_8bit": "Linear8bitLt"}
HEADS = {"load_in_4bit": "bfloat16", "load_in_8bit": "float32"}


@pytest.mark.parametrize("bits", LAYERS)
def test_medusa1_trains_beside_a_quantized_backbone_without_an_adapter(bits, make_yaml, axolotl, tmp_path):
    """Trained, evaluated, resumed and exported; the heads in the type that the YAML says."""
    out = tmp_path / "out"
    common = {
        "plugins": PLUGINS,
        bits: True,
        "medusa_heads_dtype": HEADS[bits],
        "learning_rate": 5e-2,
        "val_set_size": 0.2,
        "eval_sample_packing": True,
        "eval_strategy": "steps",
        "eval_steps": 4,
    }
    result = axolotl("train", make_yaml(**common))
    assert f"layers are {LAYERS[bits]}, heads are torch.{HEADS[bits]}" in result.output
    heads = trained_heads(out)
    assert read_heads(out / "medusa_heads").meta["dtype"] == HEADS[bits]
    assert find_source(out).model_kind == "base"
    assert [path for path in out.rglob("*.safetensors") if path.name != "medusa_lm_head.safetensors"] == []
    axolotl("evaluate", make_yaml(**common))
    assert_same_model(out, FOUR_BIT_RTOL)
    axolotl("train", make_yaml(**common, resume_from_checkpoint=str(out / "checkpoint-2")))
    for name, tensor in trained_heads(out).items():
        torch.testing.assert_close(tensor, heads[name], rtol=2e-2, atol=1e-3)
    main(["export", str(out), "--to", "vllm", "--out", str(tmp_path / "export")])
    assert (tmp_path / "export" / "config.json").is_file()


def test_medusa2_qlora_starts_from_the_heads_of_a_quantized_backbone(make_yaml, axolotl, tmp_path):
    """Two stages on the same 4-bit backbone: the heads alone, then heads and adapter."""
    stage1, stage2 = tmp_path / "stage1", tmp_path / "stage2"
    axolotl("train", make_yaml(load_in_4bit=True, learning_rate=5e-2, output_dir=str(stage1)))
    keys = {**QLORA, "plugins": PLUGINS, "medusa_self_distillation": True, "medusa_init_from": str(stage1)}
    result = axolotl("train", make_yaml(**keys, learning_rate=1e-9, max_steps=2, output_dir=str(stage2)))
    assert "layers are Linear4bit, heads are torch.float32" in result.output
    first = trained_heads(stage1)
    for name, tensor in trained_heads(stage2).items():
        torch.testing.assert_close(tensor, first[name], rtol=0, atol=1e-7)
    before, after = (first_loss(out) for out in (stage1, stage2))
    assert after["medusa0_loss"] < before["medusa0_loss"], "the second stage does not begin where the first ended"
    assert find_source(stage2).model_kind == "adapter"


def first_loss(out: Path) -> dict[str, float]:
    return next(entry for entry in log_history(out) if "loss" in entry)
