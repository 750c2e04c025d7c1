"""Imported last by the server that forks axolotl's commands, for what each of them would else pay for anew.

Samples are packed by code that numba compiles for seconds, and axolotl collects garbage after each packing: with all that was
imported here that takes long, and it copies the pages that the forked processes share.
"""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
from axolotl.utils.samplers.multipack import pack_parallel
from datasets import Dataset

_save_to_disk = Dataset.save_to_disk


def _save_in_this_process(dataset: Dataset, *arguments: Any, num_proc: int | None = None, **options: Any) -> None:
    _save_to_disk(dataset, *arguments, num_proc=None if num_proc == 1 else num_proc, **options)


Dataset.save_to_disk = _save_in_this_process

for dtype in (np.int32, np.int64):
    pack_parallel(np.arange(1, 9, dtype=dtype), bin_capacity=16, group_size=100, bin_size=100, num_processes=1)
gc.collect()
gc.freeze()
