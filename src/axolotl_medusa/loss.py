"""Targets, weights and losses of Medusa training: pure functions of tensors.

Contract: knows nothing about models, axolotl or files. Offsets: row t of the base model predicts `labels[t + 1]`, row t
of head i predicts `labels[t + 2 + i]`, i from 0. Nothing here holds logits of more than one chunk of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100

CHUNK_LOGITS = 2**25
"""Logits held at once: 128 MiB in fp32. Larger chunks do not raise the matmul's speed at vocabularies of 32k and up."""

Project = Callable[[Tensor], Tensor]
"""Maps hidden rows `[rows, hidden]` to logits `[rows, vocab]`."""


def sample_ids(position_ids: Tensor) -> Tensor:
    """Numbers the packed samples of each row of a batch: a sample starts where positions do not go on by one.

    Args:
        position_ids: Positions, `[batch, seq]`, restarting in each packed sample.

    Returns:
        Sample numbers, `[batch, seq]`, from 0 in each row.
    """
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return F.pad(starts.long().cumsum(dim=1), (1, 0))


def medusa_targets(labels: Tensor, num_heads: int, position_ids: Tensor | None = None) -> Tensor:
    """Targets of the base model and of every head.

    A target is ignored where its label is -100, past the end, or in another packed sample than its row. Rows count only
    where the base target is not ignored: at decoding time heads are only ever asked there.

    Args:
        labels: Token ids or -100, `[batch, seq]`.
        num_heads: Number of heads N.
        position_ids: Positions that tell packed samples apart, `[batch, seq]`; None where nothing is packed.

    Returns:
        Targets, `[batch, seq, N + 1]`: column 0 the base model's, column 1 + i head i's; -100 where ignored.
    """
    samples = None if position_ids is None else sample_ids(position_ids)
    columns = []
    for offset in range(1, num_heads + 2):
        shifted = F.pad(labels[:, offset:], (0, min(offset, labels.shape[1])), value=IGNORE_INDEX)
        if samples is not None:
            other = F.pad(samples[:, offset:], (0, min(offset, labels.shape[1])), value=-1)
            shifted = shifted.masked_fill(other != samples, IGNORE_INDEX)
        columns.append(shifted)
    targets = torch.stack(columns, dim=-1)
    return targets.masked_fill(targets[..., :1] == IGNORE_INDEX, IGNORE_INDEX)


def target_counts(labels: Tensor, num_heads: int, position_ids: Tensor | None = None) -> Tensor:
    """How many targets the base model and each head have, `[N + 1]`; arguments as for `medusa_targets`."""
    targets = medusa_targets(labels, num_heads, position_ids)
    return (targets != IGNORE_INDEX).sum(dim=(0, 1))


def scheduler_factor(shape: str, ramp: float, progress: float) -> float:
    """Factor on the heads' coefficient at a fraction of the training.

    `constant`: 1. `linear`: progress. `sine`: sin(π/2 · progress / ramp) up to the fraction `ramp`, then 1 (schedules of
    the first public Medusa trainer).

    Args:
        shape: Shape of the schedule.
        ramp: Fraction of the optimizer steps over which a sine rises, in (0, 1].
        progress: Fraction of the optimizer steps done, in [0, 1].

    Raises:
        ValueError: The shape is not known.
    """
    if shape == "constant":
        return 1.0
    if shape == "linear":
        return progress
    if shape == "sine":
        return math.sin(math.pi / 2 * min(1.0, progress / ramp))
    raise ValueError(f"the schedule's shape is {shape!r}: expected constant, linear or sine")


@dataclass(frozen=True)
class RowLossWeights:
    """What a row's loss is made of; `q` is the trained distribution, `p` a fixed one.

    `loss = cross_entropy · CE + kl · KL(p ‖ q)` with
    `CE = (1 - own_softmax) · -log q[target] + own_softmax · -Σ q.detach() log q`.

    Attributes:
        cross_entropy: Weight of the cross-entropy with the target.
        kl: Weight of the divergence from `p`.
        own_softmax: α, share of the model's own softmax in the cross-entropy's target.
    """

    cross_entropy: float = 1.0
    kl: float = 0.0
    own_softmax: float = 0.0


