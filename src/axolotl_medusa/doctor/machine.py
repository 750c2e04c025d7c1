"""What this machine computes with: its processor, memory and GPUs.

Contract: asks the operating system and torch; computes nothing.
"""

from __future__ import annotations

import os
from typing import Any

from axolotl_medusa.cpu_instructions import cpu_name, multiplies_bf16

_GIB = 2**30


def devices() -> list[dict[str, Any]]:
    """The processor, then every GPU that torch sees."""
    import torch

    cpu = {
        "kind": "cpu",
        "name": cpu_name() or "CPU",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "fast_bf16": multiplies_bf16(),
    }
    return [cpu, *(_gpu(torch, index) for index in range(torch.cuda.device_count()))]


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _gpu(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "kind": "gpu",
        "name": properties.name,
        "memory_gib": round(properties.total_memory / _GIB, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "fast_bf16": properties.major >= 8,
    }
