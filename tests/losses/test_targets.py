"""Targets against loops over rows."""

from __future__ import annotations

import pytest
import torch
from loss_cases import VOCAB
from naive_reference import naive_targets

from axolotl_medusa.losses.targets import IGNORE_INDEX, medusa_targets, sample_ids, target_counts


def test_sample_ids_restart_of_positions_starts_a_sample():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1], [5, 6, 7, 8, 0, 0, 0, 0]])
    assert sample_ids(positions).tolist() == [[0, 0, 0, 1, 1, 2, 3, 3], [0, 0, 0, 0, 1, 2, 3, 4]]
    assert sample_ids(torch.zeros(2, 1, dtype=torch.long)).tolist() == [[0], [0]]


def test_medusa_targets_skipped_positions_are_inside_a_sample():
    """Axolotl's `use_pose` skips positions to reach a longer context; a sample still begins at 0."""
    labels = torch.arange(12)[None]
    plain = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]])
    skipping = torch.tensor([[0, 1, 2, 90, 91, 200, 201, 0, 1, 47, 48, 300]])
    assert torch.equal(medusa_targets(labels, 3, skipping), medusa_targets(labels, 3, plain))
    assert torch.equal(medusa_targets(labels, 3, skipping), naive_targets(labels, 3, plain))
    assert medusa_targets(labels, 1, skipping)[0, 2].tolist() == [3, 4]


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
