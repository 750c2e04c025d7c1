"""The losses of Medusa training in plain PyTorch: what the fast forms in `chunked` and `closed_form` must equal.

Cross-entropy, and three distances from a teacher: KL, total variation, and the mixture of both that arXiv 2602.23881 calls LK.

Contract: pure functions of tensors; knows nothing about models, axolotl or files. In formulas p is the teacher's
distribution over the vocabulary, which gets no gradient, and q the student's, which is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LK_DECAY = 10.0
"""η: how fast LK turns from KL to total variation as more tokens would be accepted. The paper's Medusa heads were trained with
10 (card of nebius/MEDUSA-Llama-3.1-8B-Instruct); for larger drafters its best is 3."""


@dataclass(frozen=True)
class LossWeights:
    """What the loss of a row is made of.

    `loss = cross_entropy · CE + kl · KL(p ‖ q) + tv · TV + lk · LK` with

    - `CE = (1 - own_softmax) · -log q[target] + own_softmax · -Σ q.detach() log q`,
    - `TV = 1 - Σ min(p, q)`: the share of tokens drawn from q that rejection sampling refuses,
    - `LK = λ · KL + (1 - λ) · TV` with `λ = exp(-η · Σ min(p, q).detach())`, η = `LK_DECAY` (arXiv 2602.23881, the hybrid
      loss). Each row has a λ of its own, so that no loss depends on what else is in a micro-batch.

    Attributes:
        cross_entropy: Weight of the cross-entropy with the target.
        kl: Weight of the divergence from the teacher.
        own_softmax: α, share of the student's own softmax in the cross-entropy's target.
        tv: Weight of the total variation distance from the teacher.
        lk: Weight of LK.
    """

    cross_entropy: float = 1.0
    kl: float = 0.0
    own_softmax: float = 0.0
    tv: float = 0.0
    lk: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss has a distance from a teacher."""
        return bool(self.kl or self.tv or self.lk)

    @property
    def has_total_variation(self) -> bool:
        """Whether the loss asks what rejection sampling would accept."""
        return bool(self.tv or self.lk)


CROSS_ENTROPY = LossWeights()


class RowLosses(NamedTuple):
    """Of every row the weighted loss and plain -log q[target], `[rows]` each, detached."""

    loss: Tensor
    cross_entropy: Tensor


@dataclass(frozen=True)
class LossSums:
    """Sums of a loss over rows, detached, and what the rows got right where accuracies were asked for.

    Attributes:
        loss: The weighted loss, scalar.
        cross_entropy: Plain -log q[target], scalar.
        kl: KL(p ‖ q), scalar; 0 without a teacher.
        correct: Whether no token has a larger logit than the target, `[rows]`.
        topk_hits: Sampled rows whose target is among the top 1 to k tokens, `[k]`.
        topk_rows: How many rows were sampled for `topk_hits`.
        rows: Each row's loss and cross-entropy, where they are at hand.
    """

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor
    correct: Tensor | None = None
    topk_hits: Tensor | None = None
    topk_rows: int = 0
    rows: RowLosses | None = None


def reference_loss(
    logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor | None,
    weights: LossWeights,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, LossSums, Tensor]:
    """The loss of a few rows, summed: the plain PyTorch that `chunked.chunked_loss` must equal.

    Args:
        logits: The student's logits, `[rows, vocab]`; used in fp32.
        targets: Token ids, `[rows]`.
        teacher_logits: The teacher's logits for the same rows, `[rows, vocab]`, or None.
        weights: What the loss is made of.
        row_weights: What each row's loss is multiplied by, `[rows]`; the returned sums are without.

    Returns:
        The weighted loss with its gradient, scalar; its sums without accuracies; and log q, `[rows, vocab]`, detached.
    """
    log_q = F.log_softmax(logits.float(), dim=-1)
    log_p = None if teacher_logits is None else F.log_softmax(teacher_logits.detach().float(), dim=-1)
    cross_entropy = F.nll_loss(log_q, targets, reduction="sum")
    kl = torch.zeros_like(cross_entropy.detach())
    if log_p is not None:
        kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    if row_weights is not None:
        of_rows = _row_losses(log_q, log_p, targets, weights)
        sums = LossSums(of_rows.detach().sum(), cross_entropy.detach(), kl.detach())
        return (row_weights * of_rows).sum(), sums, log_q.detach()
    loss = weights.cross_entropy * (1.0 - weights.own_softmax) * cross_entropy
    if weights.own_softmax:
        own = log_q.detach().exp()
        loss = loss - weights.cross_entropy * weights.own_softmax * (own * log_q).sum()
    if log_p is not None:
        loss = loss + weights.kl * kl
        if weights.has_total_variation:
            loss = loss + _total_variation_terms(log_q, log_p, weights).sum()
    return loss, LossSums(loss.detach(), cross_entropy.detach(), kl.detach()), log_q.detach()


def _row_losses(log_q: Tensor, log_p: Tensor | None, targets: Tensor, weights: LossWeights) -> Tensor:
    """The loss of every row, `[rows]`."""
    losses = weights.cross_entropy * (1.0 - weights.own_softmax) * F.nll_loss(log_q, targets, reduction="none")
    if weights.own_softmax:
        own = log_q.detach().exp()
        losses = losses - weights.cross_entropy * weights.own_softmax * (own * log_q).sum(dim=-1)
    if log_p is not None:
        losses = losses + weights.kl * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
        if weights.has_total_variation:
            losses = losses + _total_variation_terms(log_q, log_p, weights)
    return losses


def _total_variation_terms(log_q: Tensor, log_p: Tensor, weights: LossWeights) -> Tensor:
    """What TV and LK add to the loss of every row, `[rows]`."""
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    tv = total_variation(log_q, log_p)
    share = torch.exp(-LK_DECAY * (1.0 - tv.detach()))
    return weights.tv * tv + weights.lk * (share * kl + (1.0 - share) * tv)


def total_variation(log_q: Tensor, log_p: Tensor) -> Tensor:
    """`1 - Σ min(p, q)` of every row, `[rows]`, from logarithms `[rows, vocab]`; where p = q, the gradient is that of p."""
    q, p = log_q.exp(), log_p.exp()
    return 1.0 - torch.where(q < p, q, p).sum(dim=-1)


def is_top_token(scores: Tensor, targets: Tensor) -> Tensor:
    """Whether no token scores higher than the target, `[rows]`, from `[rows, vocab]` and `[rows]`: one cheap pass."""
    return scores.gather(-1, targets[:, None]).squeeze(-1) >= scores.amax(dim=-1)


def top_k_hits(scores: Tensor, targets: Tensor, k: int) -> Tensor:
    """Rows in which less than 1 to k tokens score higher than the target, `[k]`, from `[rows, vocab]` and `[rows]`."""
    return (scores.gather(-1, targets[:, None]) >= scores.topk(k, dim=-1).values).sum(dim=0)
