"""A batch that is being decoded with Medusa heads, step by step.

Contract: one step is one forward of the target. Rows stop on their own, and leave the batch when they do.

Shapes: B running rows, n nodes of the tree, N heads, H hidden size, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor, nn

from axolotl_medusa.decoding.acceptance import AcceptanceRule, tree_tensors
from axolotl_medusa.decoding.compiled import CompiledBackbone
from axolotl_medusa.decoding.running_rows import RunningRows, check_lengths
from axolotl_medusa.decoding.target_cache import TargetCache
from axolotl_medusa.decoding.tree import Tree


class ModelWithHeads(Protocol):
    """What decoding asks of a model: logits of its own and of its heads, as functions of hidden states."""

    base_model: nn.Module

    def logits(self, hidden: Tensor) -> Tensor:
        """The target's logits, `[..., V]`, of hidden states after the final norm, `[..., H]`."""

    def draft_logits(self, hidden: Tensor, num_heads: int) -> Tensor:
        """Logits of the first `num_heads` heads, `[..., num_heads, V]`."""


class Decoding(RunningRows):
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
        super().__init__(len(input_ids), max_new_tokens, eos_token_ids)
        self._cache_rows = self.rows  # where those are in the cache
        # A row that stops within an accepted path is up to `depth` columns longer than its tokens; nodes come after them.
        room = max_new_tokens + tree.depth + tree.num_nodes
        self.target = TargetCache(model.base_model, attention_mask, compiled, room)
        self._model, self._rule = model, rule
        self._tree, self._root_alone = tree_tensors(tree, input_ids.device), tree_tensors(Tree(), input_ids.device)
        self._prompts: Tensor | None = input_ids
        self._roots = input_ids[:, -1]
        self.hidden = torch.empty(0)

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
        prompts_forward, self._prompts = self._prompts is not None, None
        if not prompts_forward:
            running = set(self._cache_rows)
            self.target.keep([node if row in running else None for row, node in enumerate(nodes)], tree)
        return self._emit(new, prompts_forward)

    def _candidates(self) -> Tensor:
        """The tokens of all nodes, `[B, n]`: the root, and one pick per node from the heads' best tokens."""
        tree = self._tree
        if not tree.tree.choices:
            return self._roots[:, None]
        best = self._model.draft_logits(self.hidden, tree.tree.depth).topk(tree.tree.top_k, -1).indices
        return torch.cat([self._roots[:, None], best[:, tree.heads, tree.ranks].to(self._roots.device)], -1)

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
    lengths = attention_mask.sum(-1).tolist()
    check_lengths(lengths, max_new_tokens, None)
    if bool((attention_mask.diff(dim=-1) < 0).any()):
        raise ValueError(
            "a prompt is padded on the right or inside, expected padding on the left: set padding_side='left'"
        )
    check_lengths(lengths, max_new_tokens, context)
