"""Which candidate tree the next step verifies, so that decoding is never slower than plain decoding by more than 2%.

Contract: pure Python, no model and no clock; seconds and ranks come in, a tree goes out. It starts plainly and learns two
things on the way. What trees would accept: the heads are asked, now and then and for many positions at once, about tokens
that are known already. What a step of a tree costs: by taking one. Whatever may be lost by that is paid from a small account,
`ALLOWED` of the time that plain decoding would have taken, and what trees gain is paid in. A tree is taken if it is expected
to be faster than plain decoding and the account covers its step even if no draft token is accepted. The very first step of a
tree, taken to see what trees cost here, may count on the tokens that it is likely to bring.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from axolotl_medusa.decoding.tree import DEFAULT_TOP_K, Choice, Tree, chain, default_tree, read_tree
from axolotl_medusa.model.file_names import HEADS_FOLDER

LOG = logging.getLogger(__name__)

ALLOWED = 0.015
"""Time that may be lost, as a share of plain decoding's: a clock that is wrong by half a percent leaves it within 2%."""

USUAL_TOKENS = 128
"""A shorter answer may lose as much time as one of this length."""

POSITIONS = 16
"""Positions at which the heads are asked at once: their output layer is read once for all of them."""

MIN_GAIN, KEPT_GAIN = 0.05, 0.02
"""Expected gains over plain decoding for which a tree is begun with, and for which it is kept."""

AUTO: Literal["auto"] = "auto"
"""What a user says instead of a tree, to have it chosen."""

TREE_FILE = "tree.json"
"""A tree that `axolotl-medusa tree` found, looked for beside the heads."""

PLAIN = Tree()

_NODES = (8, 16, 32, 64)
_MIN_SAMPLES = 8
_MEMORY = 0.97
"""Weight of an accepted length after each newer one: about the last 33 count."""
_TIMES = 9
"""Steps whose median is what a step takes."""
_PLAIN_EVERY = 64
"""Steps after which one is plain, to see what plain decoding takes by now."""


def candidate_trees(num_heads: int, vocab_size: int) -> list[Tree]:
    """Trees to choose from, the smallest first: chains of every length, and default trees of 8 to 64 nodes."""
    chains = [chain(drafts) for drafts in range(1, num_heads + 1)]
    trees = [default_tree(num_heads, nodes, min(DEFAULT_TOP_K, vocab_size)) for nodes in _NODES]
    return sorted(dict.fromkeys([*chains, *trees]), key=lambda tree: tree.num_nodes)


def tuned_trees(heads: Path, num_heads: int, vocab_size: int) -> dict[Tree, float]:
    """The tree that `axolotl-medusa tree` wrote beside heads, if it did, and the acceptance length that it expects of it.

    Args:
        heads: The directory of the heads, or of their run.
        num_heads: Heads that there are.
        vocab_size: Tokens that they choose among.
    """
    file = tuned_file(heads)
    if file is None:
        return {}
    try:
        tree = read_tree(file)
        tree.check_fits(num_heads, vocab_size)
    except ValueError as error:
        LOG.warning("the tree beside the heads is not used: %s", error)
        return {}
    facts = json.loads(file.read_text(encoding="utf-8"))
    length = facts.get("expected_acceptance_length") if isinstance(facts, dict) else None
    if tree.choices and isinstance(length, int | float) and 1 <= length <= 1 + tree.depth:
        return {tree: float(length)}
    return {}


def tuned_file(heads: Path) -> Path | None:
    """The file that `axolotl-medusa tree` wrote beside heads, None where it did not."""
    around = [heads.parent] if heads.name == HEADS_FOLDER else []
    files = (directory / TREE_FILE for directory in (heads, heads / HEADS_FOLDER, *around))
    return next((file for file in files if file.is_file()), None)


def is_auto(tree: Tree | str | Path | None, acceptance: str | None) -> bool:
    """Whether the trees of an answer are chosen step by step: asked for, or by default.

    Raises:
        ValueError: They are asked for with an acceptance whose text depends on the tree.
    """
    if tree == AUTO and acceptance == "typical":
        raise ValueError("tree='auto' with acceptance='typical', whose text depends on the tree: name a tree")
    return tree == AUTO or (tree is None and acceptance != "typical")


def why_plain(batch: int, compile: bool) -> str | None:
    """A line on why no tree can be chosen for these prompts and they are decoded plainly; None where one can.

    Args:
        batch: Prompts.
        compile: Whether the forward is compiled.
    """
    if compile:
        return "plain decoding: a compiled forward has one tree for all steps, so none is tried; name one with --tree (tree=)"
    if batch > 1:
        return "plain decoding: trees are tried on single prompts, not on batches; name one with tree="
    return None


