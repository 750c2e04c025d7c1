"""What a benchmark says about the machine that it ran on, how much memory is free there, and how results are written."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def description(*packages: str) -> dict[str, Any]:
    """Processor, memory and versions, for a benchmark's JSON."""
    from axolotl_medusa.cpu_instructions import (
        cpu_name,  # vLLM's environment, where some benchmarks go, lacks the package
    )

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    processor = {"name": cpu_name(), "count": os.cpu_count(), "machine": platform.machine()}
    return {
        "cpu": processor | {"memory_mib": memory // 2**20},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def gpu_description(device: str) -> dict[str, Any]:
    """Name, memory and driver of the first GPU as `nvidia-smi` has them; nothing for a CPU.

    Raises:
        RuntimeError: `nvidia-smi` is missing or failed.
    """
    if device == "cpu":
        return {}
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"{error}, expected one NVIDIA GPU: run without --device cuda, or where there is one"
        ) from error
    name, memory, driver = done.stdout.splitlines()[0].split(", ")
    return {"gpu": {"name": name, "memory": memory, "driver": driver}}


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


def write_result(file: Path, result: Any) -> None:
    """Writes JSON to read and to compare: indented, but a list of numbers in one line."""
    text = json.dumps(result, indent=2)
    text = re.sub(r"\[\s+[^][{}\"]+\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)
    file.write_text(text + "\n", encoding="utf-8")
