"""What a YAML says about FSDP, which divides the model among ranks: what heads cannot be trained with, and how the end is saved.

Contract: pure functions of the YAML; imports neither axolotl nor torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

_WHOLE = "FULL_STATE_DICT"


def fsdp_problems(cfg: Mapping[str, Any], missing_fsdp_version: int) -> list[str]:
    """One line for each FSDP key that heads cannot be trained or saved with.

    Args:
        cfg: The YAML as a mapping.
        missing_fsdp_version: What axolotl takes where it has no `fsdp_version`.
    """
    config = cfg.get("fsdp_config") or {}
    if not config and not cfg.get("fsdp"):
        return []
    named = config if isinstance(config, Mapping) else {}
    problems = []
    nested = named.get("fsdp_version") or named.get("version")
    version = str(cfg.get("fsdp_version") or nested or missing_fsdp_version)
    if version != "2":
        problems.append(
            f"fsdp_version is {version}: its flattened parameters cannot hold heads beside frozen layers; "
            "set fsdp_version: 2"
        )
    last = named.get("final_state_dict_type") or named.get("fsdp_final_state_dict_type")
    if last not in (None, _WHOLE):
        problems.append(
            f"fsdp_config.final_state_dict_type is {last}: axolotl makes the model of the last checkpoint's shards then, with the "
            f"heads inside; remove it, and {_WHOLE} is used (state_dict_type, which checkpoints are written by, may stay)"
        )
    return problems


def loads_no_weights(cfg: Any) -> bool:
    """Whether this process's model is empty until training begins: FSDP2 hands out the weights that another loads.

    Args:
        cfg: The validated YAML.
    """
    waits = cfg.fsdp_config and cfg.fsdp_config.cpu_ram_efficient_loading
    return bool(waits) and int(os.environ.get("LOCAL_RANK", "0")) != 0


def save_whole_at_the_end(cfg: Any) -> bool:
    """Lets FSDP2 gather the trained model at the end instead of merging the shards of a checkpoint, heads and all.

    Args:
        cfg: The validated YAML; changed in place.

    Returns:
        Whether anything was changed.
    """
    if not cfg.fsdp_config or cfg.fsdp_config.final_state_dict_type == _WHOLE:
        return False
    cfg.fsdp_config.final_state_dict_type = _WHOLE
    return True
