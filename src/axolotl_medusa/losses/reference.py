"""The losses of Medusa training in plain PyTorch: what the fast forms in `chunked` and `closed_form` must equal.

Contract: pure functions of tensors; knows nothing about models, axolotl or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


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
