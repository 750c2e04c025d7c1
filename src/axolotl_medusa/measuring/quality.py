"""What training did to the model itself: perplexity before and after, and how far it moved.

Contract: two models and token sequences in, numbers out; knows nothing about heads or files.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from axolotl_medusa.model.anatomy import causal_lm

_ROWS_AT_ONCE = 256
"""Positions whose distributions over the vocabulary are held in fp32 at a time."""


@dataclass(frozen=True)
class ModelQuality:
    """A trained model against the original, over the same tokens.

    Attributes:
        tokens: Tokens that were predicted.
        perplexity: `exp(mean cross-entropy)` of the trained model.
        original_perplexity: The same of the original.
        kl: Mean over tokens of KL(original ‖ trained) of the next token's distribution, in nats.
    """

    tokens: int
    perplexity: float
    original_perplexity: float
    kl: float


def check_texts(texts: Sequence[Sequence[int]]) -> None:
    """Refuses texts that predict nothing.

    Raises:
        ValueError: None has two tokens.
    """
    if all(len(text) < 2 for text in texts):
        raise ValueError("held-out text has 0 tokens to predict, expected at least 1: give longer text")


@torch.no_grad()
def compare_models(model: Any, original: Any | None, texts: Sequence[Sequence[int]]) -> ModelQuality:
    """Compares a trained model with the original on held-out text.

    Args:
        model: The trained model.
        original: The model that training started from; None if it is `model` with its adapters switched off.
        texts: Token sequences; those of fewer than two tokens predict nothing.

    Raises:
        ValueError: There is nothing to predict, or without `original` there are no adapters to switch off.
    """
    if original is None and not hasattr(model, "disable_adapter"):
        raise ValueError(f"{type(model).__name__} has no adapters to switch off: name the original model")
    check_texts(texts)
    tokens, totals = 0, torch.zeros(3, dtype=torch.float64)
    for text in texts:
        if len(text) < 2:
            continue
        trained = _logits(model, text)
        with model.disable_adapter() if original is None else contextlib.nullcontext():
            before = _logits(model if original is None else original, text).to(trained.device)
        targets = torch.tensor(list(text[1:]), device=trained.device)
        tokens += len(targets)
        for rows in zip(*(torch.split(part, _ROWS_AT_ONCE) for part in (trained, before, targets)), strict=True):
            totals += _sums(*rows)
    own, originals, kl = (totals / tokens).tolist()
    return ModelQuality(tokens, math.exp(own), math.exp(originals), kl)


def _logits(model: Any, text: Sequence[int]) -> Tensor:
    """Logits of every token but the first, `[len(text) - 1, vocab_size]`."""
    device = causal_lm(model).get_input_embeddings().weight.device
    logits: Tensor = model(input_ids=torch.tensor([list(text[:-1])], device=device), use_cache=False).logits[0]
    return logits


def _sums(trained: Tensor, before: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropies of both and the KL, each summed over rows."""
    log_q, log_p = torch.log_softmax(trained.float(), -1), torch.log_softmax(before.float(), -1)
    losses = [-log.gather(-1, targets[:, None]).sum() for log in (log_q, log_p)]
    return torch.stack([*losses, (log_p.exp() * (log_p - log_q)).sum()]).double().cpu()
