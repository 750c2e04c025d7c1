"""Targets, schedules and the plain losses against loops and formulas."""

from __future__ import annotations

import math

import pytest
import torch
from naive_reference import naive_targets
from torch.nn import functional as F

from axolotl_medusa.losses.reference import RowLossWeights, chunk_losses, is_top_token, top_k_hits
from axolotl_medusa.losses.targets import IGNORE_INDEX, medusa_targets, sample_ids, target_counts
from axolotl_medusa.training.schedule import scheduler_factor

ROWS, HIDDEN, VOCAB = 23, 6, 37
RTOL, ATOL = 1e-5, 1e-6  # fp32 rounding of the same sums in another order
LOSSES = {
    "ce": RowLossWeights(),
    "weighted-ce": RowLossWeights(cross_entropy=0.3),
    "own-softmax": RowLossWeights(own_softmax=0.4),
    "kl": RowLossWeights(cross_entropy=0.0, kl=1.0),
    "all-terms": RowLossWeights(cross_entropy=0.7, kl=1.3, own_softmax=0.25),
}


def test_sample_ids_restart_of_positions_starts_a_sample():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1], [5, 6, 7, 8, 0, 0, 0, 0]])
    assert sample_ids(positions).tolist() == [[0, 0, 0, 1, 1, 2, 3, 3], [0, 0, 0, 0, 1, 2, 3, 4]]
    assert sample_ids(torch.zeros(2, 1, dtype=torch.long)).tolist() == [[0], [0]]


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 5])
def test_medusa_targets_equal_the_loop_over_rows_for_random_batches(num_heads):
    generator = torch.Generator().manual_seed(num_heads)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(60):
        batch, seq = integer(1, 3), integer(1, 14)  # often shorter than the number of heads
        labels = torch.randint(0, VOCAB, (batch, seq), generator=generator)
        labels[torch.rand(batch, seq, generator=generator) < integer(0, 3) / 4] = IGNORE_INDEX
        rows = []
        for row in range(batch):
            lengths = [integer(1, 5) for _ in range(seq)]  # more than enough packed samples for the row
            rows.append(torch.cat([torch.arange(length) for length in lengths])[:seq])
            labels[row, seq - integer(0, seq // 2) :] = IGNORE_INDEX  # ragged: padded on the right
        for position_ids in (None, torch.stack(rows), torch.arange(seq).expand(batch, seq)):
            expected = naive_targets(labels, num_heads, position_ids)
            found = medusa_targets(labels, num_heads, position_ids)
            assert torch.equal(found, expected)
            counts = [(expected[..., column] != IGNORE_INDEX).sum().item() for column in range(num_heads + 1)]
            assert target_counts(labels, num_heads, position_ids).tolist() == counts


def test_medusa_targets_of_one_row_are_offset_by_two_plus_the_head():
    targets = medusa_targets(torch.tensor([[10, 11, 12, 13]]), 2)
    ignored = IGNORE_INDEX
    assert targets.tolist() == [[[11, 12, 13], [12, 13, ignored], [13, ignored, ignored], [ignored, ignored, ignored]]]


def test_medusa_targets_row_without_base_target_has_no_head_targets():
    targets = medusa_targets(torch.tensor([[10, IGNORE_INDEX, 12, 13]]), 2)
    assert targets[0, 0].tolist() == [IGNORE_INDEX] * 3
    assert targets[0, 1].tolist() == [12, 13, IGNORE_INDEX]


def test_medusa_targets_leave_the_labels_unchanged():
    labels = torch.tensor([[1, IGNORE_INDEX, 3, 4]])
    before = labels.clone()
    medusa_targets(labels, 3, torch.tensor([[0, 1, 0, 1]]))
    assert torch.equal(labels, before)


@pytest.mark.parametrize(
    ("shape", "ramp", "values"),
    [
        ("constant", 1.0, {0.0: 1.0, 0.3: 1.0, 1.0: 1.0}),
        ("linear", 1.0, {0.0: 0.0, 0.25: 0.25, 1.0: 1.0}),
        ("sine", 1.0, {0.0: 0.0, 1 / 3: 0.5, 0.5: math.sqrt(0.5), 1.0: 1.0}),
        ("sine", 0.4, {0.0: 0.0, 0.2: math.sqrt(0.5), 0.4: 1.0, 0.7: 1.0, 1.0: 1.0}),
    ],
)
def test_scheduler_factor_at_ends_middle_and_plateau(shape, ramp, values):
    for progress, expected in values.items():
        assert scheduler_factor(shape, ramp, progress) == pytest.approx(expected)


@pytest.mark.parametrize("shape", ["cosine", "Sine", "sine_0.5", ""])
def test_scheduler_factor_unknown_shape_is_an_error(shape):
    with pytest.raises(ValueError, match=f"shape is '{shape}': expected constant, linear or sine"):
        scheduler_factor(shape, 1.0, 0.5)


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
