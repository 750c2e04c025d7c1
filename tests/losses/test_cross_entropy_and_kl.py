"""The plain losses against formulas."""

from __future__ import annotations

import pytest
import torch
from loss_cases import ATOL, LOSSES, ROWS, RTOL, VOCAB
from torch.nn import functional as F

from axolotl_medusa.losses.cross_entropy_and_kl import LK_DECAY, LossWeights, is_top_token, reference_loss, top_k_hits


@pytest.mark.parametrize("name", LOSSES)
def test_reference_loss_equals_the_plain_formulas_and_their_gradient(name):
    weights = LOSSES[name]
    torch.manual_seed(0)
    logits = (3 * torch.randn(ROWS, VOCAB)).requires_grad_()
    teacher, targets = 3 * torch.randn(ROWS, VOCAB), torch.randint(VOCAB, (ROWS,))
    loss, sums, _ = reference_loss(logits, targets, teacher, weights)
    q, p, one_hot = logits.detach().softmax(-1), teacher.softmax(-1), F.one_hot(targets, VOCAB).float()
    soft = weights.own_softmax * q + (1 - weights.own_softmax) * one_hot
    expected_kl = (p * (p.log() - q.log())).sum()
    expected = weights.cross_entropy * -(soft * q.log()).sum() + weights.kl * expected_kl
    tv, kl_of_row = 0.5 * (p - q).abs().sum(-1, keepdim=True), (p * (p.log() - q.log())).sum(-1, keepdim=True)
    share = torch.exp(-LK_DECAY * (1 - tv))
    expected += (weights.tv * tv + weights.lk * (share * kl_of_row + (1 - share) * tv)).sum()
    torch.testing.assert_close(loss.detach(), expected, rtol=RTOL, atol=ATOL)
    assert torch.equal(sums.loss, loss.detach())
    torch.testing.assert_close(
        sums.cross_entropy, F.cross_entropy(logits.detach(), targets, reduction="sum"), rtol=RTOL, atol=ATOL
    )
    torch.testing.assert_close(sums.kl, expected_kl, rtol=RTOL, atol=ATOL)
    assert not any(each.requires_grad for each in (sums.loss, sums.cross_entropy, sums.kl))
    loss.backward()
    gradient = weights.cross_entropy * (q - soft) + (weights.kl + weights.lk * share) * (q - p)
    below = (q < p).float()
    gradient += (weights.tv + weights.lk * (1 - share)) * q * ((q * below).sum(-1, keepdim=True) - below)
    torch.testing.assert_close(logits.grad, gradient, rtol=RTOL, atol=ATOL)


def test_reference_loss_without_a_teacher_has_no_divergence():
    logits, targets = torch.randn(ROWS, VOCAB), torch.randint(VOCAB, (ROWS,))
    loss, sums, _ = reference_loss(logits, targets, None, LossWeights(kl=1.0))
    assert sums.kl.item() == 0.0
    assert loss.item() == sums.cross_entropy.item()


def test_reference_loss_uses_half_precision_logits_in_fp32():
    logits, teacher = torch.randn(ROWS, VOCAB).bfloat16(), torch.randn(ROWS, VOCAB).bfloat16()
    targets, weights = torch.randint(VOCAB, (ROWS,)), LOSSES["all-terms"]
    found = []
    for student, of_teacher in ((logits, teacher), (logits.float(), teacher.float())):
        loss, sums, log_q = reference_loss(student, targets, of_teacher, weights)
        found.append((loss, sums.cross_entropy, sums.kl, log_q))
    for half, full in zip(*found, strict=True):
        assert half.dtype == torch.float32
        assert torch.equal(half, full)


def test_accuracies_agree_with_topk_and_ties_count_as_right():
    torch.manual_seed(1)
    logits, targets = torch.randn(200, 11), torch.randint(11, (200,))
    hits = top_k_hits(logits, targets, 11)
    for k in range(1, 12):
        assert hits[k - 1] == (logits.topk(k).indices == targets[:, None]).any(-1).sum()
    assert torch.equal(is_top_token(logits, targets), logits.argmax(-1) == targets)
    assert is_top_token(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), torch.tensor([2])).tolist() == [True]
