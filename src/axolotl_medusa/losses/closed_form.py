"""Gradients of the losses over a vocabulary in closed form, written over the logits that they are of.

Contract: pure functions of tensors; values and gradients are those of `cross_entropy_and_kl.reference_loss`, which the tests hold them
to. As there, p is the teacher's distribution and q the student's. Rows are worked on in blocks: on a CPU, whose passes over
the same memory find it in the cache; elsewhere where copies are made.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from axolotl_medusa.losses.cross_entropy_and_kl import LK_DECAY, LossSums, LossWeights, RowLosses
from axolotl_medusa.losses.prediction import Accuracies
from axolotl_medusa.losses.targets import IGNORE_INDEX

_BLOCK_BYTES = 2**25
"""Memory that is worked on together on a CPU: it stays in a large cache between one pass and the next."""

_ACCELERATOR_BLOCK_BYTES = 2**29
"""The same elsewhere: copies in fp32 of all of a chunk's logits would take gigabytes."""

_COPIES = 4
"""Blocks are smaller by this factor where copies of them are made, in fp32."""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class TeacherProbabilities(NamedTuple):
    """The teacher's distribution in a chunk: probabilities p `[rows, vocab]` in fp32, and each row's sum of p log p."""

    p: Tensor
    p_log_p: Tensor


def teacher_probabilities(logits: Tensor, p: Tensor) -> TeacherProbabilities:
    """The probabilities that a teacher's logits `[rows, vocab]` stand for, written into `p`, `[rows, vocab]` in fp32."""
    sums = torch.empty(logits.shape[0], device=logits.device)
    with torch.autocast(logits.device.type, enabled=False):  # which would take the products of fp32 in halves
        for block in _blocks(logits, _COPIES):
            scores = logits[block].float()
            torch.softmax(scores, dim=-1, out=p[block])
            log_sum = scores.amax(dim=-1) - p[block].amax(dim=-1).log()
            sums[block] = torch.linalg.vecdot(p[block], scores) - log_sum
    return TeacherProbabilities(p, sums)


@dataclass
class _RowValues:
    """The terms of every row, `[rows]` each: what is summed at the end.

    Attributes:
        cross_entropy: -log q[target].
        own_entropy: Entropy of q; zero where it is not asked for.
        kl: KL(p ‖ q); zero without a teacher.
        correct: Whether no token is more probable than the target.
        tv: Total variation distance of p and q; zero where it is not asked for.
        lk: LK; zero where it is not asked for.
    """

    cross_entropy: Tensor
    own_entropy: Tensor
    kl: Tensor
    correct: Tensor
    tv: Tensor
    lk: Tensor

    def losses(self, weights: LossWeights) -> Tensor:
        """The loss of every row, `[rows]`."""
        of_tokens = (1.0 - weights.own_softmax) * self.cross_entropy + weights.own_softmax * self.own_entropy
        return weights.cross_entropy * of_tokens + weights.kl * self.kl + weights.tv * self.tv + weights.lk * self.lk


