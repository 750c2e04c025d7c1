"""The target and its KV cache while candidate trees are verified: one forward per tree, accepted tokens kept in place.

Contract: knows transformers' causal LMs and their cache classes; nothing about heads or acceptance rules. A tree's nodes
are forwarded together over the cache with a 4-D mask (a node sees the text and its ancestors) and position ids (a node's
depth after the text). No modelling code is copied: whatever follows transformers' conventions for both works, and
anything else is refused when `check_target` tries it.

Shapes: B rows, n nodes, W columns of the cache, H hidden size.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from axolotl_medusa.decoding.acceptance import TreeTensors, tree_tensors
from axolotl_medusa.decoding.compiled import CompiledBackbone
from axolotl_medusa.decoding.tree import Tree
from axolotl_medusa.errors import first_line
from axolotl_medusa.model.anatomy import backbone, causal_lm

ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a 4-D mask."""

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_PROBE_TREE = Tree(((0,), (1,), (1, 0)))
_PROBE_PATHS = ((0, 1), (0, 2, 3))
_PROBE_TEXT = 3
_PROBE_TOLERANCE = 0.1
"""Largest accepted error of the probed hidden states relative to their size; a wrong mask or position gives about 1."""


class TargetCache:
    """The target's KV cache of a batch that is being decoded.

    Row b's text is the columns `start[b]` to `end[b] - 1` of every layer, the token at position p in column
    `start[b] + p`. Columns before are its left padding, columns after belong to longer rows; both are masked.

    Args:
        model: The target, possibly wrapped by peft.
        attention_mask: 1 for the prompts' tokens, 0 for left padding, `[B, prompt]`.
        compiled: Verifies trees in place of the model's own backbone, over a cache of fixed shapes.
        room: Columns that such a cache has after the prompt at least.

    Attributes:
        cache: Transformers' own cache.
        start: First column of every row, `[B]`.
    """

    def __init__(
        self, model: nn.Module, attention_mask: Tensor, compiled: CompiledBackbone | None = None, room: int = 0
    ) -> None:
        self._backbone, self._compiled = backbone(model), compiled
        self._config = causal_lm(model).config.get_text_config()
        self._dtype = causal_lm(model).dtype
        self._window = sliding_window(self._config)
        # Asked for every layer of every step; a config of transformers takes microseconds to answer.
        self._mixes = mixes_layer_types(self._config)
        self._layer_types: list[str] | None = getattr(self._config, "layer_types", None)
        self._positions: int | None = getattr(self._config, "max_position_embeddings", None)
        self._padding = attention_mask if not bool(attention_mask.all()) else None
        # Without a config, as it would else drop what a node of the tree still sees: `_end_columns` drops the rest.
        self.cache: Cache = DynamicCache()
        self._dropped = 0
        self._columns: int | None = None
        if compiled is not None:
            rows, prompt = attention_mask.shape
            self.cache, self._columns = compiled.cache(rows, prompt + room)
            weakref.finalize(self, compiled.give_back, self.cache, rows, self._columns)
        self.start = attention_mask.shape[1] - attention_mask.sum(-1)
        self._starts: list[int] = self.start.tolist()
        self._ends = [attention_mask.shape[1]] * len(attention_mask)

    @property
    def end(self) -> Tensor:
        """Column after the last of every row, `[B]`."""
        return torch.tensor(self._ends, device=self.start.device)

    @property
    def width(self) -> int:
        """Columns W of the text, with all rows'."""
        return max(self._ends)

    @property
    def keeps_rows(self) -> bool:
        """Whether rows that stopped stay in the cache."""
        return self._compiled is not None

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Forwards the prompts, `[B, prompt]`.

        Returns:
            The hidden state after the final norm at the last token, `[B, 1, H]`.
        """
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = (columns - self.start[:, None]).clamp(min=0)
        hidden = self._forward(self._own, input_ids, self._padding, positions)[:, -1:]
        self._end_columns()
        return hidden

    def verify(self, tokens: Tensor, tree: TreeTensors) -> Tensor:
        """Forwards all nodes of a tree, `[B, n]`, over the cache; their keys and values are appended to it.

        Returns:
            The hidden states after the final norm at all nodes, `[B, n, H]`.
        """
        texts = [end - start for start, end in zip(self._starts, self._ends, strict=True)]
        positions = torch.tensor(texts, device=self.start.device)[:, None]
        if tree.tree.choices:
            positions = positions + tree.depths
        if self._positions and max(texts) + tree.tree.depth >= self._positions:
            # nodes past a row's end are never accepted, but learned positions must exist for them
            positions = positions.clamp(max=self._positions - 1)
        return self._forward(self._compiled or self._own, tokens, self._masks(tree), positions)

    def keep(self, nodes: Sequence[int | None], tree: TreeTensors) -> None:
        """Keeps of the tree that was verified last the root and the accepted nodes, moved in place.

        Args:
            nodes: The last accepted node of every row, None for a row that stopped.
            tree: That tree.
        """
        width = self.width
        paths = [() if node is None else tree.tree.paths[node] for node in nodes]
        most = max(map(len, paths))
        # A row that keeps fewer nodes copies its root into columns that `end` leaves out.
        source = [[width + node for node in path] + [width] * (most - len(path)) for path in paths]
        target = [list(range(end, end + most)) for end in self._ends]
        self._ends = [end + len(path) for end, path in zip(self._ends, paths, strict=True)]
        if source != target:
            moves = torch.tensor([source, target], device=self.start.device)
            for number, layer in enumerate(self.cache.layers):
                for states in (layer.keys, layer.values):
                    _move_columns(states, *(moves - self._first_column(number)).to(states.device))
        self._end_columns()

    def select_rows(self, rows: Sequence[int]) -> None:
        """Drops all rows but `rows`, and the columns that only those had."""
        kept = torch.tensor(rows, device=self.start.device)
        self._starts, self._ends = [self._starts[row] for row in rows], [self._ends[row] for row in rows]
        self.start = self.start[kept]
        for layer in self.cache.layers:
            layer.batch_select_indices(kept.to(layer.keys.device))
        self._end_columns()

    def _end_columns(self) -> None:
        """Lets the cache go on after the text, and drops from sliding layers what no later token sees."""
        if self._columns is not None:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.width)
            return
        before, width = [self._first_column(number) for number in range(len(self.cache.layers))], self.width
        if self._window is not None:
            self._dropped = max(self._dropped, min(self._ends) - self._window + 1)
        for number, layer in enumerate(self.cache.layers):
            first, end = self._first_column(number) - before[number], width - before[number]
            if first or layer.keys.shape[2] > end:  # a plain step leaves nothing to take away
                layer.keys, layer.values = layer.keys[:, :, first:end], layer.values[:, :, first:end]

    def _first_column(self, number: int) -> int:
        """The first column that a layer still has."""
        types = self._layer_types
        return self._dropped if types is None or types[number] == "sliding_attention" else 0

    def _own(self, **arguments: Any) -> Tensor:
        hidden: Tensor = self._backbone(**arguments)[0]
        return hidden

    def _forward(self, run: Callable[..., Tensor], tokens: Tensor, attention_mask: Any, positions: Tensor) -> Tensor:
        return run(
            input_ids=tokens,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )

    def _masks(self, tree: TreeTensors) -> Tensor | dict[str, Tensor] | dict[str, None] | None:
        """The mask that the backbone takes; one per kind of layer where it mixes full and sliding ones."""
        alone = not tree.tree.choices and self._padding is None and len(self._ends) == 1
        if alone and self._compiled is None:  # it sees all columns that a layer still has
            return dict.fromkeys(_LAYER_TYPES) if self._mixes else None
        width, rows, nodes = self.width, len(self._ends), len(tree.depths)
        end = self.end
        columns = torch.arange(self._columns or width + nodes, device=end.device)  # W + n, or all that there are
        in_text = (columns >= self.start[:, None]) & (columns < end[:, None])
        seen = in_text[:, None].repeat(1, nodes, 1)  # [B, n, columns]
        seen[:, :, width : width + nodes] = tree.ancestors
        if self._window is None:
            return self._mask(seen)
        own_columns = end[:, None] + tree.depths
        all_columns = columns.repeat(rows, 1)
        all_columns[:, width : width + nodes] = own_columns
        near = own_columns[:, :, None] - all_columns[:, None, :] < self._window
        if self._mixes:
            return {
                "full_attention": self._mask(seen),
                "sliding_attention": self._mask((seen & near)[:, :, self._dropped :]),
            }
        return self._mask((seen & near)[:, :, self._dropped :])

    def _mask(self, seen: Tensor) -> Tensor:
        """What the attention implementation adds or selects by, `[B, 1, n, columns]`."""
        if self._config._attn_implementation == "sdpa":
            return seen[:, None]
        return torch.zeros(1, dtype=self._dtype, device=seen.device).masked_fill(
            ~seen[:, None], torch.finfo(self._dtype).min
        )


def _move_columns(states: Tensor, source: Tensor, target: Tensor) -> None:
    """`states[b, :, target[b]] = states[b, :, source[b]]` for every row b, in place; `source` is read first."""
    index = (slice(None), None, slice(None), None)
    shape = (states.shape[0], states.shape[1], source.shape[1], states.shape[3])
    states.scatter_(2, target[index].expand(shape), states.gather(2, source[index].expand(shape)))


def sliding_window(config: Any) -> int | None:
    """Tokens that a sliding layer sees, the token itself included; None where no layer slides."""
    types = getattr(config, "layer_types", None)
    if types is not None and "sliding_attention" not in types:
        return None
    if getattr(config, "use_sliding_window", None) is False:
        return None
    window = getattr(config, "sliding_window", None)
    return None if window is None else int(window)


def mixes_layer_types(config: Any) -> bool:
    """Whether some layers slide and others see everything."""
    return len(set(getattr(config, "layer_types", None) or ())) > 1


@torch.no_grad()
def check_target(model: nn.Module) -> None:
    """Checks that trees can be verified with this model, by trying one on a few tokens.

    Skipped where parameters are not materialised.

    Raises:
        ValueError: Its attention takes no 4-D mask, its state is not a cache of keys and values, or its hidden states in
            a tree are not those of plain text.
    """
    lm, inner = causal_lm(model), backbone(model)
    name, config = type(lm).__name__, lm.config.get_text_config()
    attention = config._attn_implementation
    if attention not in ATTENTION:
        raise ValueError(
            f"{name} uses attention {attention!r}, which takes no tree mask: load it with attn_implementation='sdpa' or 'eager'"
        )
    other = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    missing = {"position_ids", "attention_mask", "past_key_values"} - inspect.signature(inner.forward).parameters.keys()
    if other or missing or getattr(lm, "_is_stateful", False):
        found = (
            f"layers of type {', '.join(other)}" if other else "no position ids, 4-D mask and cache of keys and values"
        )
        raise ValueError(
            f"{name} has {found}, Medusa decoding needs full or sliding attention over a cache: "
            "use a server that supports this model"
        )
    if any(parameter.is_meta for parameter in lm.parameters()):
        return
    try:
        difference = _probe(model)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        reason = first_line(error)
        raise ValueError(f"{name} cannot verify a tree in one forward ({type(error).__name__}: {reason})") from error
    if not difference <= _PROBE_TOLERANCE:
        raise ValueError(
            f"{name} gives other hidden states in a tree than in plain text (they differ by {difference:.2g} of their size, "
            f"expected at most {_PROBE_TOLERANCE}): it does not follow the 4-D mask and the position ids that it is given"
        )


def _probe(model: nn.Module) -> float:
    """Largest relative error of a small tree's hidden states against plain forwards of its paths."""
    device = causal_lm(model).get_input_embeddings().weight.device
    nodes = _PROBE_TREE.num_nodes
    vocab_size = causal_lm(model).get_input_embeddings().weight.shape[0]
    tokens = torch.arange(1, 1 + _PROBE_TEXT + nodes, device=device)[None] % vocab_size
    text, drafts = tokens[:, :_PROBE_TEXT], tokens[:, _PROBE_TEXT:]
    target = TargetCache(model, torch.ones_like(text))
    target.prefill(text)
    found = target.verify(drafts, tree_tensors(_PROBE_TREE, device))
    differences = []
    for path in _PROBE_PATHS:
        whole = torch.cat([text, drafts[:, path]], -1)
        plain = backbone(model)(input_ids=whole, use_cache=False)[0][:, _PROBE_TEXT:].float()
        differences.append(((found[:, path].float() - plain).norm() / plain.norm().clamp(min=1e-6)).item())
    return float(max(differences))
