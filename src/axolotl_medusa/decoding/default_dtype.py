"""The type that a model is loaded in where a user names none: the stored one, or fp32 where a CPU is slow with that.

Contract: looks at a model's configuration and the processor; loads nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from axolotl_medusa.cpu_instructions import multiplies_bf16

LOG = logging.getLogger(__name__)


def dtype_here(
    dtype: torch.dtype | str,
    model: str | Path,
    device: torch.device | str | None = None,
    stored: torch.dtype | None = None,
    **load_options: Any,
) -> torch.dtype | str:
    """The type to load a model in: fp32 for `auto` where it is stored in bf16 and goes to a CPU that cannot multiply that.

    Every bf16 number is one of fp32, so that the model stays the same.

    Args:
        dtype: What the user said; anything but `auto` is answered as it is.
        model: The model's directory or Hub name.
        device: Where it will be put; by default where PyTorch puts it.
        stored: Type of its weights, for a configuration that says nothing.
        **load_options: Given to transformers' `from_pretrained`; a quantized model is left as it is.
    """
    if dtype != "auto" or multiplies_bf16() or not _is_for_cpu(device, load_options.get("device_map")):
        return dtype
    from transformers import PretrainedConfig

    try:
        config: dict[str, Any] = PretrainedConfig.get_config_dict(model)[0]
    except (OSError, ValueError):  # loading it says what is wrong
        return dtype
    if config.get("quantization_config") or load_options.get("quantization_config"):
        return dtype
    text = config.get("text_config")
    named = [part.get(key) for part in (config, text) if isinstance(part, dict) for key in ("dtype", "torch_dtype")]
    name = next((str(found) for found in named if found), str(stored))
    if name.removeprefix("torch.") != "bfloat16":
        return dtype
    LOG.warning(
        "%s is stored in bf16, which this CPU has no fast matmuls for: loaded in fp32, which is faster here and takes twice "
        "the memory; --dtype bf16 (dtype=torch.bfloat16) leaves it as it is",
        model,
    )
    return torch.float32


def _is_for_cpu(device: torch.device | str | None, device_map: Any) -> bool:
    if device_map is not None:
        places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
        return all(str(place) == "cpu" for place in places)
    return torch.device(torch.get_default_device() if device is None else device).type == "cpu"
