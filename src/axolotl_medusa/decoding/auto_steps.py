"""Steps of one prompt whose trees are chosen as it goes, for the decoders of torch and of ONNX Runtime.

Contract: runs and times what `tree_chooser` decides; no model and no tensors. The tokens of greedy decoding are the same
whatever it decides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from axolotl_medusa.decoding.tree import Choice, Tree
from axolotl_medusa.decoding.tree_chooser import PLAIN, POSITIONS, TreeChooser


class Steps(Protocol):
    """What is asked of a decoding of one prompt."""

    tokens: list[list[int]]
    rows: list[int]
    hidden: Any
    accepted: list[Choice]

    def use(self, tree: Tree) -> None:
        """Verifies another tree from the next step on."""


class AutoSteps:
    """Chooses the tree of every step of a decoding and learns from it.

    Args:
        decoding: The decoding.
        step: Its own step.
        ranks: Ranks of known tokens among the heads' best: hidden states in, and the tokens `[positions][heads]`.
        chooser: Names the trees, and learns.
        num_heads: Heads that there are.
        max_new_tokens: Tokens to write at most.
        clock: Seconds of a clock that never goes back.
    """

    def __init__(
        self,
        decoding: Steps,
        step: Callable[[], list[list[int]]],
        ranks: Callable[[list[Any], list[list[int]]], list[list[int]]],
        chooser: TreeChooser,
        num_heads: int,
        max_new_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        self._decoding, self._step, self._ranks = decoding, step, ranks
        self._chooser, self._num_heads, self._clock = chooser, num_heads, clock
        self._waiting: deque[tuple[int, Any]] = deque(maxlen=POSITIONS + num_heads)
        chooser.begin(max_new_tokens)

    def step(self) -> list[list[int]]:
        """One forward of the target, and sometimes one of the heads over positions that are past."""
        decoding = self._decoding
        if not decoding.tokens[0]:
            return self._step()
        tree = self._chooser.next()
        decoding.use(tree)
        written, hidden = len(decoding.tokens[0]), decoding.hidden
        begin = self._clock()
        new = self._step()
        self._chooser.stepped(tree, decoding.accepted[0], len(new[0]), self._clock() - begin)
        if tree == PLAIN:
            self._waiting.append((written, hidden))
        known = [place for place in self._waiting if place[0] + self._num_heads <= len(decoding.tokens[0])][-POSITIONS:]
        if decoding.rows and self._chooser.wants_count(len(known)):
            begin = self._clock()
            places = [[decoding.tokens[0][first + head] for head in range(self._num_heads)] for first, _ in known]
            ranks = self._ranks([hidden for _, hidden in known], places)
            self._chooser.counted(ranks, self._clock() - begin)
            self._waiting.clear()
        return new
