"""What acceptance rules need of torch's tensors; `arrays.Arrays` says what each method means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TorchArrays:
    """`Arrays` of torch, on one device.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def integers(self, values: Any) -> Tensor:
        """As `Arrays` says."""
        return torch.tensor(values, dtype=torch.long, device=self._device)

    def booleans(self, values: Any) -> Tensor:
        """As `Arrays` says."""
        return torch.tensor(values, dtype=torch.bool, device=self._device)

    def zeros(self, rows: int, columns: int | None = None) -> Tensor:
        """As `Arrays` says."""
        shape = (rows,) if columns is None else (rows, columns)
        return torch.zeros(shape, dtype=torch.long, device=self._device)

    def range(self, rows: int) -> Tensor:
        """As `Arrays` says."""
        return torch.arange(rows, device=self._device)

    def where(self, condition: Tensor, one: Any, other: Any) -> Tensor:
        """As `Arrays` says."""
        return torch.where(condition, one, other)

    def pad(self, values: Tensor) -> Tensor:
        """As `Arrays` says."""
        return torch.nn.functional.pad(values, (1, 0))

    def take(self, values: Tensor, index: Tensor) -> Tensor:
        """As `Arrays` says."""
        return values.gather(-1, index[..., None]).squeeze(-1)

    def log_softmax(self, logits: Tensor, temperature: float) -> Tensor:
        """As `Arrays` says."""
        return torch.log_softmax(logits.float() / temperature, -1)

    def softmax(self, logits: Tensor, temperature: float) -> Tensor:
        """As `Arrays` says."""
        return torch.softmax(logits.float() / temperature, -1)

    def exp(self, values: Tensor) -> Tensor:
        """As `Arrays` says."""
        return values.exp()

    def entropy(self, log_probabilities: Tensor) -> Tensor:
        """As `Arrays` says."""
        return -(log_probabilities.exp() * log_probabilities).nan_to_num(0.0).sum(-1)

    def at_most(self, values: Tensor, bound: Any) -> Tensor:
        """As `Arrays` says."""
        return torch.clamp(values, max=bound)

    def largest(self, values: Tensor) -> Tensor:
        """As `Arrays` says."""
        return values.amax(-1)

    def draw(self, weights: Tensor) -> Tensor:
        """As `Arrays` says."""
        return torch.multinomial(weights, 1).squeeze(-1)
