"""Losses over a vocabulary, chunk of rows by chunk of rows: the fast equal of `loss.chunk_losses`.

Contract: pure functions of tensors; values and gradients are those of `loss.chunk_losses`, which the tests hold them to.
Nothing here holds logits of more than one chunk.

Where parameters are plain tensors, a chunk's gradient is computed while its logits are at hand and in their place
(`closed_form`), and weight gradients are added up in place: three matmuls and a few passes over memory. Where parameters
are sharded, chunks are recomputed in the backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

from axolotl_medusa.losses import host_memory
from axolotl_medusa.losses.closed_form import (
    Accuracies,
    FixedProbabilities,
    Sums,
    fixed_distribution,
    gradient_in_place,
)
from axolotl_medusa.losses.reference import (
    CROSS_ENTROPY,
    RowLosses,
    RowLossWeights,
    chunk_losses,
    is_top_token,
    top_k_hits,
)
from axolotl_medusa.processor import multiplies_bf16

CHUNK_LOGITS = 2**25
"""Logits of one chunk on a CPU: 128 MiB in fp32. Smaller chunks add up weight gradients more often; larger ones gain little."""

ACCELERATOR_CHUNK_LOGITS = 2**28
"""The same elsewhere: each chunk reads and writes a weight gradient of up to a gigabyte, which takes as long as 400 rows."""

COPIES = 4
"""An adapter on the output layer makes several copies of a chunk's logits; chunks are smaller by this factor there."""

NARROW_HIDDEN = 896
"""Below this hidden size a layer is narrow. On CPUs in half precision, oneDNN multiplies 330 to 1280 rows of 49,152 logits by
a matrix 576 wide at 0.6 of the rate of `NARROW_ROWS` rows (measured with AMX)."""

NARROW_ROWS = 320
"""Rows that are multiplied by a narrow layer's matrix at once."""

CONVERTED_ELEMENTS = 2**23
"""Elements of a weight gradient that are computed at once where its type is not the matmul's: a part of the vocabulary."""

Project = Callable[[Tensor], Tensor]
"""Maps hidden rows `[rows, hidden]` to logits `[rows, vocab]`."""


@dataclass(frozen=True)
class OutputLayer:
    """An output layer as the losses see it.

    Attributes:
        project: Hidden rows to logits.
        vocab_size: V.
        parameters: What `project` uses; those that require a gradient get one.
        weight: `[V, H]` where logits are nothing but `hidden @ weight.T`; None otherwise.
        dtype: What `hidden @ weight.T` is computed in, see `matmul_dtype`.
    """

    project: Project
    vocab_size: int
    parameters: Sequence[Tensor] = ()
    weight: Tensor | None = None
    dtype: torch.dtype = torch.float32

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that want a gradient."""
        return [parameter for parameter in self.parameters if parameter.requires_grad]


@dataclass(frozen=True)
class Prediction:
    """Rows of one trained distribution.

    Attributes:
        hidden: Input of the output layer, `[rows, hidden]`.
        targets: Token ids, `[rows]`, none ignored.
        layer: The output layer.
        weights: What a row's loss is made of.
        scale: Factor on the sum of the rows' losses.
        fixed_rows: For every row the row of the fixed distribution that speaks of the same token, ascending, `[rows]`;
            None where the loss has no divergence.
        accuracies: Accuracies wanted, if any.
    """

    hidden: Tensor
    targets: Tensor
    layer: OutputLayer
    weights: RowLossWeights = CROSS_ENTROPY
    scale: Tensor | float = 1.0
    fixed_rows: Tensor | None = None
    accuracies: Accuracies | None = None


@dataclass(frozen=True)
class FixedDistribution:
    """What trained distributions are drawn to: rows of hidden states `[rows, hidden]` and their output layer."""

    hidden: Tensor
    layer: OutputLayer


class _Part(NamedTuple):
    """Rows of one prediction in a chunk."""

    prediction: int
    rows: slice


class _Chunk(NamedTuple):
    """What is computed together: rows of predictions, and the rows of the fixed distribution that they need."""

    parts: Sequence[_Part]
    fixed_rows: slice | None


def matmul_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which operands of `dtype` are multiplied: fp32 for bf16 on a CPU that has no fast matmuls for it."""
    is_slow = dtype == torch.bfloat16 and device.type == "cpu" and not multiplies_bf16()
    return torch.float32 if is_slow else dtype


