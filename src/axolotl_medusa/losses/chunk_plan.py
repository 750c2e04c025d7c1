"""How rows are cut into chunks whose logits are computed together.

Contract: knows numbers of rows and computes no loss. Students that learn from a teacher are cut where the teacher's rows are,
so that a chunk of its distribution serves them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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
    """What is computed together: rows of predictions, and the teacher's rows that they need, if any."""

    parts: Sequence[Part]
    teacher_rows: slice | None = None


def planned_chunks(
    predictions: Sequence[Prediction], teacher: Teacher | None, chunk_rows: int | None = None
) -> Iterator[Chunk]:
    """Chunks of all predictions, at least one of each.

    Args:
        predictions: What is trained.
        teacher: The teacher of those that have `teacher_rows`.
        chunk_rows: Rows per chunk; without, as many as make `CHUNK_LOGITS`.
    """
    taught = {number: each.teacher_rows for number, each in enumerate(predictions) if each.teacher_rows is not None}
    if taught and teacher is not None:
        step = chunk_rows or _rows_that_fit(teacher.hidden.device, *(predictions[number].layer for number in taught))
        yield from _chunks_of_teacher(taught, teacher.hidden, step)
    for number, each in enumerate(predictions):
        if each.teacher_rows is None:
            step = chunk_rows or _rows_that_fit(each.hidden.device, each.layer)
            for rows in _slices(each.hidden.shape[0], step):
                yield Chunk([Part(number, rows)])


def _chunks_of_teacher(taught: dict[int, Tensor], teacher_hidden: Tensor, step: int) -> Iterator[Chunk]:
    """Chunks of the teacher's rows with the rows of every prediction that need them; `taught`: teacher rows by prediction."""
    chunks = list(_slices(teacher_hidden.shape[0], step))
    edges = torch.tensor([0, *(chunk.stop for chunk in chunks)], device=teacher_hidden.device)
    cuts = {number: torch.searchsorted(wanted, edges).tolist() for number, wanted in taught.items()}
    for place, chunk in enumerate(chunks):
        parts = []
        for number, wanted in taught.items():
            rows = slice(*cuts[number][place : place + 2])
            is_all = rows.stop - rows.start == chunk.stop - chunk.start
            parts.append(Part(number, rows, slice(None) if is_all else wanted[rows] - chunk.start))
        yield Chunk(parts, chunk)


def _slices(rows: int, step: int) -> Iterator[slice]:
    """All rows in steps; one empty slice where there are none."""
    for start in range(0, max(rows, 1), step):
        yield slice(start, min(start + step, rows))


def _rows_that_fit(on: torch.device, *layers: OutputLayer) -> int:
    """How many rows of logits a chunk holds."""
    logits = CHUNK_LOGITS if on.type == "cpu" else ACCELERATOR_CHUNK_LOGITS
    if any(layer.weight is None for layer in layers):
        logits //= COPIES
    rows = max(1, logits // layers[0].vocab_size)
    return rows - rows % 64 if rows > 64 else rows  # kernels are fastest on whole tiles
