"""What a benchmark says about the machine that it ran on, and how much memory is free there."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def description(*packages: str) -> dict[str, Any]:
    """Processor, memory and versions, for a benchmark's JSON."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": {"count": os.cpu_count(), "machine": platform.machine(), "memory_mib": memory // 2**20},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def available_bytes() -> int:
    """Memory that could be allocated now without swapping.

    Raises:
        RuntimeError: This is not Linux.
    """
    file = Path("/proc/meminfo")
    lines = file.read_text(encoding="ascii").splitlines() if file.is_file() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("found no MemAvailable in /proc/meminfo, expected it on Linux: run this benchmark there")