def gradient_in_place(
    logits: Tensor,
    targets: Tensor,
    teacher: TeacherProbabilities | None,
    weights: LossWeights,
    accuracies: Accuracies | None,
    logits_again: Callable[[Tensor], Tensor],
) -> LossSums:
    """Replaces logits by the gradient of their loss: `reference_loss` and its derivative in closed form.

    Args:
        logits: The student's, `[rows, vocab]`, in any type; afterwards the gradient of the sum over rows.
        targets: Token ids, `[rows]`.
        teacher: The teacher's probabilities for the same rows, if the loss has a distance from it.
        weights: What the loss is made of.
        accuracies: Accuracies wanted, if any.
        logits_again: Logits of the rows with the given numbers, for the few whose target's probability underflows.

    Returns:
        The sums over rows, and the rows' own losses.
    """
    values = _RowValues(*torch.zeros((6, logits.shape[0]), device=logits.device))
    hits = torch.zeros(accuracies.top_k if accuracies else 0, dtype=torch.long, device=logits.device)
    only_cross_entropy = teacher is None and not weights.own_softmax
    with torch.autocast(logits.device.type, enabled=False):  # CUDA's gives sums of halves in fp32, which fit nowhere
        for block in _blocks(logits, copies=1 if only_cross_entropy else _COPIES):
            if not only_cross_entropy:
                hits += _all_terms_block(logits, block, targets, teacher, weights, values, accuracies)
            elif fused_kernels_for(logits.device):
                hits += _cross_entropy_fused(logits, block, targets, values, accuracies)
            else:
                hits += _cross_entropy_block(logits, block, targets, values, accuracies)
    lost = (~(values.cross_entropy < -math.log(torch.finfo(logits.dtype).tiny))).nonzero().squeeze(1)
    if lost.numel():
        again = logits_again(lost).float()
        values.cross_entropy[lost] = again.logsumexp(-1) - again.gather(1, targets[lost, None]).squeeze(1)
    if only_cross_entropy and weights.cross_entropy != 1.0:
        logits *= weights.cross_entropy
    cross_entropy, kl = values.cross_entropy.sum(), values.kl.sum()
    loss = weights.cross_entropy * (1.0 - weights.own_softmax) * cross_entropy + weights.kl * kl
    loss = loss + weights.cross_entropy * weights.own_softmax * values.own_entropy.sum()
    if weights.has_total_variation:
        loss = loss + weights.tv * values.tv.sum() + weights.lk * values.lk.sum()
    rows = RowLosses(values.losses(weights), values.cross_entropy)
    if accuracies is None:
        return LossSums(loss, cross_entropy, kl, rows=rows)
    sampled = len(range(0, logits.shape[0], accuracies.every))
    return LossSums(loss, cross_entropy, kl, values.correct.bool(), hits, sampled, rows)


@functools.cache
def fused_kernels_for(device: torch.device) -> bool:
    """Whether Liger's kernel is used: on CUDA, where it is installed (axolotl brings it)."""
    return device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def _cross_entropy_fused(
    logits: Tensor, block: slice, targets: Tensor, values: _RowValues, accuracies: Accuracies | None
) -> Tensor:
    """As `_cross_entropy_block`, in one pass of Liger's kernel, which writes the gradient over the logits too."""
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    rows = logits[block].detach()
    hits = _hits(rows, rows[torch.arange(len(rows), device=rows.device), targets[block]], block, accuracies)
    losses, _, correct, *_ = cross_entropy_forward(
        rows.requires_grad_(),  # else it computes no gradient
        targets[block],
        weight=None,
        ignore_index=IGNORE_INDEX,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="none",
        softcap=None,
        return_z_loss=False,
        return_token_accuracy=accuracies is not None,
    )
    values.cross_entropy[block] = losses.float()
    if accuracies:
        values.correct[block] = correct
    return hits


def _cross_entropy_block(
    logits: Tensor, block: slice, targets: Tensor, values: _RowValues, accuracies: Accuracies | None
) -> Tensor:
    """Cross-entropy alone: the gradient is softmax - one-hot, without leaving the logits' memory.

    Where the target is nearly certain, q[target] - 1 has no digits left in half precision; there it is summed from the
    other tokens.

    Returns:
        Hits of the sampled rows, `[k]`.
    """
    q = logits[block]
    at_target = (torch.arange(q.shape[0], device=q.device), targets[block])
    torch.softmax(q, dim=-1, out=q)
    of_target = q[at_target]
    likelihood, gradient = of_target.float().log(), of_target - 1
    q[at_target] = 0.0
    if q.dtype != torch.float32 and (certain := (of_target > 0.5).nonzero().squeeze(1)).numel():
        others = q[certain].sum(dim=-1)
        likelihood[certain], gradient[certain] = torch.log1p(-others.float()), -others
    values.cross_entropy[block] = -likelihood
    hits = _hits(q, of_target, block, accuracies)
    if accuracies:
        values.correct[block] = of_target >= _largest_of_positive(q)
    q[at_target] = gradient
    return hits


