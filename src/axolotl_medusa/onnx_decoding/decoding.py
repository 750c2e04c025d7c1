"""A batch that is being decoded with Medusa heads in ONNX Runtime, step by step.

Contract: one step is one forward of the target. Trees, acceptance rules and the choice of trees are those of the torch
decoder (`decoding.tree`, `acceptance`, `running_rows`, `auto_steps`).

Shapes: B running rows, n nodes of the tree, H hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from axolotl_medusa.decoding.acceptance import AcceptanceRule, TreeTensors, accept_best, accept_greedy, tree_arrays
from axolotl_medusa.decoding.arrays import NumpyArrays
from axolotl_medusa.decoding.auto_steps import AutoSteps
from axolotl_medusa.decoding.running_rows import RunningRows
from axolotl_medusa.decoding.tree import Tree
from axolotl_medusa.decoding.tree_chooser import PLAIN, TreeChooser
from axolotl_medusa.onnx_decoding.heads import OnnxHeads
from axolotl_medusa.onnx_decoding.target import Array, Forward, Target

_TOKENS_AT_ONCE = 512
"""Of a prompt: attention over a longer piece would take memory by its square."""


class OnnxDecoding(RunningRows):
    """A batch that is being decoded; call `step` while `rows` is not empty.

    Args:
        target: The model with an empty cache of as many rows as there are prompts.
        heads: The heads.
        prompts: Tokens of every prompt, at least one each.
        tree: The candidate tree.
        rule: Which draft tokens are accepted.
        arrays: What draws random numbers for the rule.
        max_new_tokens: Tokens that a row gets at most, at least 1.
        eos_token_ids: Tokens after which a row stops.
        last_position: The last position that the model has, 0 for no limit.

    Attributes:
        hidden: The states that the heads are asked about next, `[B, H]`.
        verified: The tree of the last step.
    """

    def __init__(
        self,
        target: Target,
        heads: OnnxHeads,
        prompts: Sequence[Sequence[int]],
        *,
        tree: Tree,
        rule: AcceptanceRule,
        arrays: NumpyArrays,
        max_new_tokens: int,
        eos_token_ids: Collection[int] = (),
        last_position: int = 0,
    ) -> None:
        super().__init__(len(prompts), max_new_tokens, eos_token_ids)
        self._target, self._heads, self._rule = target, heads, rule
        self._is_greedy = rule is accept_greedy  # the graph has taken the argmax
        self._prompts: Sequence[Sequence[int]] | None = prompts
        self._tree, self._last_position = tree, last_position
        self._as_arrays = functools.lru_cache(maxsize=256)(lambda tree: tree_arrays(tree, arrays))
        self._roots = np.zeros(len(prompts), dtype=np.int64)
        self.hidden: Array = np.empty(0)
        self.verified = Tree()

    def use(self, tree: Tree) -> None:
        """Verifies another tree from the next step on."""
        self._tree = tree

    def step(self) -> list[list[int]]:
        """One forward of the target: over the prompts at first, over a candidate tree from then on.

        Returns:
            New tokens of the rows that were in it: accepted draft tokens, then the target's own, cut where a row stops.
        """
        prompts, self._prompts = self._prompts, None
        if prompts is not None:
            self.verified, tree = Tree(), self._as_arrays(Tree())
            tokens = np.array([[prompt[-1]] for prompt in prompts])
            forward = self._prefill(prompts)
        else:
            self.verified, tokens = self._candidates()
            tree = self._as_arrays(self.verified)
            forward = self._verify(tokens, tree)
        nodes, own = (
            accept_best(forward.best, tokens, tree) if self._is_greedy else self._rule(forward.logits, tokens, tree)
        )
        self.hidden, self._roots = forward.hidden[np.arange(len(nodes)), nodes], own
        if prompts is None:
            self._keep(forward.columns, nodes, tree)
        choices, paths = self.verified.choices, self.verified.paths
        self.accepted = [choices[node - 1] if node else () for node in nodes]
        new = [
            [*map(int, row[list(paths[node][1:])]), int(last)]
            for row, node, last in zip(tokens, nodes, own, strict=True)
        ]
        return self._emit(new, prompts is not None)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> Forward:
        """Forwards all prompts, piece by piece; what fills up shorter ones is seen by nobody and is overwritten."""
        lengths = np.array([len(prompt) for prompt in prompts])
        longest, rows = int(lengths.max()), np.arange(len(prompts))
        tokens = np.array([[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts])
        found: Forward | None = None
        for start in range(0, longest, _TOKENS_AT_ONCE):
            piece = tokens[:, start : start + _TOKENS_AT_ONCE]
            new = piece.shape[1]
            positions = (start + np.arange(new))[None].repeat(len(prompts), 0)
            asked = (lengths - 1 - start).clip(0, new - 1)[:, None]
            forward = self._target.forward(
                piece, positions, np.tri(new, dtype=bool), asked, all_logits=not self._is_greedy
            )
            for row, length in enumerate(lengths):
                inside = slice(0, max(0, length - start))
                self._target.keep(row, forward.columns[row, inside], positions[row, inside])
            if found is None:
                found = forward
            ends_here = rows[(lengths > start) & (lengths <= start + new)]
            for own, other in zip(found[:3], forward[:3], strict=True):
                own[ends_here] = other[ends_here]
        assert found is not None  # a prompt has a token
        return found

    def _verify(self, tokens: Array, tree: TreeTensors) -> Forward:
        positions = self._target.lengths()[:, None] + tree.depths
        if self._last_position:
            # Nodes past a row's end are never accepted, but learned positions must exist for them.
            positions = positions.clip(max=self._last_position)
        nodes = np.arange(tokens.shape[1])[None].repeat(len(tokens), 0)
        return self._target.forward(tokens, positions, tree.ancestors, nodes, all_logits=not self._is_greedy)

    def _keep(self, columns: Array, nodes: Array, tree: TreeTensors) -> None:
        """Makes the root and the accepted nodes a part of the text."""
        lengths = self._target.lengths()
        for row, node in enumerate(nodes):
            path = list(tree.tree.paths[node])
            self._target.keep(row, columns[row, path], lengths[row] + np.arange(len(path)))

    def _candidates(self) -> tuple[Tree, Array]:
        """The tree that is verified, and the tokens of all its nodes, `[B, n]`."""
        if not self._tree.choices:
            return self._tree, self._roots[:, None]
        tree, drafts = self._heads.tree(self.hidden, self._tree)
        return tree, np.concatenate([self._roots[:, None], drafts], 1)

    def _leave(self, running: list[int]) -> None:
        """Lets all rows but those at the indices `running` leave."""
        self._target.select_rows(running)
        self.hidden, self._roots = self.hidden[running], self._roots[running]


class AutoOnnxDecoding(OnnxDecoding):
    """One prompt that is being decoded with the trees that a chooser names.

    Args:
        target: The model with an empty cache of one row.
        heads: The heads.
        prompt: Its tokens.
        chooser: Names the trees, and learns.
        rule: Which draft tokens are accepted: one that accepts the tokens that plain decoding would write.
        max_new_tokens: Tokens to write at most, at least 1.
        clock: Seconds of a clock that never goes back.
        **options: As `OnnxDecoding`.
    """

    def __init__(
        self,
        target: Target,
        heads: OnnxHeads,
        prompt: Sequence[int],
        *,
        chooser: TreeChooser,
        rule: AcceptanceRule,
        max_new_tokens: int,
        clock: Callable[[], float],
        **options: Any,
    ) -> None:
        super().__init__(target, heads, [prompt], tree=PLAIN, rule=rule, max_new_tokens=max_new_tokens, **options)
        self._auto = AutoSteps(self, super().step, heads.ranks, chooser, heads.num_heads, max_new_tokens, clock)

    def step(self) -> list[list[int]]:
        """One forward of the target, as `OnnxDecoding.step`, and sometimes the heads over positions that are past."""
        return self._auto.step()
