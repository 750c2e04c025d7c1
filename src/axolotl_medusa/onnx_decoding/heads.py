"""The heads in ONNX Runtime: draft tokens, as many as are worth verifying.

Contract: one graph per head, so that a head which no tree asks, or whose draft would be unsure, does not run. It runs on the
last accepted position alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from axolotl_medusa.decoding.tree import DEFAULT_TOP_K, Tree, likely_part
from axolotl_medusa.onnx_decoding.graph_names import HIDDEN_STATES, LOG_PROBABILITIES, TOKENS, TOP_K
from axolotl_medusa.onnx_decoding.target import Array


class OnnxHeads:
    """Medusa heads, each a graph.

    Args:
        sessions: The graphs, head 0 first.
        vocab_size: Tokens that a head chooses among.

    Attributes:
        num_heads: Heads that there are.
        vocab_size: As above.
        least_probability: Drafts of paths that are less likely, by what the heads say, are not verified; 0 for all.
        least_of: The same for single trees, as their files say.
    """

    def __init__(self, sessions: Sequence[Any], vocab_size: int) -> None:
        self._sessions = sessions
        self.num_heads, self.vocab_size = len(sessions), vocab_size
        self.least_probability = 0.0
        self.least_of: dict[Tree, float] = {}

    def best(self, head: int, hidden: Array, top_k: int) -> tuple[Array, Array]:
        """Best tokens first of a head and the logarithms of their probabilities, `[B, top_k]` each; `hidden` is `[B, H]`."""
        found = self._sessions[head].run([TOKENS, LOG_PROBABILITIES], {HIDDEN_STATES: hidden, TOP_K: np.array([top_k])})
        return found[0], found[1]

    def tree(self, hidden: Array, tree: Tree) -> tuple[Tree, Array]:
        """The part of a tree that is worth verifying, and its draft tokens, `[B, n - 1]`.

        Of a batch the whole tree is verified: its rows share one.
        """
        tokens: list[Array] = []
        likely: list[list[float]] = []
        part, least = tree, self.least_of.get(tree, self.least_probability)
        for head in range(tree.depth):
            best, log_probabilities = self.best(head, hidden, tree.ranks_of(head))
            tokens.append(best)
            if least > 0 and len(hidden) == 1:
                likely.append(log_probabilities[0].tolist())
                part = likely_part(tree, likely, least)
                if part.depth <= head:
                    break
        drafts = [tokens[head][:, rank] for head, rank in part.picks]
        return part, np.stack(drafts, 1) if drafts else np.zeros((len(hidden), 0), dtype=np.int64)

    def ranks(self, hidden: Sequence[Array], tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        """Ranks of known tokens among the heads' best, `DEFAULT_TOP_K` for all that are further down.

        Args:
            hidden: Hidden states, `[1, H]` each.
            tokens: Per position the token that head 0, 1, ... should have predicted.
        """
        states, wanted = np.concatenate(list(hidden)), np.array(tokens)
        top_k = min(DEFAULT_TOP_K, self.vocab_size)
        ranks = np.full(wanted.shape, DEFAULT_TOP_K)
        for head in range(wanted.shape[1]):
            matches = self.best(head, states, top_k)[0] == wanted[:, head, None]
            ranks[:, head] = np.where(matches.any(-1), matches.argmax(-1), DEFAULT_TOP_K)
        found: list[list[int]] = ranks.tolist()
        return found
