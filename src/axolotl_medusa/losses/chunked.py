"""Losses over a vocabulary, chunk of rows by chunk of rows: the fast equal of `cross_entropy_and_kl.reference_loss`.

Contract: pure functions of tensors; values and gradients are those of `reference_loss`, which the tests hold them to.
Nothing here holds logits of more than one chunk.

Where parameters are plain tensors, a chunk's gradient is computed while its logits are at hand and in their place
(`closed_form`), and weight gradients are added up in place (`matmuls`): three matmuls and a few passes over memory. Where
parameters are sharded, chunks are recomputed in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint as recomputed_in_backward  # nothing is saved to disk

from axolotl_medusa.losses import matmuls
from axolotl_medusa.losses.chain import Chain
from axolotl_medusa.losses.chunk_plan import Chunk, Part, planned_chunks
from axolotl_medusa.losses.closed_form import TeacherProbabilities, gradient_in_place, teacher_probabilities
from axolotl_medusa.losses.cross_entropy_and_kl import LossSums
from axolotl_medusa.losses.plain_chunks import ChunkedLosses
from axolotl_medusa.losses.prediction import Prediction, Teacher


def chunked_loss(
    predictions: Sequence[Prediction],
    teacher: Teacher | None = None,
    *,
    chain: Chain | None = None,
    chunk_rows: int | None = None,
    recompute: bool | None = None,
) -> tuple[Tensor, list[LossSums]]:
    """The loss of several students: the sum of `scale * reference_loss(...)` over their predictions.

    The teacher's distribution is computed once per chunk of its rows, for all students that learn from it. Without rows, a
    prediction's loss is a zero that still has a gradient (of zero) for every parameter, as distributed training needs.

    With a chain, the first predictions are its heads: their rows' losses are multiplied by `chain.chain_weights`. A chunk
    then has the rows of all heads at the same positions, so that the weights are known once its logits are: nothing is
    computed twice for them.

    Args:
        predictions: What is trained.
        teacher: The teacher of those that have `teacher_rows`.
        chain: Which predictions are weighted as a chain; their rows are its positions'.
        chunk_rows: Rows per chunk; without, as many as `chunk_plan` finds room for.
        recompute: True: recompute each chunk's logits in the backward. False: compute gradients in the forward, which
            saves a matmul. Without: the latter wherever parameters are plain tensors.

    Returns:
        The loss with its gradient, scalar, and each prediction's sums, which know no chain.
    """
    losses = ChunkedLosses(predictions, teacher, chain)
    is_divided = not all(map(_is_whole, losses.parameters))
    chunks = planned_chunks(predictions, teacher, chunk_rows, chain=chain, on_all_ranks=is_divided)
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


class _GradientInForward(torch.autograd.Function):
    """The losses of all chunks, whose gradients are computed while the chunk's logits are at hand."""

    @staticmethod
    def forward(ctx: FunctionCtx, losses: ChunkedLosses, chunks: Sequence[Chunk], *tensors: Tensor) -> Tensor:
        """Returns the loss, scalar; keeps its gradients. `tensors`: every prediction's hidden rows, then `losses.trained`."""
        wanted = ctx.needs_input_grad[2:]  # type: ignore[attr-defined]
        hidden = [each.hidden for each in losses.predictions]
        gradients = _Gradients(
            [torch.empty_like(rows) if wants else None for rows, wants in zip(hidden, wanted, strict=False)],
            {id(parameter): None for parameter in losses.trained},
        )
        total = torch.zeros((), dtype=torch.float32, device=hidden[0].device)
        for chunk in chunks:
            _add_chunk(losses, chunk, gradients, total)
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


def _teacher_of(losses: ChunkedLosses, chunk: Chunk) -> TeacherProbabilities | None:
    """The teacher's probabilities in a chunk."""
    if losses.teacher is None or chunk.teacher_rows is None:
        return None
    layer, hidden, buffers = losses.teacher.layer, losses.teacher.hidden[chunk.teacher_rows].detach(), losses.buffers
    with torch.no_grad():
        if layer.weight is not None:
            weight = buffers.converted(layer.weight, layer.dtype, beside_others=chunk.positions is not None)
            logits = matmuls.logits_in_buffer(hidden.to(layer.dtype), weight, buffers)
        else:
            logits = layer.project(hidden)
    return teacher_probabilities(logits, buffers.empty("teacher", logits.shape, torch.float32, logits.device))


