"""axolotl's LoRA kernels: it switches them on where the YAML sets none of their keys, whether or not they can run.

Contract: knows axolotl's four keys and which models its kernels can be built into; no kernel is called here. What the
YAML sets itself is left as it is, or refused with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import nn

from axolotl_medusa.errors import first_line
from axolotl_medusa.model.anatomy import stored_text_config

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
_ONLY_CUDA = "lora_mlp_kernel"
"""The others are made of torch's own operations."""


def kernels_are_left_to_axolotl(cfg: Mapping[str, Any]) -> bool:
    """Whether axolotl's validator will switch its kernels on: an adapter, and none of their keys set."""
    return cfg.get("adapter") in ("lora", "qlora") and all(cfg.get(key) is None for key in KERNELS)


def switch_kernels_off(cfg: MutableMapping[str, Any]) -> None:
    """Sets all four keys to false."""
    for key in KERNELS:
        cfg[key] = False


def cuda_kernel_problems(cfg: Mapping[str, Any], has_cuda: bool) -> list[str]:
    """A line where the YAML asks for the kernel that runs on a GPU only, and there is none."""
    if not cfg.get(_ONLY_CUDA) or cfg.get("use_ray") or has_cuda:
        return []
    return [f"{_ONLY_CUDA}: {cfg[_ONLY_CUDA]} needs a CUDA GPU, and there is none here; set it to false"]


def runs_on_gpus_alone(cfg: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether a forward would hand weights in host memory to a kernel of the GPU: DeepSpeed and FSDP move the model later."""
    return bool(cfg.get(_ONLY_CUDA)) and any(parameter.device.type == "cpu" for parameter in model.parameters())


def reason_against_kernels(cfg: Any) -> str | None:
    """Why axolotl cannot build its kernels into the model, on which it would end in a traceback; None where it can.

    Args:
        cfg: The validated YAML.
    """
    from axolotl.monkeypatch import lora_kernels as of_axolotl
    from axolotl.monkeypatch.utils import detab_code

    try:
        attention = of_axolotl.get_attention_cls_from_config(cfg)
    except (ValueError, ImportError) as error:
        return first_line(error)
    source, _ = detab_code(inspect.getsource(attention.forward))
    is_known = any(before in source for before, _ in of_axolotl.QKV_PATCHES) and of_axolotl.ORIGINAL_O_CODE in source
    has_own_way = hasattr(attention, "_original_forward") or attention.__name__.startswith("Gemma4")
    if not is_known and not has_own_way:
        return f"{attention.__name__} is not written as they expect"
    try:
        config = stored_text_config(cfg.base_model)
    except ValueError:  # only its own code reads it
        return None
    names = ("hidden_act", "hidden_activation", "mlp_hidden_act")
    activation = next((str(value) for name in names if (value := getattr(config, name, None))), "none")
    is_supported = "gelu" in activation or activation in of_axolotl.SUPPORTED_ACTIVATIONS
    return None if is_supported else f"its activation is {activation}"
