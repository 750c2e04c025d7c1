"""The host's processor: its name, and what it multiplies fast.

Contract: importing it imports nothing, so that a small process may ask for the name.
"""

from __future__ import annotations

import functools
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str | None:
    """The processor's name as Linux gives it, None elsewhere."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


@functools.cache
def multiplies_bf16() -> bool:
    """Whether PyTorch has fast bf16 matmuls here: oneDNN's, which need AVX-512 or newer, or an Arm CPU with bf16.

    Elsewhere its own take 7 times as long as those in fp32: 20 against 150 to 180 GFLOP/s on two AVX2 cores of an AMD EPYC.
    """
    import torch

    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