def row_losses(
    predictions: Sequence[Prediction],
    fixed: FixedDistribution | None = None,
    *,
    chunk_rows: int | None = None,
    recompute: bool | None = None,
) -> tuple[Tensor, list[RowLosses]]:
    """The loss of several trained distributions: the sum of `scale * chunk_losses(...)` over them.

    The fixed distribution is computed once per chunk of its rows, for all that are drawn to it. Without rows, a
    prediction's loss is a zero that still has a gradient (of zero) for every parameter, as distributed training needs.

    Args:
        predictions: What is trained.
        fixed: The fixed distribution of those that have `fixed_rows`.
        chunk_rows: Rows per chunk; without, as many as `CHUNK_LOGITS` holds.
        recompute: True: recompute each chunk's logits in the backward. False: compute gradients in the forward, which
            saves a matmul. Without: the latter wherever parameters are plain tensors.

    Returns:
        The loss with its gradient, scalar, and each prediction's sums.
    """
    run = _Run(predictions, fixed)
    chunks = list(run.chunks(chunk_rows))
    hidden = [prediction.hidden for prediction in predictions]
    if not torch.is_grad_enabled() or not (run.trained or any(rows.requires_grad for rows in hidden)):
        with torch.no_grad():
            loss = torch.stack([run.plain_loss(chunk, *run.inputs(chunk)) for chunk in chunks]).sum()
    elif recompute if recompute is not None else not all(map(_is_whole, run.parameters)):
        loss = torch.stack(
            [checkpoint(run.plain_loss, chunk, *run.inputs(chunk), use_reentrant=False) for chunk in chunks]
        ).sum()
    else:
        loss = _GradientInForward.apply(run, chunks, *hidden, *run.trained)  # type: ignore[no-untyped-call]
    return loss, run.results()


def _is_whole(parameter: Tensor) -> bool:
    """Whether a parameter can be differentiated in a forward: not partitioned by ZeRO-3, not sharded by FSDP."""
    return not hasattr(parameter, "ds_shape") and not hasattr(parameter, "device_mesh") and parameter.numel() > 0


