"""Which token each row of the base model and of every head is to predict.

Contract: pure functions of tensors. Offsets: row t of the base model predicts `labels[t + 1]`, row t of head i predicts
`labels[t + 2 + i]`, i from 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100


def sample_ids(position_ids: Tensor) -> Tensor:
    """Numbers the packed samples of each row of a batch: a sample starts where positions do not grow.

    They grow by more than one inside a sample where axolotl's `use_pose` skips some.

    Args:
        position_ids: Positions, `[batch, seq]`, restarting in each packed sample.

    Returns:
        Sample numbers, `[batch, seq]`, from 0 in each row.
    """
    starts = position_ids[:, 1:] <= position_ids[:, :-1]
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
