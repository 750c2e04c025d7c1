"""What acceptance rules need of arrays beyond their operators: for numpy here, for torch in `torch_arrays`.

Contract: imports numpy alone. A rule works on whatever arrays it is given and asks the tree that comes with them.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Arrays(Protocol):
    """One library's arrays; `Any` below is an array of it."""

    def integers(self, values: Any) -> Any:
        """Nested lists as whole numbers."""

    def booleans(self, values: Any) -> Any:
        """Nested lists as truth values."""

    def zeros(self, rows: int, columns: int | None = None) -> Any:
        """Whole zeros, `[rows]` or `[rows, columns]`."""

    def range(self, rows: int) -> Any:
        """0, 1, ..., rows - 1."""

    def where(self, condition: Any, one: Any, other: Any) -> Any:
        """`one` where the condition holds, else `other`."""

    def pad(self, values: Any) -> Any:
        """A column of zeros before the first one of `[B, n]`."""

    def take(self, values: Any, index: Any) -> Any:
        """`values[..., index[...]]` along the last axis."""

    def log_softmax(self, logits: Any, temperature: float) -> Any:
        """Logarithms of the probabilities at a temperature."""

    def softmax(self, logits: Any, temperature: float) -> Any:
        """Probabilities at a temperature."""

    def exp(self, values: Any) -> Any:
        """Element by element."""

    def entropy(self, log_probabilities: Any) -> Any:
        """Of the distributions along the last axis."""

    def at_most(self, values: Any, bound: Any) -> Any:
        """The smaller of each, element by element."""

    def largest(self, values: Any) -> Any:
        """Along the last axis."""

    def draw(self, weights: Any) -> Any:
        """An index per row of `[B, V]`, drawn in proportion to the weights."""


class NumpyArrays:
    """`Arrays` of numpy.

    Args:
        seed: Of what is drawn.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._random = np.random.default_rng(seed)

    def integers(self, values: Any) -> Any:
        """As `Arrays` says."""
        return np.asarray(values, dtype=np.int64)

    def booleans(self, values: Any) -> Any:
        """As `Arrays` says."""
        return np.asarray(values, dtype=bool)

    def zeros(self, rows: int, columns: int | None = None) -> Any:
        """As `Arrays` says."""
        return np.zeros(rows if columns is None else (rows, columns), dtype=np.int64)

    def range(self, rows: int) -> Any:
        """As `Arrays` says."""
        return np.arange(rows)

    def where(self, condition: Any, one: Any, other: Any) -> Any:
        """As `Arrays` says."""
        return np.where(condition, one, other)

    def pad(self, values: Any) -> Any:
        """As `Arrays` says."""
        return np.pad(values, ((0, 0), (1, 0)))

    def take(self, values: Any, index: Any) -> Any:
        """As `Arrays` says."""
        return np.take_along_axis(values, index[..., None], -1)[..., 0]

    def log_softmax(self, logits: Any, temperature: float) -> Any:
        """As `Arrays` says."""
        scaled = np.asarray(logits, dtype=np.float32) / temperature
        scaled = scaled - scaled.max(-1, keepdims=True)
        return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))

    def softmax(self, logits: Any, temperature: float) -> Any:
        """As `Arrays` says."""
        return np.exp(self.log_softmax(logits, temperature))

    def exp(self, values: Any) -> Any:
        """As `Arrays` says."""
        return np.exp(values)

    def entropy(self, log_probabilities: Any) -> Any:
        """As `Arrays` says."""
        finite = np.maximum(log_probabilities, np.finfo(np.float32).min)
        return -(np.exp(log_probabilities) * finite).sum(-1)

    def at_most(self, values: Any, bound: Any) -> Any:
        """As `Arrays` says."""
        return np.minimum(values, bound)

    def largest(self, values: Any) -> Any:
        """As `Arrays` says."""
        return values.max(-1)

    def draw(self, weights: Any) -> Any:
        """As `Arrays` says."""
        sums = np.cumsum(np.asarray(weights, dtype=np.float64), -1)
        drawn = self._random.random((len(sums), 1)) * sums[:, -1:]
        # A draw of 0 would fall on a leading weight of 0: it is the first sum above the draw that counts.
        return (sums <= drawn).sum(-1).clip(max=sums.shape[-1] - 1)