def _all_terms_block(
    logits: Tensor,
    block: slice,
    targets: Tensor,
    teacher: TeacherProbabilities | None,
    weights: LossWeights,
    values: _RowValues,
    accuracies: Accuracies | None,
) -> Tensor:
    """The gradient ce (1 - α) (q - one-hot) + kl (q - p), in fp32, with what `_total_variation_block` adds, and the loss's terms.

    Logarithms are taken of single tokens only: log q[v] = logits[v] - log Σ exp, and the latter from the largest token's.

    Returns:
        Hits of the sampled rows, `[k]`.
    """
    scores = logits[block].float()
    at_target = (torch.arange(scores.shape[0], device=scores.device), targets[block])
    q = torch.softmax(scores, dim=-1)
    largest = q.amax(dim=-1)
    log_sum = scores.amax(dim=-1) - largest.log()
    values.cross_entropy[block] = log_sum - scores[at_target]
    if weights.own_softmax:
        values.own_entropy[block] = log_sum - torch.linalg.vecdot(q, scores)
    of_target = q[at_target]
    values.correct[block] = of_target >= largest
    hits = _hits(q, of_target, block, accuracies)
    of_one_hot = weights.cross_entropy * (1.0 - weights.own_softmax)
    if teacher is None:
        q *= of_one_hot
    else:
        p = teacher.p[block]
        values.kl[block] = teacher.p_log_p[block] - torch.linalg.vecdot(p, scores) + log_sum
        if weights.has_total_variation:
            of_q, of_p = _total_variation_block(q, p, block, weights, values, scores)
            q *= of_q + of_one_hot + weights.kl
            q += scores
            q.addcmul_(p, of_p + weights.kl, value=-1.0)
        else:
            q *= of_one_hot + weights.kl
            q.sub_(p, alpha=weights.kl)
    q[at_target] -= of_one_hot
    logits[block] = q
    return hits


def _total_variation_block(
    q: Tensor, p: Tensor, block: slice, weights: LossWeights, values: _RowValues, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """The terms TV and LK of a block's rows, and their gradient in parts.

    With S the sum of q over the tokens that q has less of than p, `d TV / d logits = q (S - [q < p])`.

    Args:
        q: The student's probabilities, `[rows, vocab]`.
        p: The teacher's.
        block: Which rows they are.
        weights: What the loss is made of.
        values: Gets the terms; its KL is that of these rows already.
        scratch: Afterwards what is added to the gradient, `[rows, vocab]`.

    Returns:
        Factors of q and of -p in the gradient, `[rows, 1]` each.
    """
    torch.minimum(q, p, out=scratch)
    tv = 1.0 - scratch.sum(dim=-1)
    share = torch.exp(-LK_DECAY * (1.0 - tv))
    values.tv[block], values.lk[block] = tv, share * values.kl[block] + (1.0 - share) * tv
    of_tv, of_kl = (weights.tv + weights.lk * (1.0 - share))[:, None], (weights.lk * share)[:, None]
    torch.mul(q, q < p, out=scratch)
    of_q = of_kl + of_tv * scratch.sum(dim=-1, keepdim=True)
    scratch *= -of_tv
    return of_q, of_kl


def _hits(q: Tensor, of_target: Tensor, block: slice, accuracies: Accuracies | None) -> Tensor:
    """Sampled rows of a block whose target is among the top 1 to k tokens, `[k]`; its own entry of q may be 0."""
    if accuracies is None:
        return torch.empty(0, dtype=torch.long, device=q.device)
    sampled = slice(-block.start % accuracies.every, None, accuracies.every)
    return (of_target[sampled, None] >= q[sampled].topk(accuracies.top_k, dim=-1).values).sum(dim=0)


def _largest_of_positive(values: Tensor) -> Tensor:
    """`values.amax(-1)` where no value is negative: their bits are ordered as they are, and compare faster."""
    bits = values.view(_BITS[values.element_size()])
    return bits.amax(dim=-1).view(values.dtype)


def _blocks(logits: Tensor, copies: int) -> Iterator[slice]:
    """Slices of rows that are worked on together; in place, an accelerator works on all of them."""
    rows = logits.shape[0]
    is_cpu = logits.device.type == "cpu"
    step = (_BLOCK_BYTES if is_cpu else _ACCELERATOR_BLOCK_BYTES) // (copies * logits.shape[1] * logits.element_size())
    step = max(1, rows if copies == 1 and not is_cpu else step)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
