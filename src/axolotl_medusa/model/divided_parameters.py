"""Parameters that ZeRO-3 or FSDP2 divides among ranks: whole one at a time, and a copy only where it is wanted.

Contract: knows how DeepSpeed and torch mark such parameters, and nothing about models or heads. Wherever a
parameter is divided, every rank must call the same functions in the same order; elsewhere no rank waits for another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from axolotl_medusa.model.tensor_files import LazyTensor


def is_divided(parameter: Tensor) -> bool:
    """Whether this rank holds only a part of a parameter."""
    return hasattr(parameter, "ds_shape") or callable(getattr(parameter, "full_tensor", None))


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of a parameter, also where ZeRO-3 has left an empty one in its place."""
    return tuple(getattr(parameter, "ds_shape", None) or parameter.shape)


def local_part(parameter: Tensor) -> Tensor:
    """The values of a parameter that this rank holds, perhaps none; never waits for another rank."""
    part: Any = parameter.detach()
    shard = getattr(parameter, "ds_tensor", None)
    if shard is not None and part.numel() == 0:
        before = torch.distributed.get_rank(group=getattr(parameter, "ds_process_group", None)) * shard.ds_numel
        own = max(0, min(shard.numel(), getattr(parameter, "ds_numel", 0) - before))
        part = shard.detach().reshape(-1)[:own]  # what follows in the last shards is padding
    return cast(Tensor, part.to_local() if hasattr(part, "to_local") else part)


@contextlib.contextmanager
def gathered(parameters: list[Tensor], *, write: bool = False) -> Iterator[None]:
    """Makes parameters that ZeRO-3 has partitioned whole; every rank must enter. A no-op elsewhere.

    Args:
        parameters: The parameters.
        write: Whether what rank 0 writes into them is kept.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_shape")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


def whole(tensor: Tensor) -> Tensor:
    """A DTensor of FSDP2 as a plain tensor, for which every rank must call; any other tensor as it is."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return full_tensor() if callable(full_tensor) else tensor


def host_copy(parameter: Tensor, keep: bool = True) -> Tensor | None:
    """A copy of a whole parameter in host memory.

    Args:
        parameter: The parameter.
        keep: Whether this rank wants the copy; one that does not only takes part in the gathering.

    Returns:
        The copy, None without `keep`.
    """
    if not keep and not is_divided(parameter):
        return None
    with torch.no_grad(), gathered([parameter]):
        values = whole(parameter.detach())
        return values.to("cpu", copy=True) if keep else None


def fill(parameter: Tensor, values: Tensor | LazyTensor) -> None:
    """Sets a parameter to `values`; of one that is divided rank 0 alone reads them, and every rank must call."""
    reads = not is_divided(parameter) or torch.distributed.get_rank() == 0
    read = (values.load() if isinstance(values, LazyTensor) else values) if reads else None
    with torch.no_grad(), gathered([parameter], write=True):
        if callable(getattr(parameter, "full_tensor", None)):
            _scatter(cast(Any, parameter), read)
        elif read is not None:
            parameter.copy_(read)


def _scatter(parameter: Any, values: Tensor | None) -> None:
    """Hands each rank its part of rank 0's `values`."""
    from torch.distributed.tensor import distribute_tensor

    device = torch.device(parameter.device_mesh.device_type)
    if values is None:
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    parts: Any = distribute_tensor(values.to(device, parameter.dtype), parameter.device_mesh, parameter.placements)
    parameter.to_local().copy_(parts.to_local())
