"""Losses over a vocabulary, chunk of rows by chunk of rows: the fast equal of `cross_entropy_and_kl.reference_loss`.

Contract: pure functions of tensors; values and gradients are those of `reference_loss`, which the tests hold them to.
Nothing here holds logits of more than one chunk.

Where parameters are plain tensors, a chunk's gradient is computed while its logits are at hand and in their place
(`closed_form`), and weight gradients are added up in place (`matmuls`): three matmuls and a few passes over memory. Where
parameters are sharded, chunks are recomputed in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint as recomputed_in_backward  # nothing is saved to disk

from axolotl_medusa.losses import matmuls
from axolotl_medusa.losses.chunk_plan import Chunk, Part, planned_chunks
from axolotl_medusa.losses.closed_form import TeacherProbabilities, gradient_in_place, teacher_probabilities
from axolotl_medusa.losses.cross_entropy_and_kl import LossSums, is_top_token, reference_loss, top_k_hits
from axolotl_medusa.losses.prediction import Prediction, Teacher


def chunked_loss(
    predictions: Sequence[Prediction],
    teacher: Teacher | None = None,
    *,
    chunk_rows: int | None = None,
    recompute: bool | None = None,
) -> tuple[Tensor, list[LossSums]]:
    """The loss of several students: the sum of `scale * reference_loss(...)` over their predictions.

    The teacher's distribution is computed once per chunk of its rows, for all students that learn from it. Without rows, a
    prediction's loss is a zero that still has a gradient (of zero) for every parameter, as distributed training needs.

    Args:
        predictions: What is trained.
        teacher: The teacher of those that have `teacher_rows`.
        chunk_rows: Rows per chunk; without, as many as `chunk_plan` finds room for.
        recompute: True: recompute each chunk's logits in the backward. False: compute gradients in the forward, which
            saves a matmul. Without: the latter wherever parameters are plain tensors.

    Returns:
        The loss with its gradient, scalar, and each prediction's sums.
    """
    losses = _ChunkedLosses(predictions, teacher)
    is_divided = not all(map(_is_whole, losses.parameters))
    chunks = planned_chunks(predictions, teacher, chunk_rows, on_all_ranks=is_divided)
    hidden = [prediction.hidden for prediction in predictions]
    if not torch.is_grad_enabled() or not (losses.trained or any(rows.requires_grad for rows in hidden)):
        with torch.no_grad():
            loss = torch.stack([losses.plain(chunk, *losses.inputs(chunk)) for chunk in chunks]).sum()
    elif is_divided if recompute is None else recompute:
        loss = torch.stack(
            [
                recomputed_in_backward(losses.plain, chunk, *losses.inputs(chunk), use_reentrant=False)
                for chunk in chunks
            ]
        ).sum()
    else:
        loss = _GradientInForward.apply(losses, chunks, *hidden, *losses.trained)  # type: ignore[no-untyped-call]
    return loss, losses.sums()


def _is_whole(parameter: Tensor) -> bool:
    """Whether a parameter can be differentiated in a forward: not partitioned by ZeRO-3, not sharded by FSDP."""
    return not hasattr(parameter, "ds_shape") and not hasattr(parameter, "device_mesh") and parameter.numel() > 0


class _ChunkedLosses:
    """The losses of one call of `chunked_loss`, and the sums of the chunks that are done."""

    def __init__(self, predictions: Sequence[Prediction], teacher: Teacher | None) -> None:
        self.predictions = predictions
        self.teacher = teacher
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
        for part, rows in zip(chunk.parts, hidden, strict=True):
            prediction = self.predictions[part.prediction]
            targets, at = prediction.targets[part.rows], part.teacher_rows
            loss, sums, log_q = reference_loss(
                prediction.layer.project(rows),
                targets,
                None if at is None or teacher_logits is None else teacher_logits[at],
                prediction.weights,
            )
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


class _GradientInForward(torch.autograd.Function):
    """The losses of all chunks, whose gradients are computed while the chunk's logits are at hand."""

    @staticmethod
    def forward(ctx: FunctionCtx, losses: _ChunkedLosses, chunks: Sequence[Chunk], *tensors: Tensor) -> Tensor:
        """Returns the loss, scalar; keeps its gradients. `tensors`: every prediction's hidden rows, then `losses.trained`."""
        wanted = ctx.needs_input_grad[2:]  # type: ignore[attr-defined]
        hidden = [each.hidden for each in losses.predictions]
        gradients = _Gradients(
            [torch.empty_like(rows) if wants else None for rows, wants in zip(hidden, wanted, strict=False)],
            {id(parameter): None for parameter in losses.trained},
        )
        total = torch.zeros((), dtype=torch.float32, device=hidden[0].device)
        for chunk in chunks:
            teacher = _teacher_of(losses, chunk)
            for part in chunk.parts:
                total += _part_loss(losses, part, teacher, gradients)
        ctx.gradients = gradients.of(losses.trained)  # type: ignore[attr-defined]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients that the forward computed and gives them away: they are as large as the weights."""
        gradients, ctx.gradients = ctx.gradients, None  # type: ignore[attr-defined]
        if gradients is None:
            raise RuntimeError("the losses' gradients are gone: backward was called a second time")
        factor = grad_outputs[0].item()  # waits for a GPU: far less than passes over gradients as large as the weights
        if factor != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(factor)
        return (None, None, *gradients)


