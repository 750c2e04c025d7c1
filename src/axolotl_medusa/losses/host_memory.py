"""Memory of the host that is kept from one training step to the next.

Contract: `empty` stands for `torch.empty`. What PyTorch frees on a CPU goes back to the kernel, which maps and clears the
pages again at the next step: a fifth of the time of a loss over a vocabulary in a virtual machine (benchmarks/README.md).
For each use the most that was in use at once is kept until the process ends. PyTorch keeps the memory of accelerators by itself.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_SMALLEST = 2**20
"""Bytes below which the C library keeps freed memory by itself."""


class _Block:
    """Bytes that one tensor at a time, and the views of it, may have."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = torch.empty(size, dtype=torch.uint8).numpy()
        self._lease: weakref.ref[Any] | None = None

    @property
    def is_free(self) -> bool:
        """Whether no tensor uses it: a tensor holds the array that it was made from."""
        return self._lease is None or self._lease() is None

    def lend(self, size: int) -> Tensor:
        """Its first bytes, `[size]`."""
        lease = self._memory[:size]
        self._lease = weakref.ref(lease)
        return torch.from_numpy(lease)


class _Pool:
    """Blocks that have been lent for one use; those that are free again are lent again."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._lock = threading.Lock()

    def lend(self, size: int) -> Tensor:
        """Uninitialised bytes, `[size]`: of the smallest free block that is large enough, else of a new one.

        A new block replaces the free ones, which are all too small: sizes that differ from step to step do not add up.
        """
        with self._lock:
            fitting = [block for block in self._blocks if block.is_free and block.size >= size]
            if not fitting:
                self._blocks = [block for block in self._blocks if not block.is_free]
                fitting = [_Block(size)]
                self._blocks += fitting
            return min(fitting, key=lambda block: block.size).lend(size)


_POOLS: dict[str, _Pool] = {}


def empty(use: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor of a shape; on a CPU in memory that is kept when the tensor is gone. It cannot be resized.

    Args:
        use: What it is for. Only tensors for the same have the same memory: a small buffer would otherwise take the block of a
            weight's gradient, for which a new one would then be made at every step.
        shape: Its shape.
        dtype: Its type.
        device: Where it is.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _SMALLEST:
        return torch.empty(*shape, dtype=dtype, device=device)
    return _POOLS.setdefault(use, _Pool()).lend(size).view(dtype).view(*shape)
