"""A YAML that sets no precision trains on a machine without a GPU, where axolotl would take fp16."""

from __future__ import annotations

import pytest
import torch
from conftest import AXOLOTL_YAML, LORA

from axolotl_medusa.training.precision import half_precision_problems, precision_is_left_to_axolotl

MEDUSA = {**AXOLOTL_YAML, "medusa_num_heads": 3}


@pytest.mark.parametrize("keys", [{}, {"bf16": "auto"}])
@pytest.mark.parametrize("has_gpu", [True, False])
def test_precision_that_is_left_open_is_fp32_only_without_a_gpu(keys, has_gpu, validated, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    cfg = validated({**MEDUSA, **keys})
    assert cfg.bf16 == ("auto" if has_gpu else False) and not cfg.fp16


@pytest.mark.parametrize("keys", [{"bf16": True}, {"bf16": False}, {"bfloat16": True}, {"fp16": False}])
def test_precision_that_the_yaml_sets_is_kept(keys):
    assert not precision_is_left_to_axolotl(keys)


@pytest.mark.parametrize("key", ["fp16", "float16"])
def test_half_precision_without_a_gpu_is_one_line(key, validated, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=rf"{key}: True needs a GPU.*bf16: false"):
        validated({**MEDUSA, key: True})
    assert half_precision_problems({key: True}, has_accelerator=True) == []
    assert half_precision_problems({key: True, **LORA}, has_accelerator=False) == [], "peft casts, and it trains"
