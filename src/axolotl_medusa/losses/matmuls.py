"""The matmuls of an output layer that is nothing but a weight: logits, and the gradients of its rows and of itself.

Contract: functions of tensors, and the memory that the chunks of one loss share. Each matmul is given its `out`: autocast,
which may be on, would change the type of the operands of other matmuls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from axolotl_medusa.losses import host_memory

NARROW_HIDDEN = 896
"""Below this hidden size a layer is narrow. On CPUs in half precision, oneDNN multiplies 330 to 1280 rows of 49,152 logits by
a matrix 576 wide at 0.6 of the rate of `NARROW_ROWS` rows (measured with AMX)."""

NARROW_ROWS = 320
"""Rows that are multiplied by a narrow layer's matrix at once."""

CONVERTED_ELEMENTS = 2**23
"""Elements of a weight gradient that are computed at once where its type is not the matmul's: a part of the vocabulary."""


class ChunkBuffers:
    """Memory that every chunk of a loss uses again, each use its own."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._converted: list[tuple[Tensor, Tensor]] = []

    def empty(self, use: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised memory of a shape; what was asked for before for the same use and type is overwritten."""
        size = math.prod(shape)
        kept = self._buffers.pop((use, dtype), None)
        if kept is None or kept.numel() < size:
            del kept  # so that its memory may be lent again, or given up for more
            kept = host_memory.empty(use, [size], dtype, device)
        self._buffers[use, dtype] = kept
        return kept[:size].view(*shape)

    def converted(self, weight: Tensor, dtype: torch.dtype, *, beside_others: bool = False) -> Tensor:
        """A weight in the type that is computed in, detached.

        Args:
            weight: The weight.
            dtype: The type.
            beside_others: Whether copies of other weights stay as they are; without, only the weight asked for last has one.
        """
        if weight.dtype == dtype:
            return weight.detach()
        for kept, copy in self._converted:
            if kept is weight:
                return copy
        if not beside_others:
            self._converted.clear()
        use = f"weight {len(self._converted)}" if self._converted else "weight"
        copy = self.empty(use, weight.shape, dtype, weight.device).copy_(weight.detach())
        self._converted.append((weight, copy))
        return copy


def logits_in_buffer(rows: Tensor, weight: Tensor, buffers: ChunkBuffers, use: str = "logits") -> Tensor:
    """`rows @ weight.T`, `[rows, vocab]`, in the buffer for that use, which all chunks share."""
    logits = buffers.empty(use, (rows.shape[0], weight.shape[0]), rows.dtype, rows.device)
    return torch.mm(rows, weight.T, out=logits)


def logits_of_few(rows: Tensor, weight: Tensor, few: Tensor) -> Tensor:
    """Logits of the rows with the numbers `few`, beside those in the buffer."""
    return torch.mm(rows[few], weight.T, out=rows.new_empty(few.shape[0], weight.shape[0]))


def rows_gradient(logits_gradient: Tensor, weight: Tensor) -> Tensor:
    """`logits_gradient @ weight`, `[rows, hidden]`."""
    is_narrow = weight.device.type == "cpu" and weight.element_size() == 2 and weight.shape[1] < NARROW_HIDDEN
    step = NARROW_ROWS if is_narrow else max(1, logits_gradient.shape[0])
    gradient = torch.empty(logits_gradient.shape[0], weight.shape[1], dtype=weight.dtype, device=weight.device)
    for rows, part in zip(torch.split(logits_gradient, step), torch.split(gradient, step), strict=True):
        torch.mm(rows, weight, out=part)
    return gradient


def add_weight_gradient(
    gradient: Tensor | None, weight: Tensor, logits_gradient: Tensor, rows: Tensor, buffers: ChunkBuffers
) -> Tensor:
    """Adds `logits_gradient.T @ rows` to a weight's gradient: in place where a matmul can write its type, else in parts.

    Args:
        gradient: The sum so far, `[vocab, hidden]` in the weight's type; None before the first chunk.
        weight: What the gradient is of.
        logits_gradient: `[rows, vocab]`.
        rows: Hidden rows, `[rows, hidden]`.
        buffers: Where parts are computed.

    Returns:
        The sum: `gradient`, changed in place, or a new one.
    """
    beta, in_place = 1, _can_add_to(weight.dtype, rows)
    if gradient is None:
        gradient = host_memory.empty("gradient", weight.shape, weight.dtype, weight.device)
        if in_place and rows.is_cuda and rows.shape[0]:
            beta = 0  # the matmul writes over what is there
        else:  # also on CPUs: all threads write zeros, while a matmul waits for the kernel to map memory
            gradient.zero_()
    if in_place and gradient.dtype == rows.dtype:
        gradient.addmm_(logits_gradient.T, rows, beta=beta)
    elif in_place:
        torch.addmm(gradient, logits_gradient.T, rows, beta=beta, out_dtype=gradient.dtype, out=gradient)
    else:
        step = max(1, CONVERTED_ELEMENTS // gradient.shape[1])
        for of_tokens, part_of_logits in zip(
            torch.split(gradient, step), torch.split(logits_gradient, step, dim=1), strict=True
        ):
            part = buffers.empty("weight gradient", of_tokens.shape, rows.dtype, rows.device)
            torch.mm(part_of_logits.T, rows, out=part)
            of_tokens += part
    return gradient


def _can_add_to(dtype: torch.dtype, rows: Tensor) -> bool:
    """Whether a matmul of `rows` can add to a gradient of a type: its own, and fp32, unrounded, where cuBLAS multiplies halves.

    PyTorch 2.11, axolotl 0.19's oldest, has that matmul.
    """
    is_half = rows.dtype in (torch.bfloat16, torch.float16)
    return dtype == rows.dtype or (dtype == torch.float32 and is_half and rows.is_cuda and torch.version.hip is None)
