"""A batch that is being decoded with Medusa heads, step by step.

Contract: one step is one forward of the target. Rows stop on their own, and leave the batch when they do.

Shapes: B running rows, n nodes of the tree, N heads, H hidden size, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from axolotl_medusa.decoding.acceptance import AcceptanceRule, tree_tensors
from axolotl_medusa.decoding.compiled import CompiledBackbone
from axolotl_medusa.decoding.target_cache import TargetCache
from axolotl_medusa.decoding.tree import Choice, Tree


class ModelWithHeads(Protocol):
    """What decoding asks of a model: logits of its own and of its heads, as functions of hidden states."""

    base_model: nn.Module

    def logits(self, hidden: Tensor) -> Tensor:
        """The target's logits, `[..., V]`, of hidden states after the final norm, `[..., H]`."""

    def draft_logits(self, hidden: Tensor, num_heads: int) -> Tensor:
        """Logits of the first `num_heads` heads, `[..., num_heads, V]`."""


@dataclass
class GenerationStats:
    """What decoding took. A row's forwards are those until it stopped; the one over its prompt is among them.

    Attributes:
        emitted_tokens: New tokens, without padding.
        forward_passes: Forwards of the target, counted for every row that was in them.
        batch_forwards: Forwards of the target.
        acceptance_lengths: How often a row's forward over a tree emitted 1, 2, 3, ... tokens; prompts' are left out.
    """

    emitted_tokens: int = 0
    forward_passes: int = 0
    batch_forwards: int = 0
    acceptance_lengths: Counter[int] = field(default_factory=Counter)

    @property
    def acceptance_length(self) -> float:
        """Emitted tokens / target forward passes: 1.0 is what plain decoding has."""
        return self.emitted_tokens / self.forward_passes