@dataclass
class RowLosses:
    """Sums over rows, and what each row got right.

    Attributes:
        loss: The weighted loss with its gradient, scalar.
        cross_entropy: Plain -log q[target], scalar, detached.
        kl: KL(p ‖ q), scalar, detached; 0 without a fixed distribution.
        correct: Whether no token has a larger logit than the target, `[rows]`; None where accuracies were not asked for.
        topk_hits: Sampled rows whose target is among the top 1 to k tokens, `[k]`, or None.
        topk_rows: How many rows were sampled for `topk_hits`.
    """

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor
    correct: Tensor | None = None
    topk_hits: Tensor | None = None
    topk_rows: int = 0


class ChunkLosses(NamedTuple):
    """What `chunk_losses` returns; scalars are sums over rows."""

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor
    log_q: Tensor


def chunk_losses(logits: Tensor, targets: Tensor, fixed_logits: Tensor | None, weights: RowLossWeights) -> ChunkLosses:
    """The loss of a few rows, summed: the plain PyTorch that everything else in this module must equal.

    Args:
        logits: The trained logits, `[rows, vocab]`; used in fp32.
        targets: Token ids, `[rows]`.
        fixed_logits: Logits of the fixed distribution p, `[rows, vocab]`, or None.
        weights: What the loss is made of.

    Returns:
        The weighted loss, the plain cross-entropy, the divergence, and log q, `[rows, vocab]`; all but the first detached.
    """
    logits = logits.float()
    log_q = F.log_softmax(logits, dim=-1)
    cross_entropy = F.nll_loss(log_q, targets, reduction="sum")
    loss = weights.cross_entropy * (1.0 - weights.own_softmax) * cross_entropy
    if weights.own_softmax:
        own = log_q.detach().exp()
        loss = loss - weights.cross_entropy * weights.own_softmax * (own * log_q).sum()
    if fixed_logits is None:
        return ChunkLosses(loss, cross_entropy.detach(), torch.zeros_like(cross_entropy.detach()), log_q.detach())
    log_p = F.log_softmax(fixed_logits.detach().float(), dim=-1)
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return ChunkLosses(loss + weights.kl * kl, cross_entropy.detach(), kl.detach(), log_q.detach())


def is_top_token(scores: Tensor, targets: Tensor) -> Tensor:
    """Whether no token scores higher than the target, `[rows]`, from `[rows, vocab]` and `[rows]`: one cheap pass."""
    return scores.gather(-1, targets[:, None]).squeeze(-1) >= scores.amax(dim=-1)


def top_k_hits(scores: Tensor, targets: Tensor, k: int) -> Tensor:
    """Rows whose target is among the top 1 to k tokens, `[k]`, from `[rows, vocab]` and `[rows]`."""
    found = scores.topk(k, dim=-1).indices == targets[:, None]
    return found.sum(dim=0).cumsum(dim=0)


class _GradientInForward(torch.autograd.Function):
    """Sum of the chunks' losses whose gradient is computed while the chunk's logits are at hand.

    Equal to `sum(loss_of_chunk(hidden[chunk], chunk) for chunk in chunks)`. `parameters` are those that
    `loss_of_chunk` uses and that need a gradient; they are arguments so that autograd passes their gradients on.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        chunks: Sequence[slice],
        loss_of_chunk: Callable[[Tensor, slice], Tensor],
        *parameters: Tensor,
    ) -> Tensor:
        """Returns the summed loss, scalar; keeps its gradients."""
        needs_hidden = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        gradients = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for chunk in chunks:
            rows = hidden[chunk].detach().requires_grad_(needs_hidden)
            with torch.enable_grad():
                loss = loss_of_chunk(rows, chunk)
            wanted = ([rows] if needs_hidden else []) + list(parameters)
            found = list(torch.autograd.grad(loss, wanted))
            if hidden_gradient is not None:
                hidden_gradient[chunk] = found.pop(0)
            for gradient, part in zip(gradients, found, strict=True):
                gradient += part
            total += loss.detach()
        gradients = [part.to(parameter.dtype) for part, parameter in zip(gradients, parameters, strict=True)]
        ctx.save_for_backward(*([hidden_gradient] if hidden_gradient is not None else []), *gradients)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients that the forward computed."""
        saved = [gradient * grad_outputs[0] for gradient in ctx.saved_tensors]  # type: ignore[attr-defined]
        hidden_gradient = saved.pop(0) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        return (hidden_gradient, None, None, *saved)