@dataclass
class _Gradients:
    """Gradients while they are added up: of every prediction's hidden rows, and of parameters by their id."""

    hidden: list[Tensor | None]
    parameters: dict[int, Tensor | None]

    def add(self, parameter: Tensor, part: Tensor) -> None:
        """Adds to a parameter's gradient, in fp32."""
        kept = self.parameters[id(parameter)]
        if kept is None:
            self.parameters[id(parameter)] = part.to(torch.float32, copy=True)
        else:
            kept += part

    def add_matmul(self, weight: Tensor, logits_gradient: Tensor, rows: Tensor, buffers: matmuls.ChunkBuffers) -> None:
        """Adds `logits_gradient.T @ rows` to a weight's gradient, in the weight's type."""
        kept = self.parameters[id(weight)]
        self.parameters[id(weight)] = matmuls.add_weight_gradient(kept, weight, logits_gradient, rows, buffers)

    def of(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """All of them, in the parameters' types, as a list that alone holds them."""
        found = list(self.hidden)
        for parameter in parameters:
            gradient = self.parameters.pop(id(parameter))
            found.append(torch.zeros_like(parameter) if gradient is None else gradient.to(parameter.dtype))
        return found


def _teacher_of(losses: _ChunkedLosses, chunk: Chunk) -> TeacherProbabilities | None:
    """The teacher's probabilities in a chunk."""
    if losses.teacher is None or chunk.teacher_rows is None:
        return None
    layer, hidden, buffers = losses.teacher.layer, losses.teacher.hidden[chunk.teacher_rows].detach(), losses.buffers
    with torch.no_grad():
        if layer.weight is not None:
            weight = buffers.converted(layer.weight, layer.dtype)
            logits = matmuls.logits_in_buffer(hidden.to(layer.dtype), weight, buffers)
        else:
            logits = layer.project(hidden)
    return teacher_probabilities(logits, buffers.empty("teacher", logits.shape, torch.float32, logits.device))


def _part_loss(
    losses: _ChunkedLosses, part: Part, teacher: TeacherProbabilities | None, gradients: _Gradients
) -> Tensor:
    """The scaled loss of a part; its gradients are added to `gradients`."""
    prediction = losses.predictions[part.prediction]
    layer, targets, scale = prediction.layer, prediction.targets[part.rows], prediction.scale
    rows, at = prediction.hidden[part.rows].detach(), part.teacher_rows
    hidden_gradient = gradients.hidden[part.prediction]
    chosen = None if teacher is None or at is None else TeacherProbabilities(teacher.p[at], teacher.p_log_p[at])
    if layer.weight is not None:
        rows = rows.to(layer.dtype)
        weight = losses.buffers.converted(layer.weight, layer.dtype)
        logits = matmuls.logits_in_buffer(rows, weight, losses.buffers)
        again = partial(matmuls.logits_of_few, rows, weight)
        sums = gradient_in_place(logits, targets, chosen, prediction.weights, prediction.accuracies, again)
        if hidden_gradient is not None:
            hidden_gradient[part.rows] = matmuls.rows_gradient(logits, weight) * scale
        if layer.weight.requires_grad:
            gradients.add_matmul(layer.weight, logits, (rows * scale).to(rows.dtype), losses.buffers)
    else:
        rows.requires_grad_(hidden_gradient is not None)
        with torch.enable_grad():
            logits = layer.project(rows)
        gradient = logits.detach().clone()
        sums = gradient_in_place(
            gradient, targets, chosen, prediction.weights, prediction.accuracies, lambda few: logits.detach()[few]
        )
        wanted = ([rows] if hidden_gradient is not None else []) + layer.trained
        found = list(torch.autograd.grad(logits, wanted, gradient))
        if hidden_gradient is not None:
            hidden_gradient[part.rows] = found.pop(0) * scale
        for parameter, each in zip(layer.trained, found, strict=True):
            gradients.add(parameter, each * scale)
    losses.keep(part, sums)
    return sums.loss * scale
