"""A frozen backbone in 4 or 8 bit without an adapter: what transformers is asked for, and that a Trainer can be made."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from axolotl.utils.dict import DictDefault
from transformers.trainer_utils import validate_quantization_for_training

from axolotl_medusa.training.quantized_backbone import quantize_a_frozen_backbone, trained_by_its_heads


def asked_for(**keys) -> dict:
    cfg = DictDefault({"medusa_only_heads": True, **keys})
    quantize_a_frozen_backbone(cfg)
    assert not cfg.load_in_4bit and not cfg.load_in_8bit
    return cfg.overrides_of_model_kwargs["quantization_config"]


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [({"bf16": True}, "bfloat16"), ({"bf16": False}, "float32"), ({"fp16": True}, "float16")],
)
def test_four_bit_computes_in_the_precision_of_the_run(keys, dtype):
    config = asked_for(load_in_4bit=True, **keys)
    assert config["bnb_4bit_compute_dtype"] == dtype
    assert config["quant_method"] == "bitsandbytes" and config["load_in_4bit"] is True


@pytest.mark.parametrize("keys", [{}, {"bf16": "auto"}], ids=["unset", "auto"])
def test_four_bit_computes_in_what_axolotl_chooses_where_the_yaml_does_not(keys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert asked_for(load_in_4bit=True, **keys)["bnb_4bit_compute_dtype"] == "bfloat16"


def test_eight_bit_is_asked_for_and_axolotls_keys_of_bitsandbytes_are_kept():
    config = asked_for(load_in_8bit=True, bnb_config_kwargs={"llm_int8_threshold": 4.0})
    assert config == {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 4.0}


@pytest.mark.parametrize(
    "keys",
    [
        {"medusa_only_heads": True},
        {"medusa_only_heads": True, "load_in_4bit": True, "adapter": "qlora"},
        {"medusa_only_heads": True, "load_in_8bit": True, "inference": True},
        {"medusa_only_heads": False, "load_in_8bit": True},
    ],
    ids=["not-quantized", "adapter", "inference", "medusa-2"],
)
def test_other_yamls_are_left_to_axolotl(keys):
    cfg = DictDefault(keys)
    quantize_a_frozen_backbone(cfg)
    assert dict(cfg) == keys


def test_other_arguments_for_loading_are_kept():
    cfg = DictDefault({"medusa_only_heads": True, "load_in_8bit": True, "model_kwargs": {"variant": "x"}})
    quantize_a_frozen_backbone(cfg)
    assert cfg.overrides_of_model_kwargs["variant"] == "x"


def test_the_trainers_check_passes_for_heads_and_stays_for_all_others():
    model = SimpleNamespace(is_quantized=True, hf_quantizer=SimpleNamespace(is_trainable=True))
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)
    with trained_by_its_heads(model):
        validate_quantization_for_training(model)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)


def test_a_model_that_is_not_quantized_is_left_as_it_is():
    model = SimpleNamespace()
    with trained_by_its_heads(model):
        assert vars(model) == {}