class Decoding:
    """A batch that is being decoded; call `step` while `rows` is not empty.

    Args:
        model: The target and its heads.
        input_ids: Prompts, padded on the left, `[batch, prompt]`.
        attention_mask: 1 for the prompts' tokens, 0 for padding, `[batch, prompt]`.
        tree: The candidate tree.
        rule: Which draft tokens are accepted.
        max_new_tokens: Tokens that a row gets at most, at least 1.
        eos_token_ids: Tokens after which a row stops.
        compiled: Verifies the trees, with fixed shapes, in place of the model's own backbone.

    Attributes:
        tokens: New tokens of every prompt.
        rows: Prompts that still run, in the order in which they are rows of the cache; a compiled target keeps those that
            stopped as rows too.
        target: The target's cache.
        stats: What it has taken so far.
        hidden: The states that the heads are asked about next, each before a row's last token, `[B, H]`.
        accepted: What the last step accepted of its tree in every row: a choice of it, empty for the root.
    """

    def __init__(
        self,
        model: ModelWithHeads,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        tree: Tree,
        rule: AcceptanceRule,
        max_new_tokens: int,
        eos_token_ids: Collection[int] = (),
        compiled: CompiledBackbone | None = None,
    ) -> None:
        self.tokens: list[list[int]] = [[] for _ in input_ids]
        self.rows = list(range(len(input_ids)))
        self._cache_rows = self.rows  # where those are in the cache
        # A row that stops within an accepted path is up to `depth` columns longer than its tokens; nodes come after them.
        room = max_new_tokens + tree.depth + tree.num_nodes
        self.target = TargetCache(model.base_model, attention_mask, compiled, room)
        self.stats = GenerationStats()
        self._model, self._rule = model, rule
        self._tree, self._root_alone = tree_tensors(tree, input_ids.device), tree_tensors(Tree(), input_ids.device)
        self._max_new_tokens, self._eos_token_ids = max_new_tokens, frozenset(eos_token_ids)
        self._prompts: Tensor | None = input_ids
        self._roots = input_ids[:, -1]
        self.hidden = torch.empty(0)
        self.accepted: list[Choice] = []

    def use(self, tree: Tree) -> None:
        """Verifies another tree from the next step on; a compiled target has one tree for all steps."""
        self._tree = tree_tensors(tree, self._roots.device)

    def step(self) -> list[list[int]]:
        """One forward of the target: over the prompts at first, over a candidate tree from then on.

        Returns:
            New tokens of the rows that were in it: accepted draft tokens, then the target's own, cut where a row stops.
        """
        if self._prompts is not None:
            hidden, tokens, tree = self.target.prefill(self._prompts), self._roots[:, None], self._root_alone
        else:
            tree, tokens = self._tree, self._candidates()
            hidden = self.target.verify(tokens, tree)
        accepted = self._rule(self._model.logits(hidden), tokens, tree)
        if tree.tree.choices:
            on_device = torch.cat([torch.stack(accepted), tokens[:, 1:].T])
            nodes, own, *drafts = on_device.tolist()  # one transfer: the device is waited for once per step
            self.hidden = hidden[torch.arange(len(hidden), device=hidden.device), accepted.node]
        else:  # plain decoding pays for nothing that only trees need
            nodes, own, drafts = [0] * len(hidden), accepted.token.tolist(), []
            self.hidden = hidden[:, 0]
        self._roots = accepted.token
        self.accepted = [tree.tree.choices[node - 1] if node else () for node in nodes]
        new = [
            [*(drafts[node - 1][row] for node in tree.tree.paths[nodes[row]][1:]), own[row]] for row in self._cache_rows
        ]
        if self._prompts is None:
            running = set(self._cache_rows)
            self.target.keep([node if row in running else None for row, node in enumerate(nodes)], tree)
        return self._emit(new)

    def _candidates(self) -> Tensor:
        """The tokens of all nodes, `[B, n]`: the root, and one pick per node from the heads' best tokens."""
        tree = self._tree
        if not tree.tree.choices:
            return self._roots[:, None]
        best = self._model.draft_logits(self.hidden, tree.tree.depth).topk(tree.tree.top_k, -1).indices
        return torch.cat([self._roots[:, None], best[:, tree.heads, tree.ranks].to(self._roots.device)], -1)

    def _emit(self, new: list[list[int]]) -> list[list[int]]:
        """Cuts new tokens where rows stop, counts them, and lets stopped rows leave."""
        prompts_forward, self._prompts = self._prompts is not None, None
        self.stats.batch_forwards += 1
        self.stats.forward_passes += len(self.rows)
        emitted, running = [], []
        for index, (row, tokens) in enumerate(zip(self.rows, new, strict=True)):
            cut = tokens[: self._max_new_tokens - len(self.tokens[row])]
            end = next((i for i, token in enumerate(cut, 1) if token in self._eos_token_ids), None)
            cut = cut[:end]
            self.tokens[row] += cut
            emitted.append(cut)
            self.stats.emitted_tokens += len(cut)
            if not prompts_forward:
                self.stats.acceptance_lengths[len(cut)] += 1
            if end is None and len(self.tokens[row]) < self._max_new_tokens:
                running.append(index)
        if running and len(running) < len(self.rows):
            self._leave(running)
        self.rows = [self.rows[index] for index in running]
        return emitted

    def _leave(self, running: list[int]) -> None:
        """Lets all rows but those at the indices `running` leave; where shapes are fixed they are only left alone."""
        if self.target.keeps_rows:
            self._cache_rows = [self._cache_rows[index] for index in running]
            return
        self.target.select_rows(running)
        self.hidden, self._roots = self.hidden[running], self._roots[running]
        self._cache_rows = list(range(len(running)))


def check_prompts(input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, context: int | None) -> None:
    """Checks prompts before the first forward.

    Args:
        input_ids: Prompts, `[batch, prompt]`.
        attention_mask: 1 for tokens, 0 for padding on the left, `[batch, prompt]`.
        max_new_tokens: Tokens to generate.
        context: Positions that the model has, None for no limit.

    Raises:
        ValueError: A prompt is empty, padded on the right, or too long; or there is nothing to generate.
    """
    if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
        raise ValueError(
            f"input_ids is {list(input_ids.shape)} and attention_mask {list(attention_mask.shape)}, expected both [batch, prompt]"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    lengths = attention_mask.sum(-1).tolist()
    if not lengths or not all(lengths):
        where = f"prompt {lengths.index(0)}" if lengths else "the batch"
        raise ValueError(f"{where} is empty, expected at least one token per prompt: begin with the BOS token")
    if bool((attention_mask.diff(dim=-1) < 0).any()):
        raise ValueError(
            "a prompt is padded on the right or inside, expected padding on the left: set padding_side='left'"
        )
    longest = int(max(lengths))
    if context is not None and longest >= context:
        raise ValueError(f"a prompt has {longest} tokens, but the model's context has {context}: shorten it")
    if context is not None and longest + max_new_tokens > context:
        raise ValueError(
            f"a prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, but the model's context has {context}: "
            f"set max_new_tokens to at most {context - longest}"
        )