class _Run:
    """One call of `row_losses`: the plan, the buffers that chunks share, and the sums."""

    def __init__(self, predictions: Sequence[Prediction], fixed: FixedDistribution | None) -> None:
        self.predictions = predictions
        self.fixed = fixed
        self.parameters = list({id(p): p for each in predictions for p in each.layer.parameters}.values())
        self.trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._cast: tuple[Tensor, Tensor] | None = None
        self._seen: list[dict[tuple[int, int], Sums]] = [{} for _ in predictions]

    def chunks(self, chunk_rows: int | None) -> Iterator[_Chunk]:
        """Chunks of every prediction; those with a fixed distribution are cut where its rows are."""
        drawn = {number: each.fixed_rows for number, each in enumerate(self.predictions) if each.fixed_rows is not None}
        if drawn and self.fixed is not None:
            layers = [self.predictions[number].layer for number in drawn]
            step = chunk_rows or self._rows_per_chunk(self.fixed.hidden.device, *layers)
            rows = self.fixed.hidden.shape[0]
            starts = list(range(0, max(rows, 1), step))
            edges = torch.tensor([*starts, rows], device=self.fixed.hidden.device)
            cuts = [torch.searchsorted(wanted, edges).tolist() for wanted in drawn.values()]
            for place, start in enumerate(starts):
                parts = [_Part(number, slice(*cut[place : place + 2])) for number, cut in zip(drawn, cuts, strict=True)]
                yield _Chunk(parts, slice(start, min(start + step, rows)))
        for number, each in enumerate(self.predictions):
            if each.fixed_rows is None:
                step, rows = chunk_rows or self._rows_per_chunk(each.hidden.device, each.layer), each.hidden.shape[0]
                for start in range(0, max(rows, 1), step):
                    yield _Chunk([_Part(number, slice(start, min(start + step, rows)))], None)

    @staticmethod
    def _rows_per_chunk(on: torch.device, *layers: OutputLayer) -> int:
        logits = CHUNK_LOGITS if on.type == "cpu" else ACCELERATOR_CHUNK_LOGITS
        if any(layer.weight is None for layer in layers):
            logits //= COPIES
        rows = max(1, logits // layers[0].vocab_size)
        return rows - rows % 64 if rows > 64 else rows  # kernels are fastest on whole tiles

    def inputs(self, chunk: _Chunk) -> list[Tensor]:
        """The hidden rows of a chunk's parts."""
        return [self.predictions[part.prediction].hidden[part.rows] for part in chunk.parts]

    def plain_loss(self, chunk: _Chunk, *hidden: Tensor) -> Tensor:
        """A chunk's scaled loss as plain PyTorch computes and differentiates it."""
        total = torch.zeros((), dtype=torch.float32, device=hidden[0].device)
        with torch.no_grad():
            fixed_logits = self._fixed_logits(chunk)
        for part, rows in zip(chunk.parts, hidden, strict=True):
            prediction = self.predictions[part.prediction]
            targets = prediction.targets[part.rows]
            at = self.fixed_rows(part, chunk)
            found = chunk_losses(
                prediction.layer.project(rows),
                targets,
                None if at is None or fixed_logits is None else fixed_logits[at],
                prediction.weights,
            )
            total = total + found.loss * prediction.scale
            if (part.rows.start, part.rows.stop) in self._seen[part.prediction]:
                continue  # a recomputation: these rows are counted already
            correct = hits = None
            if wanted := prediction.accuracies:
                correct = is_top_token(found.log_q, targets)
                hits = top_k_hits(found.log_q[:: wanted.every], targets[:: wanted.every], wanted.top_k)
            self.add(part, Sums(found.loss.detach(), found.cross_entropy, found.kl, correct, hits))
        return total

    def _fixed_logits(self, chunk: _Chunk) -> Tensor | None:
        if self.fixed is None or chunk.fixed_rows is None:
            return None
        return self.fixed.layer.project(self.fixed.hidden[chunk.fixed_rows])

    def fixed_rows(self, part: _Part, chunk: _Chunk) -> Tensor | slice | None:
        """Which rows of the chunk's fixed distribution a part needs; a slice where it is all of them, to copy nothing."""
        wanted = self.predictions[part.prediction].fixed_rows
        if chunk.fixed_rows is None or wanted is None:
            return None
        if part.rows.stop - part.rows.start == chunk.fixed_rows.stop - chunk.fixed_rows.start:
            return slice(None)
        rows: Tensor = wanted[part.rows] - chunk.fixed_rows.start
        return rows

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised memory of a shape that every chunk uses again."""
        size = math.prod(shape)
        kept = self._buffers.pop((name, dtype), None)
        if kept is None or kept.numel() < size:
            del kept  # so that its memory may be lent again, or given up for more
            kept = host_memory.empty(name, [size], dtype, device)
        self._buffers[name, dtype] = kept
        return kept[:size].view(*shape)

    def weight(self, layer: OutputLayer) -> Tensor:
        """The layer's weight in the type that is computed in; the layer used last keeps its copy."""
        assert layer.weight is not None
        weight = layer.weight.detach()
        if weight.dtype == layer.dtype:
            return weight
        if self._cast is None or self._cast[0] is not layer.weight:
            copy = self.buffer("weight", weight.shape, layer.dtype, weight.device).copy_(weight)
            self._cast = (layer.weight, copy)
        return self._cast[1]

    def add(self, part: _Part, sums: Sums) -> None:
        """Keeps the sums of a part."""
        self._seen[part.prediction][part.rows.start, part.rows.stop] = sums

    def results(self) -> list[RowLosses]:
        """Each prediction's sums over all chunks."""
        return [_all_sums(prediction, seen) for prediction, seen in zip(self.predictions, self._seen, strict=True)]


def _all_sums(prediction: Prediction, parts: Mapping[tuple[int, int], Sums]) -> RowLosses:
    loss, cross_entropy, kl = (
        torch.stack([sums[place] for sums in parts.values()]).sum()  # type: ignore[misc]
        for place in range(3)
    )
    losses = RowLosses(loss, cross_entropy, kl)
    if wanted := prediction.accuracies:
        losses.correct = torch.cat([sums.correct for sums in parts.values() if sums.correct is not None])
        losses.topk_hits = torch.stack([sums.hits for sums in parts.values() if sums.hits is not None]).sum(dim=0)
        losses.topk_rows = sum(len(range(start, stop, wanted.every)) for start, stop in parts)
    return losses


class _GradientInForward(torch.autograd.Function):
    """The losses of all chunks, whose gradients are computed while the chunk's logits are at hand."""

    @staticmethod
    def forward(ctx: FunctionCtx, run: _Run, chunks: Sequence[_Chunk], *tensors: Tensor) -> Tensor:
        """Returns the loss, scalar; keeps its gradients. `tensors`: every prediction's hidden rows, then `run.trained`."""
        wanted = ctx.needs_input_grad[2:]  # type: ignore[attr-defined]
        hidden = [each.hidden for each in run.predictions]
        gradients = _Gradients(
            [torch.empty_like(rows) if wants else None for rows, wants in zip(hidden, wanted, strict=False)],
            {id(parameter): None for parameter in run.trained},
        )
        total = torch.zeros((), dtype=torch.float32, device=hidden[0].device)
        for chunk in chunks:
            fixed = _fixed_probabilities(run, chunk)
            for part in chunk.parts:
                total += _part_loss(run, part, run.fixed_rows(part, chunk), fixed, gradients)
        ctx.gradients = gradients.of(run.trained)  # type: ignore[attr-defined]
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

    def of(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """All of them, in the parameters' types, as a list that alone holds them."""
        found = list(self.hidden)
        for parameter in parameters:
            gradient = self.parameters.pop(id(parameter))
            found.append(torch.zeros_like(parameter) if gradient is None else gradient.to(parameter.dtype))
        return found


def _fixed_probabilities(run: _Run, chunk: _Chunk) -> FixedProbabilities | None:
    if run.fixed is None or chunk.fixed_rows is None:
        return None
    layer, hidden = run.fixed.layer, run.fixed.hidden[chunk.fixed_rows].detach()
    with torch.no_grad():
        is_matmul = layer.weight is not None
        logits = _matmul(run, hidden.to(layer.dtype), run.weight(layer)) if is_matmul else layer.project(hidden)
    p = run.buffer("fixed", logits.shape, torch.float32, logits.device)
    return fixed_distribution(logits, p)


def _part_loss(
    run: _Run, part: _Part, at: Tensor | slice | None, fixed: FixedProbabilities | None, gradients: _Gradients
) -> Tensor:
    """The scaled loss of a part; its gradients are added to `gradients`."""
    prediction = run.predictions[part.prediction]
    layer, targets = prediction.layer, prediction.targets[part.rows]
    rows = prediction.hidden[part.rows].detach()
    hidden_gradient = gradients.hidden[part.prediction]
    chosen = None if fixed is None or at is None else FixedProbabilities(fixed.p[at], fixed.p_log_p[at])
    if layer.weight is not None:
        rows = rows.to(layer.dtype)
        weight = run.weight(layer)
        logits = _matmul(run, rows, weight)
        again = partial(_matmul_again, rows, weight)
        sums = gradient_in_place(logits, targets, chosen, prediction.weights, prediction.accuracies, again)
        if hidden_gradient is not None:
            hidden_gradient[part.rows] = _rows_gradient(logits, weight) * prediction.scale
        if layer.weight.requires_grad:
            _add_weight_gradient(run, layer.weight, logits, (rows * prediction.scale).to(rows.dtype), gradients)
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
            hidden_gradient[part.rows] = found.pop(0) * prediction.scale
        for parameter, each in zip(layer.trained, found, strict=True):
            gradients.add(parameter, each * prediction.scale)
    run.add(part, sums)
    return sums.loss * prediction.scale


def _matmul(run: _Run, rows: Tensor, weight: Tensor) -> Tensor:
    """Logits `rows @ weight.T` in the buffer that all chunks share.

    Here and below `out` is given: autocast, which may be on, would change the type of the operands of other matmuls.
    """
    logits = run.buffer("logits", (rows.shape[0], weight.shape[0]), rows.dtype, rows.device)
    return torch.mm(rows, weight.T, out=logits)


def _matmul_again(rows: Tensor, weight: Tensor, few: Tensor) -> Tensor:
    """Logits of the rows with the numbers `few`, beside those in the buffer."""
    return torch.mm(rows[few], weight.T, out=rows.new_empty(few.shape[0], weight.shape[0]))


def _rows_gradient(logits_gradient: Tensor, weight: Tensor) -> Tensor:
    """`logits_gradient @ weight`, `[rows, hidden]`."""
    is_narrow = weight.device.type == "cpu" and weight.element_size() == 2 and weight.shape[1] < NARROW_HIDDEN
    step = NARROW_ROWS if is_narrow else max(1, logits_gradient.shape[0])
    gradient = torch.empty(logits_gradient.shape[0], weight.shape[1], dtype=weight.dtype, device=weight.device)
    for rows, part in zip(torch.split(logits_gradient, step), torch.split(gradient, step), strict=True):
        torch.mm(rows, weight, out=part)
    return gradient


def _add_weight_gradient(
    run: _Run, weight: Tensor, logits_gradient: Tensor, rows: Tensor, gradients: _Gradients
) -> None:
    """Adds `logits_gradient.T @ rows` to the weight's gradient: in place where a matmul can write its type, else in parts."""
    kept, beta = gradients.parameters[id(weight)], 1
    in_place = _can_add_to(weight.dtype, rows)
    if kept is None:
        kept = gradients.parameters[id(weight)] = host_memory.empty(
            "gradient", weight.shape, weight.dtype, weight.device
        )
        if in_place and rows.is_cuda and rows.shape[0]:
            beta = 0  # the matmul writes over what is there
        else:  # also on CPUs: all threads write zeros, while a matmul waits for the kernel to map memory
            kept.zero_()
    if in_place and kept.dtype == rows.dtype:
        kept.addmm_(logits_gradient.T, rows, beta=beta)
    elif in_place:
        torch.addmm(kept, logits_gradient.T, rows, beta=beta, out_dtype=kept.dtype, out=kept)
    else:
        step = max(1, CONVERTED_ELEMENTS // kept.shape[1])
        for of_tokens, part_of_logits in zip(
            torch.split(kept, step), torch.split(logits_gradient, step, dim=1), strict=True
        ):
            part = run.buffer("weight gradient", of_tokens.shape, rows.dtype, rows.device)
            torch.mm(part_of_logits.T, rows, out=part)
            of_tokens += part


def _can_add_to(dtype: torch.dtype, rows: Tensor) -> bool:
    """Whether a matmul of `rows` can add to a gradient of a type: its own, and fp32, unrounded, where cuBLAS multiplies halves.

    PyTorch 2.11, axolotl 0.19's oldest, has that matmul.
    """
    is_half = rows.dtype in (torch.bfloat16, torch.float16)
    return dtype == rows.dtype or (dtype == torch.float32 and is_half and rows.is_cuda and torch.version.hip is None)