def _is_plain(parameter: Tensor) -> bool:
    """Whether a parameter can be differentiated in a forward: not partitioned by ZeRO-3, not sharded by FSDP."""
    return not hasattr(parameter, "ds_shape") and not hasattr(parameter, "device_mesh") and parameter.numel() > 0


def row_losses(
    hidden: Tensor,
    targets: Tensor,
    project: Project,
    *,
    vocab_size: int,
    parameters: Sequence[Tensor] = (),
    fixed_logits: Callable[[slice], Tensor] | None = None,
    weights: RowLossWeights | None = None,
    top_k: int = 0,
    top_k_every: int = 1,
    chunk_rows: int | None = None,
    recompute: bool | None = None,
) -> RowLosses:
    """Loss of rows of hidden states, chunk by chunk: no `[rows, vocab]` tensor for more than one chunk.

    Equal to `chunk_losses(project(hidden), targets, fixed_logits(all rows), weights)`. With no rows it is a zero that
    still has a gradient (of zero) for every parameter, as distributed training needs.

    Args:
        hidden: Input of the output layer, `[rows, hidden]`.
        targets: Token ids, `[rows]`, none ignored.
        project: The output layer: hidden rows to logits `[rows, vocab]`.
        vocab_size: V, to choose the chunk.
        parameters: What `project` uses; those that require a gradient get one.
        fixed_logits: Logits of the fixed distribution for a slice of the rows, or None.
        weights: What the loss is made of; plain cross-entropy without.
        top_k: Accuracies wanted, top 1 to k; 0: none.
        top_k_every: Accuracies beyond the top token come from every n-th row of a chunk: a top-k pass costs as much as
            the cross-entropy's.
        chunk_rows: Rows per chunk; without, as many as keep `CHUNK_LOGITS` logits.
        recompute: True: recompute each chunk's logits in the backward. False: compute its gradient in the forward,
            which saves a matmul. Without: the latter wherever parameters are plain tensors.

    Returns:
        The sums over all rows.
    """
    weights = weights or RowLossWeights()
    rows = hidden.shape[0]
    step = chunk_rows or max(1, CHUNK_LOGITS // vocab_size)
    chunks = [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    cross_entropy = torch.zeros((), dtype=torch.float32, device=hidden.device)
    kl = torch.zeros_like(cross_entropy)
    correct: dict[int, Tensor] = {}
    hits = torch.zeros(top_k, dtype=torch.long, device=hidden.device)

    def loss_of_chunk(chunk_hidden: Tensor, chunk: slice) -> Tensor:
        logits = project(chunk_hidden)
        fixed = None
        if fixed_logits is not None:
            with torch.no_grad():
                fixed = fixed_logits(chunk)
        result = chunk_losses(logits, targets[chunk], fixed, weights)
        if chunk.start not in correct:  # the first of at most two passes: a recomputation must not count twice
            correct[chunk.start] = is_top_token(result.log_q, targets[chunk]) if top_k else targets[:0].bool()
            if top_k > 1:
                hits.add_(top_k_hits(result.log_q[::top_k_every], targets[chunk][::top_k_every], top_k))
            cross_entropy.add_(result.cross_entropy)
            kl.add_(result.kl)
        return result.loss

    if not torch.is_grad_enabled() or not (hidden.requires_grad or trained):
        with torch.no_grad():
            loss = torch.stack([loss_of_chunk(hidden[chunk], chunk) for chunk in chunks]).sum()
    elif recompute if recompute is not None else not all(map(_is_plain, parameters)):
        loss = torch.stack(
            [checkpoint(loss_of_chunk, hidden[chunk], chunk, use_reentrant=False) for chunk in chunks]
        ).sum()
    else:
        loss = _GradientInForward.apply(hidden, chunks, loss_of_chunk, *trained)  # type: ignore[no-untyped-call]
    if not top_k:
        return RowLosses(loss, cross_entropy, kl)
    sampled = sum(len(range(chunk.start, chunk.stop, top_k_every)) for chunk in chunks)
    return RowLosses(loss, cross_entropy, kl, torch.cat(list(correct.values())), hits, sampled)
