"""Medusa-1 on a frozen backbone in 4 or 8 bit without an adapter, which axolotl and the Trainer refuse: heads train beside it.

Contract: knows the keys of axolotl that quantize a model, and the check of transformers' Trainer; bitsandbytes is not imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn

_BITS = ("load_in_4bit", "load_in_8bit")


def quantize_a_frozen_backbone(cfg: MutableMapping[str, Any]) -> None:
    """Asks transformers for what `load_in_4bit` or `load_in_8bit` asks axolotl for, which obeys with an adapter only.

    Args:
        cfg: The YAML before validation; changed in place where it is one of Medusa-1 without an adapter.
    """
    wanted = [key for key in _BITS if cfg.get(key)]
    if not wanted or not cfg.get("medusa_only_heads") or cfg.get("adapter") or cfg.get("inference"):
        return
    for key in wanted:
        cfg[key] = None
    given = cfg.get("model_kwargs") or cfg.get("overrides_of_model_kwargs") or {}
    config: dict[str, Any] = dict.fromkeys(wanted, True) | dict(cfg.get("bnb_config_kwargs") or {})
    if "load_in_4bit" in wanted:
        config = {
            "bnb_4bit_compute_dtype": _compute_dtype(cfg),
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            **config,
        }
    cfg["overrides_of_model_kwargs"] = {**given, "quantization_config": {"quant_method": "bitsandbytes", **config}}


def _compute_dtype(cfg: Mapping[str, Any]) -> str:
    if cfg.get("bf16") == "auto":
        return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float16"
    if cfg.get("bf16") or cfg.get("bfloat16"):
        return "bfloat16"
    return "float16" if cfg.get("fp16") or cfg.get("float16") else "float32"


@contextlib.contextmanager
def trained_by_its_heads(model: nn.Module | None) -> Iterator[None]:
    """Lets a Trainer be made for a quantized model without an adapter: what trains are the heads.

    The Trainer looks for an adapter, to be sure that no quantized weight is to be trained; `trainable.check_trainable` is.
    """
    if model is None or not getattr(model, "is_quantized", False) or getattr(model, "_hf_peft_config_loaded", False):
        yield
        return
    model._hf_peft_config_loaded = True  # type: ignore[assignment]
    try:
        yield
    finally:
        model._hf_peft_config_loaded = False  # type: ignore[assignment]