class TreeChooser:
    """Chooses a tree for every step of one answer after the other, and keeps what it learned.

    Args:
        trees: Trees to choose from.
        expected: Acceptance lengths that some of them are known to have, as `axolotl-medusa tree` writes them down.
    """

    def __init__(self, trees: Sequence[Tree], expected: dict[Tree, float] | None = None) -> None:
        self.trees = sorted({**dict.fromkeys(trees), **dict.fromkeys(expected or {})}, key=lambda tree: tree.num_nodes)
        self._lengths = {tree: _Lengths() for tree in self.trees}
        for tree, length in (expected or {}).items():
            self._lengths[tree].add(length, _MIN_SAMPLES)
        self._choices = {tree: frozenset(tree.choices) for tree in self.trees}
        self._ratios: dict[Tree, deque[float]] = {}
        self._plain_times: deque[float] = deque(maxlen=_TIMES)
        self._count_s: float | None = None
        self._between_counts, self._since_count = POSITIONS, 0
        self._last, self._since_plain = PLAIN, _PLAIN_EVERY
        self._extra_s = self._plain_equivalent_s = 0.0
        self._usual_tokens = USUAL_TOKENS
        self._steps: Counter[Tree] = Counter()

    def begin(self, max_new_tokens: int) -> None:
        """An answer of at most so many tokens begins; its first step is plain."""
        if self._plain_times:
            self._plain_times = deque([self._plain_s], maxlen=_TIMES)
        self._since_plain = _PLAIN_EVERY
        self._extra_s = self._plain_equivalent_s = 0.0
        self._usual_tokens = min(max_new_tokens, USUAL_TOKENS)
        self._steps.clear()

    def next(self) -> Tree:
        """The tree of the next step, `PLAIN` for none."""
        if self._since_plain >= _PLAIN_EVERY:
            return PLAIN
        best, most = PLAIN, 0.0
        for tree in self.trees:
            gain = self._gain(tree)
            if gain > most and self._is_covered((self._ratio_at_most(tree) - self._sure_tokens(tree)) * self._plain_s):
                best, most = tree, gain
        self._last = best
        return best

    def stepped(self, tree: Tree, path: Choice, new_tokens: int, seconds: float) -> None:
        """A step was taken.

        Args:
            tree: Its tree.
            path: The last accepted node, empty for the root.
            new_tokens: Tokens that it added to the answer.
            seconds: What it took.
        """
        self.timed(tree, seconds)
        self._steps[tree] += 1
        self._since_count += new_tokens
        if tree == PLAIN:
            self._since_plain = 0
            self._plain_equivalent_s += seconds
            return
        self._since_plain += 1
        self._plain_equivalent_s += new_tokens * self._plain_s
        self._extra_s += seconds - new_tokens * self._plain_s
        for other in self.trees:  # what a smaller tree would have accepted is known too
            if self._choices[other] <= self._choices[tree]:
                self._lengths[other].add(1 + _depth(path, self._choices[other]))

    def wants_count(self, positions: int) -> bool:
        """Whether to ask the heads about so many positions whose next tokens are known."""
        if positions < POSITIONS or self._since_count < self._between_counts:
            return False
        can_pay = any((1 + tree.depth) / self._ratio_at_least(tree) > 1 + MIN_GAIN for tree in self.trees)
        return can_pay and self._is_covered(self._plain_s if self._count_s is None else self._count_s)

    def counted(self, paths: Sequence[Sequence[int]], seconds: float) -> None:
        """The heads were asked.

        Args:
            paths: Per position the rank of the true token among the best ones of head 0, 1, ...
            seconds: What it took.
        """
        self.timed_count(seconds)
        self._extra_s += seconds
        for path in paths:
            for tree in self.trees:
                self._lengths[tree].add(1 + _depth(path, self._choices[tree]))
        self._since_count = 0
        # The less there is to gain, the less is spent to see it again.
        pays = any(self._gain(tree) > 0 for tree in self.trees)
        self._between_counts = POSITIONS if pays else 4 * self._between_counts

    def timed(self, tree: Tree, seconds: float) -> None:
        """A step with this tree took so long. The first one of a tree is no measure: it makes what later ones use again."""
        if tree == PLAIN:
            self._plain_times.append(seconds)
        elif tree not in self._ratios:
            self._ratios[tree] = deque(maxlen=_TIMES)
        else:
            self._ratios[tree].append(seconds / self._plain_s)

    def timed_count(self, seconds: float) -> None:
        """Asking the heads took so long."""
        self._count_s = seconds

    def reason(self) -> str:
        """What the answer was decoded with and why, for a user."""
        used = [tree for tree, _ in self._steps.most_common() if tree != PLAIN]
        all_steps = self._steps.total()
        if used and (self._last != PLAIN or 2 * self._steps[PLAIN] < all_steps):
            return f"{_name(used[0])} in {self._steps[used[0]]} of {all_steps} steps, {self._figures(used[0])}"
        known = [tree for tree in self.trees if self._lengths[tree].is_known]
        if not known:
            return "plain decoding: too little text to see what a tree would gain"
        best = max(known, key=lambda tree: self._lengths[tree].mean / self._ratio_at_least(tree))
        promises = self._lengths[best].mean / self._ratio_at_least(best) >= 1 + MIN_GAIN
        why = "trying a tree would have cost too much" if promises else f"no tree would gain {MIN_GAIN:.0%}"
        return f"plain decoding: {why}; the best, {_name(best)}: {self._figures(best)}"

    def _figures(self, tree: Tree) -> str:
        ratio = self._ratio_at_least(tree)
        about = "" if self._ratios.get(tree) else "at least "
        return f"{self._lengths[tree].mean:.2f} tokens a step at the cost of {about}{ratio:.2f} plain steps"

    @property
    def _plain_s(self) -> float:
        return statistics.median_low(self._plain_times)

    def _gain(self, tree: Tree) -> float:
        """Expected gain over plain decoding; 0 where it is too small or not sure enough."""
        lengths = self._lengths[tree]
        if not lengths.is_known or not self._plain_times:
            return 0.0
        length, least = (lengths.mean, KEPT_GAIN) if tree == self._last else (lengths.lower, MIN_GAIN)
        gain = length / self._ratio_at_least(tree) - 1
        return gain if gain >= least else 0.0

    def _sure_tokens(self, tree: Tree) -> float:
        """Tokens that a step is reckoned to bring when its loss is to be covered; the very first of all may count on drafts."""
        return 1.0 if self._ratios else self._lengths[tree].lower

    def _is_covered(self, extra_s: float) -> bool:
        """Whether the account covers that much more time."""
        usual_s = self._usual_tokens * self._plain_s
        return self._extra_s + extra_s <= ALLOWED * max(self._plain_equivalent_s, usual_s)

    def _ratio_at_least(self, tree: Tree) -> float:
        """What a step takes, in plain steps; where it was not measured, what it takes at least."""
        if times := self._ratios.get(tree):
            return statistics.median_low(times)
        return max((ratio for nodes, ratio in self._measured() if nodes <= tree.num_nodes), default=1.0)

    def _ratio_at_most(self, tree: Tree) -> float:
        """The same, or what it takes at most: each node as much more as one of a smaller tree, or what a larger tree takes."""
        if times := self._ratios.get(tree):
            return statistics.median_low(times)
        nodes = tree.num_nodes
        smaller = max(((size, ratio) for size, ratio in self._measured() if size <= nodes), default=(2, 2.0))
        larger = min((ratio for size, ratio in self._measured() if size >= nodes), default=math.inf)
        return min(larger, max(smaller[1], 1 + (smaller[1] - 1) * (nodes - 1) / (smaller[0] - 1)))

    def _measured(self) -> list[tuple[int, float]]:
        """Nodes and plain steps of every tree whose steps were measured."""
        return [(tree.num_nodes, statistics.median_low(times)) for tree, times in self._ratios.items() if times]


