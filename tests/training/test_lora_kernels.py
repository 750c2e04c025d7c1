"""axolotl's LoRA kernels: left on where they run, off where they cannot, and never met by a forward before they are bound."""

from __future__ import annotations

import pytest
import torch
from axolotl.utils.dict import DictDefault
from conftest import AXOLOTL_YAML, LORA, PLUGIN, make_model

from axolotl_medusa.training.lora_kernels import (
    KERNELS,
    cuda_kernel_problems,
    kernels_are_left_to_axolotl,
    reason_against_kernels,
)
from axolotl_medusa.training.plugin import MedusaPlugin

MEDUSA = {**AXOLOTL_YAML, "medusa_num_heads": 3}


@pytest.mark.parametrize("has_cuda", [True, False])
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_kernels_of_axolotl_are_on_by_default_only_with_a_gpu(has_cuda, adapter, validated, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    four_bits = {"load_in_4bit": True} if adapter == "qlora" else {}
    cfg = validated({**MEDUSA, **LORA, "adapter": adapter, **four_bits})
    assert {bool(cfg[key]) for key in KERNELS} == {has_cuda}


def test_kernel_that_the_yaml_sets_is_left_as_it_is(validated, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = validated({**MEDUSA, **LORA, "lora_qkv_kernel": True})
    assert cfg.lora_qkv_kernel is True and cfg.lora_mlp_kernel is None
    assert not kernels_are_left_to_axolotl({**LORA, "lora_o_kernel": False})
    assert not kernels_are_left_to_axolotl({"adapter": None})


def test_kernel_for_gpus_that_the_yaml_asks_for_is_one_line_where_there_is_none(validated, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"lora_mlp_kernel: True needs a CUDA GPU.*set it to false"):
        validated({**MEDUSA, **LORA, "lora_mlp_kernel": True})
    assert cuda_kernel_problems({"lora_mlp_kernel": True}, has_cuda=True) == []
    assert cuda_kernel_problems({"lora_mlp_kernel": True, "use_ray": True}, has_cuda=False) == [], "the worker has one"


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama", None),
        ("mistral", None),
        ("qwen3", None),
        ("gemma2-softcap", None),
        ("phi-lm-head-bias", "PhiAttention is not written"),
        ("phi3", "Phi3Attention is not written"),
        ("cohere-logit-scale", "CohereAttention is not written"),
        ("gpt2", "GPT2Attention is not written"),
    ],
)
def test_kernels_are_switched_off_for_models_that_axolotl_cannot_build_them_into(
    family, reason, validated, tmp_path, monkeypatch
):
    """axolotl itself ends in an AssertionError or a ValueError there, before any hook that has the model."""
    from axolotl.integrations.base import PluginManager
    from axolotl.monkeypatch import lora_kernels

    make_model(family).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = validated({**MEDUSA, **LORA, "base_model": str(tmp_path)})
    found = reason_against_kernels(cfg)
    assert found is None if reason is None else reason in found
    attention = None
    try:
        attention = lora_kernels.get_attention_cls_from_config(cfg)
        forward = attention.forward
        lora_kernels.patch_self_attn_lora(cfg)
        is_patched = attention.forward is not forward
        attention.forward = forward
    except (AssertionError, ValueError):
        is_patched = False
    if attention is not None and "_original_forward" in vars(attention):
        del attention._original_forward
    assert is_patched is (reason is None), "this repository and axolotl disagree"
    plugin = PluginManager.get_instance().plugins[PLUGIN]
    plugin.load_datasets(cfg)
    assert {bool(cfg[key]) for key in KERNELS} == {reason is None}


def test_kernels_that_the_yaml_asks_for_are_axolotls_to_speak_of(validated, tmp_path, monkeypatch):
    from axolotl.integrations.base import PluginManager

    make_model("phi3").save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    keys = {"base_model": str(tmp_path), "lora_qkv_kernel": True}
    cfg = DictDefault(validated({**MEDUSA, **LORA, **keys}))
    plugin = PluginManager.get_instance().plugins[PLUGIN]
    plugin.load_datasets(cfg)
    assert cfg.lora_qkv_kernel is True


def test_model_that_waits_in_host_memory_runs_no_kernel_of_a_gpu(monkeypatch, caplog):
    """As under DeepSpeed, which moves the model after every hook."""

    def kernel(*_, **__):
        raise AssertionError("Pointer argument cannot be accessed from Triton (cpu tensor?)")

    model = make_model()
    monkeypatch.setattr(model.model.layers[0].mlp, "forward", kernel)
    with caplog.at_level("INFO", logger="axolotl_medusa.training.plugin"):
        MedusaPlugin().post_model_load(DictDefault(lora_mlp_kernel=True), model)
    assert "logits are not checked" in caplog.text
    with pytest.raises(AssertionError):
        MedusaPlugin().post_model_load(DictDefault(lora_mlp_kernel=False), model)
