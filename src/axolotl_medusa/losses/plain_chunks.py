"""The losses of one call: its chunks as plain PyTorch computes them, and what the rows add up to.

Contract: knows predictions and chunks; who differentiates a chunk, and when, is `chunked`'s to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import repeat

import torch
from torch import Tensor
from torch.nn import functional as F

from axolotl_medusa.losses import matmuls
from axolotl_medusa.losses.chain import Chain, chain_weights
from axolotl_medusa.losses.chunk_plan import Chunk, Part
from axolotl_medusa.losses.cross_entropy_and_kl import LossSums, is_top_token, reference_loss, top_k_hits
from axolotl_medusa.losses.prediction import Prediction, Teacher


class ChunkedLosses:
    """The losses of one call of `chunked.chunked_loss`, and the sums of the chunks that are done.

    Args:
        predictions: What is trained.
        teacher: The teacher of those that have `teacher_rows`.
        chain: Which of them are weighted as a chain, if any.
    """

    def __init__(self, predictions: Sequence[Prediction], teacher: Teacher | None, chain: Chain | None = None) -> None:
        self.predictions = predictions
        self.teacher = teacher
        self.chain = chain
        self.parameters = list({id(p): p for each in predictions for p in each.layer.parameters}.values())
        self.trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        self.buffers = matmuls.ChunkBuffers()
        self._done: list[dict[tuple[int, int], LossSums]] = [{} for _ in predictions]

    def inputs(self, chunk: Chunk) -> list[Tensor]:
        """The hidden rows of a chunk's parts."""
        return [self.predictions[part.prediction].hidden[part.rows] for part in chunk.parts]

    def plain(self, chunk: Chunk, *hidden: Tensor) -> Tensor:
        """A chunk's scaled loss as plain PyTorch computes and differentiates it."""
        total = torch.zeros((), dtype=torch.float32, device=hidden[0].device)
        with torch.no_grad():
            teacher_logits = self._teacher_logits(chunk)
        layers = [self.predictions[part.prediction].layer for part in chunk.parts]
        logits: Iterable[Tensor] = (layer.project(rows) for layer, rows in zip(layers, hidden, strict=True))
        row_weights: Iterable[Tensor | None] = repeat(None)
        if chunk.positions is not None:
            logits = list(logits)
            parts = zip(chunk.parts, logits, strict=True)
            row_weights = self.row_weights(chunk, [self._cross_entropies(part, scores) for part, scores in parts])
        for part, scores, of_rows in zip(chunk.parts, logits, row_weights, strict=False):
            prediction = self.predictions[part.prediction]
            targets, at = prediction.targets[part.rows], part.teacher_rows
            of_teacher = None if at is None or teacher_logits is None else teacher_logits[at]
            loss, sums, log_q = reference_loss(scores, targets, of_teacher, prediction.weights, of_rows)
            total = total + loss * prediction.scale
            if (part.rows.start, part.rows.stop) in self._done[part.prediction]:
                continue  # a recomputation: these rows are counted already
            if wanted := prediction.accuracies:
                sums = replace(
                    sums,
                    correct=is_top_token(log_q, targets),
                    topk_hits=top_k_hits(log_q[:: wanted.every], targets[:: wanted.every], wanted.top_k),
                    topk_rows=len(targets[:: wanted.every]),
                )
            self.keep(part, sums)
        return total

    def _cross_entropies(self, part: Part, logits: Tensor) -> Tensor:
        """-log q[target] of a part's rows, `[rows]`."""
        targets = self.predictions[part.prediction].targets[part.rows]
        return F.cross_entropy(logits.detach().float(), targets, reduction="none")

    def row_weights(self, chunk: Chunk, cross_entropies: Sequence[Tensor]) -> list[Tensor]:
        """What the losses of the rows of a chain's chunk are multiplied by, `[rows]` for each of its parts."""
        chain, positions = self.chain, chunk.positions
        if chain is None or positions is None:
            raise ValueError("row_weights is asked of a chunk that is not of a chain: expected one with positions")
        own = [chain.positions[part.prediction][part.rows] - positions.start for part in chunk.parts]
        return chain_weights(cross_entropies, own, positions.stop - positions.start, chain.smoothing)

    def _teacher_logits(self, chunk: Chunk) -> Tensor | None:
        if self.teacher is None or chunk.teacher_rows is None:
            return None
        return self.teacher.layer.project(self.teacher.hidden[chunk.teacher_rows])

    def keep(self, part: Part, sums: LossSums) -> None:
        """Keeps the sums of a part."""
        self._done[part.prediction][part.rows.start, part.rows.stop] = sums

    def sums(self) -> list[LossSums]:
        """Each prediction's sums over all chunks."""
        return [_added_up(list(done.values())) for done in self._done]


def _added_up(parts: Sequence[LossSums]) -> LossSums:
    correct = [part.correct for part in parts if part.correct is not None]
    hits = [part.topk_hits for part in parts if part.topk_hits is not None]
    return LossSums(
        torch.stack([part.loss for part in parts]).sum(),
        torch.stack([part.cross_entropy for part in parts]).sum(),
        torch.stack([part.kl for part in parts]).sum(),
        torch.cat(correct) if correct else None,
        torch.stack(hits).sum(dim=0) if hits else None,
        sum(part.topk_rows for part in parts),
    )