class _Lengths:
    """A running mean of accepted lengths, in which old ones fade."""

    def __init__(self) -> None:
        self._weight = self._sum = self._squares = 0.0

    def add(self, length: float, times: int = 1) -> None:
        """Counts a length."""
        for _ in range(times):
            self._weight = self._weight * _MEMORY + 1
            self._sum = self._sum * _MEMORY + length
            self._squares = self._squares * _MEMORY + length * length

    @property
    def is_known(self) -> bool:
        """Whether enough of them were counted; their weight after the first `_MIN_SAMPLES` is a little less than that."""
        return self._weight > _MIN_SAMPLES * _MEMORY**_MIN_SAMPLES

    @property
    def mean(self) -> float:
        return self._sum / self._weight

    @property
    def lower(self) -> float:
        """The mean less its standard error."""
        variance = max(0.0, self._squares / self._weight - self.mean**2)
        return self.mean - math.sqrt(variance / self._weight)


def _depth(path: Sequence[int], choices: frozenset[Choice]) -> int:
    """How far a path goes down a tree."""
    depth = 0
    while depth < len(path) and tuple(path[: depth + 1]) in choices:
        depth += 1
    return depth


def _name(tree: Tree) -> str:
    return f"a chain of {tree.depth}" if tree == chain(tree.depth) else f"{tree.num_nodes} nodes"
