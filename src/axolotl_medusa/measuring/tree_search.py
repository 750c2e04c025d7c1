"""The best candidate tree for given heads: from joint calibration counts and, given step times, for a given machine.

Contract: pure Python, no model and no tensors. What is counted is, at every calibration position, the rank of the true
token in each head's best tokens, all heads together: a product of the heads' separate accuracies would be wrong, because
heads are right together far more often than that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from axolotl_medusa.decoding.tree import Choice, Tree

MIN_GAIN = 0.02
"""Predicted gain over plain decoding below which no tree is advised: step times are not measured more exactly."""


T = TypeVar("T")

CHECKED_PROMPTS = 8
"""Prompts at most on which a chosen tree is run against plain decoding."""

_CALIBRATION_PER_CHECKED = 3
"""Prompts that calibrate for each one that is held out."""


@dataclass
class JointRanks:
    """Counts of joint ranks over calibration positions; the true tokens at a position are one path down a tree.

    Attributes:
        top_k: Ranks per head that were looked at; any other value stands for "not among them".
        positions: Positions counted.
        reached: For every choice, the positions whose true tokens begin with it.
    """

    top_k: int
    positions: int = 0
    reached: Counter[Choice] = field(default_factory=Counter)

    def add(self, ranks: Iterable[Sequence[int]]) -> None:
        """Counts positions.

        Args:
            ranks: Per position the rank of the true token t + 2 + i in head i's best tokens, i from 0; anything outside
                0 to top_k - 1 where it is not among them.
        """
        top_k = self.top_k
        paths = Counter(map(tuple, ranks))
        self.positions += paths.total()
        for path, count in paths.items():
            for depth, rank in enumerate(path, 1):
                if not 0 <= rank < top_k:
                    break
                self.reached[path[:depth]] += count

    def expected_length(self, tree: Tree) -> float:
        """Expected acceptance length: the mean over positions of 1 + the longest path in the tree that is right.

        Raises:
            ValueError: Nothing was counted.
        """
        self._require_positions()
        return 1 + sum(self.reached[choice] for choice in tree.choices) / self.positions

    def _require_positions(self) -> None:
        if not self.positions:
            raise ValueError("0 calibration positions were counted, expected at least 1: give longer calibration text")


@dataclass(frozen=True)
class TreeSearch:
    """Best trees of every size.

    Attributes:
        choices: Choices, best first: the first n - 1 are the best tree of n nodes.
        expected_lengths: Expected acceptance length of the best tree of 1, 2, ... nodes.
    """

    choices: tuple[Choice, ...]
    expected_lengths: tuple[float, ...]

    def tree(self, nodes: int) -> Tree:
        """The best tree of at most `nodes` nodes."""
        return Tree.from_choices(self.choices[: nodes - 1])


def search_tree(ranks: JointRanks, nodes: int) -> TreeSearch:
    """Finds the best trees of 1 to `nodes` nodes.

    A position's accepted length is the number of choices on its one true path that the tree has, so the expected length
    is 1 plus the sum of `reached` over the choices. A parent is reached at least as often as its child: taking the most
    reached choices one by one keeps the tree prefix-closed and is optimal for every size. Choices that were never
    reached are not taken, so the result may have fewer nodes.

    Raises:
        ValueError: Nothing was counted, or `nodes` is below 1.
    """
    ranks._require_positions()
    if nodes < 1:
        raise ValueError(f"a tree of {nodes} nodes was asked for, expected at least 1 (the root alone)")
    ordered = sorted(ranks.reached.items(), key=lambda item: (-item[1], len(item[0]), item[0]))[: nodes - 1]
    lengths, right = [1.0], 0
    for _, count in ordered:
        right += count
        lengths.append(1 + right / ranks.positions)
    return TreeSearch(tuple(choice for choice, _ in ordered), tuple(lengths))


@dataclass(frozen=True)
class ChosenSize:
    """Which size of tree is fastest here.

    Attributes:
        nodes: Nodes with the root; 1 means no tree: plain decoding.
        tokens_per_s: Predicted speed with it.
        plain_tokens_per_s: Speed of plain decoding.
        reason: One line for the user.
    """

    nodes: int
    tokens_per_s: float
    plain_tokens_per_s: float
    reason: str


def fastest_size(
    search: TreeSearch, step_s: Mapping[int, float], plain_step_s: float, min_gain: float = MIN_GAIN
) -> ChosenSize:
    """Chooses the size with the most tokens per second: expected acceptance length / seconds per step.

    Args:
        search: Best trees by size.
        step_s: Measured seconds of a whole decoding step (forward, heads, acceptance) by number of nodes. Sizes between
            two measured ones are interpolated linearly; sizes outside are not considered.
        plain_step_s: Measured seconds of a step of plain decoding.
        min_gain: Least predicted gain over plain decoding for which a tree is advised.

    Raises:
        ValueError: Nothing was measured, or a time is not positive.
    """
    if not step_s or min(*step_s.values(), plain_step_s) <= 0:
        raise ValueError(
            f"step times are {dict(step_s)} s and plain {plain_step_s} s, expected at least one, all above 0"
        )
    plain = 1 / plain_step_s
    speeds = {
        nodes: length / seconds
        for nodes, length in enumerate(search.expected_lengths, 1)
        if nodes > 1 and (seconds := interpolated(step_s, nodes)) is not None
    }
    if not speeds:
        reason = (
            f"no tree: of {len(search.expected_lengths)} possible sizes none lies within the measured {sorted(step_s)}"
        )
        return ChosenSize(1, plain, plain, reason)
    nodes = max(speeds, key=lambda size: (speeds[size], -size))
    speed, largest = speeds[nodes], max(speeds)
    gain = speed / plain - 1
    if gain < min_gain:
        reason = (
            f"no tree: the best size, {nodes} nodes, is expected to be {gain:+.1%} against plain decoding on this machine, "
            f"less than the {min_gain:.0%} that a gain must have to be real"
        )
        return ChosenSize(1, plain, plain, reason)
    reason = (
        f"{nodes} nodes: {search.expected_lengths[nodes - 1]:.3f} tokens per step, {gain:+.1%} against plain decoding"
    )
    if nodes < largest:
        less = 1 - speeds[largest] / speed
        reason += (
            f"; {largest} nodes accept {search.expected_lengths[largest - 1]:.3f} but are {less:.1%} slower than that"
        )
    return ChosenSize(nodes, speed, plain, reason)


def interpolated(step_s: Mapping[int, float], nodes: int) -> float | None:
    """Seconds of a step with that many nodes, None outside the measured sizes."""
    below = max((size for size in step_s if size <= nodes), default=None)
    above = min((size for size in step_s if size >= nodes), default=None)
    if below is None or above is None:
        return None
    if below == above:
        return step_s[below]
    share = (nodes - below) / (above - below)
    return step_s[below] * (1 - share) + step_s[above] * share


def held_out(prompts: Sequence[T]) -> tuple[list[T], list[T]]:
    """Splits prompts: a quarter, from 1 to `CHECKED_PROMPTS`, is held out, evenly spread over the file.

    Returns:
        Prompts to calibrate with, and prompts to check the choice on.

    Raises:
        ValueError: There are fewer than two.
    """
    if len(prompts) < 2:
        raise ValueError(
            f"there are {len(prompts)} calibration prompts, expected at least 2: one is held out to check the tree on"
        )
    count = min(CHECKED_PROMPTS, max(1, len(prompts) // (_CALIBRATION_PER_CHECKED + 1)))
    places = {(2 * number + 1) * len(prompts) // (2 * count) for number in range(count)}
    parts: tuple[list[T], list[T]] = ([], [])
    for place, prompt in enumerate(prompts):
        parts[place in places].append(prompt)
    return parts
