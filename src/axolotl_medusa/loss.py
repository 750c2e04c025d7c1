"""Targets, weights and losses of Medusa training: pure functions of tensors.

Contract: knows nothing about models, axolotl or files. Offsets: row t of the base model predicts `labels[t + 1]`, row t
of head i predicts `labels[t + 2 + i]`, i from 0. What is a loss here is computed fast in `chunked_loss`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100


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


CROSS_ENTROPY = RowLossWeights()


@dataclass
class RowLosses:
    """Sums over rows, and what each row got right.

    Attributes:
        loss: The weighted loss, scalar, detached.
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
    """The loss of a few rows, summed: the plain PyTorch that `chunked_loss` must equal.

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
    """Rows in which less than 1 to k tokens score higher than the target, `[k]`, from `[rows, vocab]` and `[rows]`."""
    return (scores.gather(-1, targets[:, None]) >= scores.topk(k, dim=-1).values).sum(dim=0)
