"""Medusa-1 on a frozen backbone in 4 or 8 bit without an adapter, which axolotl and the Trainer refuse: heads train beside it.

Contract: knows the keys of axolotl that quantize a model, and the check of transformers' Trainer; bitsandbytes is not imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn

from axolotl_medusa.training.precision import precision_is_left_to_axolotl

_BITS = ("load_in_4bit", "load_in_8bit")
_COMPUTE_DTYPE = "bnb_4bit_compute_dtype"


def quantize_a_frozen_backbone(cfg: MutableMapping[str, Any]) -> None:
    """Asks transformers for what `load_in_4bit` or `load_in_8bit` asks axolotl for, which obeys with an adapter only.

    Under Ray the process that hands the run to the workers may have no GPU: a precision that is left open is settled where
    a worker comes here again, with the YAML as it was validated.

    Args:
        cfg: The YAML before validation; changed in place where it is one of Medusa-1 without an adapter.
    """
    wanted = [key for key in _BITS if cfg.get(key)]
    if cfg.get("use_ray") and not wanted:
        _settle_compute_dtype(cfg)
    if not wanted or not cfg.get("medusa_only_heads") or cfg.get("adapter") or cfg.get("inference"):
        return
    for key in wanted:
        cfg[key] = None
    given = cfg.get("model_kwargs") or cfg.get("overrides_of_model_kwargs") or {}
    config: dict[str, Any] = dict.fromkeys(wanted, True) | dict(cfg.get("bnb_config_kwargs") or {})
    if "load_in_4bit" in wanted:
        is_settled_later = cfg.get("use_ray") and precision_is_left_to_axolotl(cfg)
        config = {
            **({} if is_settled_later else {_COMPUTE_DTYPE: _compute_dtype(cfg)}),
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            **config,
        }
    cfg["overrides_of_model_kwargs"] = {**given, "quantization_config": {"quant_method": "bitsandbytes", **config}}


def _settle_compute_dtype(cfg: MutableMapping[str, Any]) -> None:
    """What `quantize_a_frozen_backbone` left open; stays open where there is no GPU, as in the process that hands the run over."""
    if cfg.get("adapter") or not cfg.get("medusa_only_heads"):
        return
    if precision_is_left_to_axolotl(cfg) and not torch.cuda.is_available():
        return
    for key in ("model_kwargs", "overrides_of_model_kwargs"):
        config = (cfg.get(key) or {}).get("quantization_config") or {}
        if config.get("load_in_4bit") and not config.get(_COMPUTE_DTYPE):
            cfg[key] = {**cfg[key], "quantization_config": {**config, _COMPUTE_DTYPE: _compute_dtype(cfg)}}


def _compute_dtype(cfg: Mapping[str, Any]) -> str:
    if precision_is_left_to_axolotl(cfg):
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
