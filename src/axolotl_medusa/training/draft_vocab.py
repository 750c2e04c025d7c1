"""Which tokens heads of a draft vocabulary choose among: the most frequent ones of the training data.

Contract: counts tokens that are learnt (labels that are not -100) of a prepared data set; every process counts all of it, so
that all choose the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from axolotl_medusa.losses.targets import IGNORE_INDEX

_ROWS = 1000
"""Rows of the data that are in memory at once."""


class ChosenTokens(NamedTuple):
    """Tokens that heads choose among.

    Attributes:
        tokens: Their numbers, ascending, `[draft_vocab]`.
        covered: How many of the data's learnt tokens are among them.
        total: How many there are.
    """

    tokens: Tensor
    covered: int
    total: int


def label_counts(dataset: Any, vocab_size: int) -> Tensor:
    """How often each token is learnt, `[vocab_size]`.

    Args:
        dataset: A `datasets.Dataset` with `labels`.
        vocab_size: Tokens of the model.

    Raises:
        ValueError: It is streamed, so that its tokens are not known beforehand.
    """
    if not hasattr(dataset, "select_columns") or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"medusa_draft_vocab counts the tokens of all samples beforehand, and the training data is a {type(dataset).__name__}: "
            "do not stream it, or remove medusa_draft_vocab"
        )
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    rows = dataset.select_columns(["labels"]).with_format("torch")
    for start in range(0, len(dataset), _ROWS):
        labels = rows[start : start + _ROWS]["labels"]
        flat = torch.cat([each.flatten() for each in labels])
        counts += torch.bincount(flat[flat != IGNORE_INDEX].long(), minlength=vocab_size)
    return counts


def most_frequent(counts: Tensor, size: int) -> ChosenTokens:
    """The `size` tokens that are counted most often; of equally frequent ones those of lower number."""
    chosen = torch.sort(counts, descending=True, stable=True).indices[:size].sort().values
    return ChosenTokens(chosen, int(counts[chosen].sum()), int(counts.sum()))


def coverage(tokens: Tensor, counts: Tensor) -> ChosenTokens:
    """What given tokens cover of what is counted."""
    return ChosenTokens(tokens, int(counts[tokens].sum()), int(counts.sum()))