def _add_chunk(losses: ChunkedLosses, chunk: Chunk, gradients: _Gradients, total: Tensor) -> None:
    """Adds the scaled loss of a chunk to `total`, and its gradients to `gradients`.

    Where the rows are a chain's, their gradients wait until all heads of the chunk have said what weight they have.
    """
    teacher = _teacher_of(losses, chunk)
    scales = [losses.predictions[part.prediction].scale for part in chunk.parts]
    if chunk.positions is None:
        for part, scale in zip(chunk.parts, scales, strict=True):
            sums, add_gradients = _part_gradient(losses, part, teacher, gradients)
            add_gradients(scale)
            losses.keep(part, sums)
            total += sums.loss * scale
        return
    done = [_part_gradient(losses, part, teacher, gradients, waits=True) for part in chunk.parts]
    rows = [sums.rows for sums, _ in done if sums.rows is not None]
    of_rows = losses.row_weights(chunk, [each.cross_entropy for each in rows])
    for part, scale, (sums, add_gradients), weights, each in zip(chunk.parts, scales, done, of_rows, rows, strict=True):
        add_gradients((weights * scale)[:, None])
        losses.keep(part, sums)
        total += (weights * each.loss).sum() * scale


def _part_gradient(
    losses: ChunkedLosses,
    part: Part,
    teacher: TeacherProbabilities | None,
    gradients: _Gradients,
    *,
    waits: bool = False,
) -> tuple[LossSums, Callable[[Tensor | float], None]]:
    """The sums of a part, and what adds its gradients to `gradients`, multiplied by a factor or by one of each row, `[rows, 1]`.

    Args:
        losses: What the part is of.
        part: The part.
        teacher: The teacher's probabilities in its chunk.
        gradients: Where gradients are added.
        waits: Whether other parts come before its gradients are added: it has memory of its own until then.
    """
    prediction = losses.predictions[part.prediction]
    layer, targets = prediction.layer, prediction.targets[part.rows]
    rows, at = prediction.hidden[part.rows].detach(), part.teacher_rows
    hidden_gradient = gradients.hidden[part.prediction]
    chosen = None if teacher is None or at is None else TeacherProbabilities(teacher.p[at], teacher.p_log_p[at])
    if layer.weight is not None:
        rows, matrix = rows.to(layer.dtype), layer.weight
        weight = losses.buffers.converted(matrix, layer.dtype, beside_others=waits)
        use = f"logits {part.prediction}" if waits else "logits"
        logits = matmuls.logits_in_buffer(rows, weight, losses.buffers, use)
        again = partial(matmuls.logits_of_few, rows, weight)
        sums = gradient_in_place(logits, targets, chosen, prediction.weights, prediction.accuracies, again)

        def add_of_matmul(scale: Tensor | float) -> None:
            if hidden_gradient is not None:
                hidden_gradient[part.rows] = matmuls.rows_gradient(logits, weight) * scale
            if matrix.requires_grad:
                gradients.add_matmul(matrix, logits, (rows * scale).to(rows.dtype), losses.buffers)

        return sums, add_of_matmul
    rows.requires_grad_(hidden_gradient is not None)
    with torch.enable_grad():
        logits = layer.project(rows)
    gradient = logits.detach().clone()
    sums = gradient_in_place(
        gradient, targets, chosen, prediction.weights, prediction.accuracies, lambda few: logits.detach()[few]
    )

    def add_of_layer(scale: Tensor | float) -> None:
        factor, of_logits = (
            (1.0, gradient * scale) if isinstance(scale, Tensor) and scale.dim() > 0 else (scale, gradient)
        )
        wanted = ([rows] if hidden_gradient is not None else []) + layer.trained
        found = list(torch.autograd.grad(logits, wanted, of_logits.to(logits.dtype)))
        if hidden_gradient is not None:
            hidden_gradient[part.rows] = found.pop(0) * factor
        for parameter, each in zip(layer.trained, found, strict=True):
            gradients.add(parameter, each * factor)

    return sums, add_of_layer
