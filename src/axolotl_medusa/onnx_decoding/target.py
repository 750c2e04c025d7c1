"""The model in ONNX Runtime and its cache: tokens in, likeliest next tokens and hidden states out.

Contract: knows the graph of `graph_names`, and nothing about heads or acceptance rules. Keys and values lie in buffers that
are bound to the graph's inputs and outputs at once, so that a step writes its new columns and copies nothing. Where a token
lies in the cache does not matter to attention: a rejected node's column is only marked as free, and the next step
overwrites it. So nothing is moved when a path of a tree is accepted.

Shapes: B rows, n new tokens, C columns, M asked tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from axolotl_medusa.onnx_decoding.directory import About
from axolotl_medusa.onnx_decoding.graph_names import (
    ASKED,
    ATTENTION_BIAS,
    BEST,
    COLUMNS,
    HIDDEN,
    HIDDEN_STATES,
    INPUT_IDS,
    LOGITS,
    LOGITS_OF,
    POSITION_IDS,
    SLIDING_BIAS,
    cache_names,
    written,
)
from axolotl_medusa.onnx_decoding.sessions import runtime

Array = np.ndarray[Any, Any]

_COLUMNS_AT_ONCE = 128
"""The cache grows by so many columns; attention goes over all of them."""

_FREE = -1


class Forward(NamedTuple):
    """What one forward gives.

    Attributes:
        best: The likeliest next token after every asked one, `[B, M]`.
        hidden: Hidden states there, `[B, M, H]`.
        logits: All logits there, `[B, M, V]`, if they were asked for, else `[B, 0, V]`.
        columns: Where the new tokens lie, `[B, n]`.
    """

    best: Array
    hidden: Array
    logits: Array
    columns: Array


class Target:
    """The model, with the cache of a batch.

    Args:
        session: The graph, opened.
        about: What the export wrote down.
        rows: Rows of the batch.
        device: `cpu`, or `cuda`.
    """

    def __init__(self, session: Any, about: About, rows: int, device: str = "cpu") -> None:
        self._session, self._about, self._device = session, about, device
        self._names = cache_names(about.layers)
        self._positions = np.full((rows, 0), _FREE, dtype=np.int64)  # of every column of the cache
        self._cache: list[Any] = []
        self._binding: Any = None

    def lengths(self) -> Array:
        """Tokens of every row, `[B]`."""
        lengths: Array = (self._positions != _FREE).sum(-1)
        return lengths

    def forward(
        self, tokens: Array, positions: Array, sees: Array, asked: Array, *, all_logits: bool = False
    ) -> Forward:
        """Forwards new tokens over the cache. Their columns stay free until `keep` names them.

        Args:
            tokens: `[B, n]`.
            positions: Their positions in the text, `[B, n]`.
            sees: Which new tokens each new token attends to, bool `[n, n]`.
            asked: Which of them are asked for their next token, `[B, M]`.
            all_logits: Whether all logits of those are wanted.
        """
        new = tokens.shape[1]
        self._make_room(new)
        columns = np.stack([np.flatnonzero(row == _FREE)[:new] for row in self._positions])
        inputs = {
            INPUT_IDS: tokens,
            POSITION_IDS: positions,
            COLUMNS: columns,
            ASKED: asked,
            LOGITS_OF: np.arange(asked.shape[1] if all_logits else 0),
            **self._biases(positions, columns, sees),
        }
        for name, values in inputs.items():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(values))
        for name in (BEST, HIDDEN_STATES, LOGITS):  # anew: their shapes change
            self._binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(self._binding)
        best, hidden, logits = (value.numpy() for value in self._binding.get_outputs()[-3:])
        return Forward(best, hidden, logits, columns)

    def keep(self, row: int, columns: Array, positions: Array) -> None:
        """Makes new tokens a part of a row's text."""
        self._positions[row, columns] = positions

    def select_rows(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        self._positions = self._positions[rows]
        self._bind([value.numpy()[rows] for value in self._cache])

    def _biases(self, positions: Array, columns: Array, sees: Array) -> dict[str, Array]:
        """What hides columns from new tokens, for full and for sliding layers."""
        batch, new = positions.shape
        seen = np.repeat((self._positions != _FREE)[:, None], new, 1)
        rows = np.arange(batch)[:, None, None]
        seen[rows, np.arange(new)[None, :, None], columns[:, None, :]] = sees
        if not self._about.window:
            return {ATTENTION_BIAS: _bias(seen)}
        of_columns = self._positions.copy()
        np.put_along_axis(of_columns, columns, positions, 1)
        near = seen & (positions[:, :, None] - of_columns[:, None] < self._about.window)
        if self._about.mixes:
            return {ATTENTION_BIAS: _bias(seen), SLIDING_BIAS: _bias(near)}
        return {ATTENTION_BIAS: _bias(near)}

    def _make_room(self, new: int) -> None:
        """Lets the cache grow where fewer columns than `new` are free in some row."""
        rows, columns = self._positions.shape
        needed = int(self.lengths().max()) + new
        if columns >= needed:
            return
        wider = -(-needed // _COLUMNS_AT_ONCE) * _COLUMNS_AT_ONCE
        positions = np.full((rows, wider), _FREE, dtype=np.int64)
        positions[:, :columns] = self._positions
        self._positions = positions
        shape = (rows, self._about.kv_heads, wider, self._about.head_size)
        grown = []
        for index in range(len(self._names)):
            # Zeros, not whatever lies there: a hidden column's weight is 0, and 0 times a stray NaN is NaN.
            buffer = np.zeros(shape, dtype=np.float32)
            if self._cache:
                buffer[:, :, :columns] = self._cache[index].numpy()
            grown.append(buffer)
        self._bind(grown)

    def _bind(self, buffers: list[Array]) -> None:
        """Binds buffers to the graph, each as an input and as an output."""
        self._cache = [runtime().OrtValue.ortvalue_from_numpy(buffer, self._device, 0) for buffer in buffers]
        self._binding = self._session.io_binding()
        for name, value in zip(self._names, self._cache, strict=True):
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(written(name), value)


def _bias(seen: Array) -> Array:
    return np.where(seen, np.float32(0), np.float32(HIDDEN))
