"""Memory of a training step: of this process on a CPU, of the allocator on a GPU.

Contract: figures in MiB. A GPU's are without what CUDA takes, but with cuBLAS's workspace, which is there from the start.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from pathlib import Path
from typing import Protocol

import torch
from benchmarks.machine import available_bytes

MIB = 2**20


class Memory(Protocol):
    """What is asked of a device's memory."""

    def available(self) -> float:
        """What could be allocated now."""

    def used(self) -> float:
        """What is in use now, once what is free has been given back."""

    def peak(self) -> float:
        """The most that was in use since `forget_peak`."""

    def forget_peak(self) -> None:
        """Lets the peak start again from what is in use now."""


class HostMemory:
    """Resident memory of this process, on Linux."""

    def available(self) -> float:
        """As the kernel estimates it."""
        return round(available_bytes() / MIB, 1)

    def used(self) -> float:
        """Resident now; freed activations that malloc keeps would count as needed beside another side."""
        ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / MIB, 1)

    def peak(self) -> float:
        """The kernel's high-water mark."""
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)

    def forget_peak(self) -> None:
        """Resets the kernel's high-water mark."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class GpuMemory:
    """Memory of the current GPU that tensors of this process hold."""

    def __init__(self) -> None:
        # At its first matmul cuBLAS takes a workspace from the same allocator: from here on it is there.
        square = torch.ones(8, 8, device="cuda")
        torch.mm(square, square)

    def available(self) -> float:
        """As the driver says, of this and all other processes."""
        self.used()
        return round(torch.cuda.mem_get_info()[0] / MIB, 1)

    def used(self) -> float:
        """Held by tensors, once those that nothing uses are gone."""
        gc.collect()
        torch.cuda.empty_cache()
        return round(torch.cuda.memory_allocated() / MIB, 1)

    def peak(self) -> float:
        """The allocator's high-water mark of tensors."""
        return round(torch.cuda.max_memory_allocated() / MIB, 1)

    def forget_peak(self) -> None:
        """Resets the allocator's high-water mark."""
        torch.cuda.reset_peak_memory_stats()


def memory_of(device: str) -> Memory:
    """The memory of `cpu` or `cuda`."""
    return GpuMemory() if device == "cuda" else HostMemory()


def limit_to_available() -> None:
    """Makes an allocation beyond what is available now fail, where Linux would end a process instead."""
    resource.setrlimit(resource.RLIMIT_DATA, (available_bytes(), resource.RLIM_INFINITY))
