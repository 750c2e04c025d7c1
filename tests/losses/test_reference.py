"""The plain losses against formulas."""

from __future__ import annotations

import pytest
import torch
from loss_cases import ATOL, LOSSES, ROWS, RTOL, VOCAB
from torch.nn import functional as F

from axolotl_medusa.losses.reference import RowLossWeights, chunk_losses, is_top_token, top_k_hits


@pytest.mark.parametrize("name", LOSSES)
def test_chunk_losses_equal_the_plain_formulas_and_their_gradient(name):
    weights = LOSSES[name]
    torch.manual_seed(0)
    logits = (3 * torch.randn(ROWS, VOCAB)).requires_grad_()
    fixed, targets = 3 * torch.randn(ROWS, VOCAB), torch.randint(VOCAB, (ROWS,))
    loss, cross_entropy, kl, _ = chunk_losses(logits, targets, fixed, weights)
    q, p, one_hot = logits.detach().softmax(-1), fixed.softmax(-1), F.one_hot(targets, VOCAB).float()
    soft = weights.own_softmax * q + (1 - weights.own_softmax) * one_hot
    expected_kl = (p * (p.log() - q.log())).sum()
    expected = weights.cross_entropy * -(soft * q.log()).sum() + weights.kl * expected_kl
    torch.testing.assert_close(loss.detach(), expected, rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(
        cross_entropy, F.cross_entropy(logits.detach(), targets, reduction="sum"), rtol=RTOL, atol=ATOL
    )
    torch.testing.assert_close(kl, expected_kl, rtol=RTOL, atol=ATOL)
    assert not cross_entropy.requires_grad and not kl.requires_grad
    loss.backward()
    gradient = weights.cross_entropy * (q - soft) + weights.kl * (q - p)
    torch.testing.assert_close(logits.grad, gradient, rtol=RTOL, atol=ATOL)


def test_chunk_losses_without_fixed_distribution_have_no_divergence():
    logits, targets = torch.randn(ROWS, VOCAB), torch.randint(VOCAB, (ROWS,))
    loss, cross_entropy, kl, _ = chunk_losses(logits, targets, None, RowLossWeights(kl=1.0))
    assert kl.item() == 0.0
    assert loss.item() == cross_entropy.item()


def test_chunk_losses_half_precision_logits_are_used_in_fp32():
    logits, fixed = torch.randn(ROWS, VOCAB).bfloat16(), torch.randn(ROWS, VOCAB).bfloat16()
    targets, weights = torch.randint(VOCAB, (ROWS,)), LOSSES["all-terms"]
    for half, full in zip(
        chunk_losses(logits, targets, fixed, weights),
        chunk_losses(logits.float(), targets, fixed.float(), weights),
        strict=True,
    ):
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
