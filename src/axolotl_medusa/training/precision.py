"""The precision of a run where the YAML sets none: axolotl takes fp16 where it finds no bf16, which a CPU cannot train in.

Contract: pure functions of the YAML; imports neither axolotl nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HALF = ("fp16", "float16")
_OTHERS = ("bfloat16", *_HALF)


def precision_is_left_to_axolotl(cfg: Mapping[str, Any]) -> bool:
    """Whether axolotl will choose: no key of a precision set, or `bf16: auto`."""
    return cfg.get("bf16") in (None, "auto") and all(cfg.get(key) is None for key in _OTHERS)


def half_precision_problems(cfg: Mapping[str, Any], has_accelerator: bool) -> list[str]:
    """A line where the YAML asks for fp16 on a machine without an accelerator, where the model's layers would not run."""
    asked = next((key for key in _HALF if cfg.get(key)), None)
    if asked is None or has_accelerator or cfg.get("use_ray") or cfg.get("adapter"):
        return []
    return [f"{asked}: {cfg[asked]} needs a GPU, and there is none here; set bf16: false and remove {asked}"]
