"""The order of packed training data: it depends on the seed and the epoch alone, so that a resumed run repeats it.

Contract: knows numbers of rows and axolotl's packing sampler by its `epoch` and `set_epoch`; nothing about the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


class EpochShuffle(Sampler[int]):
    """A permutation of the data set that depends on the seed and the epoch alone.

    Axolotl shuffles packed data with the global random state, which a resumed run does not have at the same point; with
    this sampler an interrupted run meets the same batches again. Accelerate calls `set_epoch` before every epoch.

    Args:
        size: Rows of the data set.
        seed: Seed of the permutations.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0
        self.packer: Any = None

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's permutation; what was packed by another one is dropped."""
        self.epoch = epoch
        if self.packer is not None and self.packer.epoch != epoch:
            self.packer.set_epoch(epoch)
