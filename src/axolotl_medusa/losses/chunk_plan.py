"""How rows are cut into chunks whose logits are computed together.

Contract: knows numbers of rows and computes no loss. Students that learn from a teacher are cut where the teacher's rows are,
so that a chunk of its distribution serves them all. Heads whose rows are weighted as a chain are cut by positions, so that a
chunk has all that a position's weights depend on. Where output layers are divided among ranks, every chunk gathers one:
all ranks then cut into equally many chunks, however many rows they have, or some would wait for others forever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from axolotl_medusa.losses.chain import Chain
from axolotl_medusa.losses.prediction import OutputLayer, Prediction, Teacher

CHUNK_LOGITS = 2**25
"""Logits of one chunk on a CPU: 128 MiB in fp32. Smaller chunks add up weight gradients more often; larger ones gain little."""

ACCELERATOR_CHUNK_LOGITS = 2**28
"""The same elsewhere: each chunk reads and writes a weight gradient of up to a gigabyte, which takes as long as 400 rows."""

COPIES = 4
"""An adapter on the output layer makes several copies of a chunk's logits; chunks are smaller by this factor there."""


class Part(NamedTuple):
    """Rows of one prediction in a chunk.

    Attributes:
        prediction: Its number.
        rows: Which of its rows.
        teacher_rows: Which of the chunk's teacher rows speak of the same tokens; a slice where it is all of them, to copy
            nothing; None without a teacher.
    """

    prediction: int
    rows: slice
    teacher_rows: Tensor | slice | None = None


class Chunk(NamedTuple):
    """What is computed together: rows of predictions, the teacher's rows that they need, if any, and a chain's positions."""

    parts: Sequence[Part]
    teacher_rows: slice | None = None
    positions: slice | None = None


def planned_chunks(
    predictions: Sequence[Prediction],
    teacher: Teacher | None,
    chunk_rows: int | None = None,
    *,
    chain: Chain | None = None,
    on_all_ranks: bool = False,
) -> list[Chunk]:
    """Chunks of all predictions, at least one of each.

    Args:
        predictions: What is trained.
        teacher: The teacher of those that have `teacher_rows`.
        chunk_rows: Rows per chunk; without, as many as `_rows_that_fit`.
        chain: Which predictions are cut by positions.
        on_all_ranks: Whether all ranks, which must all call, get equally many chunks; the last ones of a rank that has fewer
            rows than another are empty.
    """
    heads = 0 if chain is None else len(chain.positions)
    others = dict(list(enumerate(predictions))[heads:])
    taught = {number: each.teacher_rows for number, each in others.items() if each.teacher_rows is not None}
    alone = [number for number, each in others.items() if each.teacher_rows is None]
    cut = [(predictions[number].hidden.shape[0], [predictions[number].layer], 1) for number in alone]
    if taught and teacher is not None:
        cut.append((teacher.hidden.shape[0], [predictions[number].layer for number in taught], 1))
    if chain is not None:
        cut.append((chain.num_positions, [each.layer for each in predictions[:heads]], heads))
    device = predictions[0].hidden.device
    rows = [number for number, _, _ in cut]
    steps = [max(1, (chunk_rows or _rows_that_fit(device, layers)) // shares) for _, layers, shares in cut]
    counts = [max(1, -(-number // step)) for number, step in zip(rows, steps, strict=True)]
    if on_all_ranks and torch.distributed.is_initialized():
        most = torch.tensor(counts, device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        counts = most.tolist()
    slices = [_slices(*each) for each in zip(rows, steps, counts, strict=True)]
    of_chain = [] if chain is None else _chunks_of_chain(chain, predictions[:heads], slices.pop())
    chunks = (
        [] if len(slices) == len(alone) or teacher is None else _chunks_of_teacher(taught, teacher.hidden, slices.pop())
    )
    chunks += [Chunk([Part(number, own)]) for number, of in zip(alone, slices, strict=True) for own in of]
    return chunks + of_chain


def _chunks_of_chain(chain: Chain, heads: Sequence[Prediction], slices: Sequence[slice]) -> list[Chunk]:
    """Chunks of positions with the rows that every head has there, and the teacher's rows from the first to the last of them."""
    edges = torch.tensor([0, *(each.stop for each in slices)], device=heads[0].hidden.device)
    cuts = [torch.searchsorted(own, edges).tolist() for own in chain.positions]
    chunks = []
    for place, positions in enumerate(slices):
        rows = [slice(*cut[place : place + 2]) for cut in cuts]
        wanted = [
            None if each.teacher_rows is None else each.teacher_rows[own] for each, own in zip(heads, rows, strict=True)
        ]
        ends = [(int(of[0]), int(of[-1]) + 1) for of in wanted if of is not None and len(of)]
        teacher_rows = slice(min(ends)[0], max(stop for _, stop in ends)) if ends else slice(0, 0)
        parts = [
            Part(head, own, None if of is None else of - teacher_rows.start)
            for head, (own, of) in enumerate(zip(rows, wanted, strict=True))
        ]
        chunks.append(Chunk(parts, None if wanted[0] is None else teacher_rows, positions))
    return chunks


def _chunks_of_teacher(taught: dict[int, Tensor], teacher_hidden: Tensor, slices: Sequence[slice]) -> list[Chunk]:
    """Chunks of the teacher's rows with the rows of every prediction that need them; `taught`: teacher rows by prediction."""
    edges = torch.tensor([0, *(each.stop for each in slices)], device=teacher_hidden.device)
    cuts = {number: torch.searchsorted(wanted, edges).tolist() for number, wanted in taught.items()}
    chunks = []
    for place, each in enumerate(slices):
        parts = []
        for number, wanted in taught.items():
            rows = slice(*cuts[number][place : place + 2])
            is_all = rows.stop - rows.start == each.stop - each.start
            parts.append(Part(number, rows, slice(None) if is_all else wanted[rows] - each.start))
        chunks.append(Chunk(parts, each))
    return chunks


def _slices(rows: int, step: int, count: int) -> list[slice]:
    """So many slices, which hold all rows in steps; where rows end before the slices do, the last ones are empty."""
    return [slice(min(start, rows), min(start + step, rows)) for start in range(0, count * step, step)]


def _rows_that_fit(on: torch.device, layers: Sequence[OutputLayer]) -> int:
    """How many rows of logits a chunk holds."""
    logits = CHUNK_LOGITS if on.type == "cpu" else ACCELERATOR_CHUNK_LOGITS
    if any(layer.weight is None for layer in layers):
        logits //= COPIES
    rows = max(1, logits // layers[0].vocab_size)
    return rows - rows % 64 if rows > 64 else rows  # kernels are fastest on whole tiles
