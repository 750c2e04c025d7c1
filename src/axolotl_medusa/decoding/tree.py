"""Candidate trees: which draft tokens are verified in one forward of the target, and how they hang together.

Contract: pure Python, no model and no tensors. A tree is a set of *choices*. The choice `(r0, r1, ..., rk)` is the draft
token of rank rk (0 is the best) from head k, following the draft tokens `(r0, ..., r(k-1))`. Node 0 is the root: the
target's own next token, already certain when a step begins; node i > 0 is choice i - 1. So a tree of n nodes has n - 1
choices, and the empty tree is plain decoding.
"""

from __future__ import annotations

import functools
import heapq
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from axolotl_medusa.model.json_files import parse_json

Choice = tuple[int, ...]
"""Ranks from the root down: rank r at depth d (from 1) is the (r + 1)-th best token of head d - 1."""

DEFAULT_NODES = 64
DEFAULT_TOP_K = 10
"""Ranks of a head that trees choose from unless told otherwise."""

MAX_NODES, MAX_DEPTH, MAX_TOP_K = 1024, 64, 1000
"""Of a tree that is read or named: a step of 1,024 tokens is slower than plain decoding on any machine."""

TYPICAL_TOP1 = (0.560, 0.316, 0.201, 0.147, 0.118)
"""Top-1 accuracy of heads 0 to 4 of Medusa-1 on Vicuna-7B, as published with the first public Medusa release."""

_DECAY_AT_ZERO, _DECAY_PER_ACCURACY = 0.5, 3.0
"""Fitted to the top-2 to top-5 accuracies published beside `TYPICAL_TOP1`: the surer a head, the faster its ranks decay."""


@dataclass(frozen=True)
class Tree:
    """A candidate tree. Build it with `from_choices`, which validates and sorts.

    Attributes:
        choices: One tuple of ranks per node but the root, prefix-closed, sorted by depth and then by ranks.
    """

    choices: tuple[Choice, ...] = ()

    @classmethod
    def from_choices(cls, choices: Iterable[Sequence[int]]) -> Tree:
        """Validates choices in any order.

        Raises:
            ValueError: A choice is empty, repeated, not made of ranks from 0, or lacks its parent.
        """
        found: set[Choice] = set()
        for choice in choices:
            if (
                not isinstance(choice, Sequence)
                or isinstance(choice, str)
                or not choice
                or not all(map(_is_rank, choice))
            ):
                raise ValueError(
                    f"tree has the choice {shorten(choice)}, expected ranks from 0 such as [0, 2], one per head"
                )
            if tuple(choice) in found:
                raise ValueError(f"tree has the choice {shorten(list(choice))} twice, expected each once: delete one")
            found.add(tuple(choice))
        for node in found:
            if len(node) > 1 and node[:-1] not in found:
                raise ValueError(
                    f"tree has the choice {shorten(list(node))} without its parent {shorten(list(node[:-1]))}: add the parent"
                )
        return cls(tuple(sorted(found, key=_order)))

    @property
    def num_nodes(self) -> int:
        """Tokens that one verification forwards, with the root."""
        return 1 + len(self.choices)

    @property
    def depth(self) -> int:
        """Heads that the tree uses: the most draft tokens that one step can accept."""
        return max(self.depths)

    @functools.cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of every node, 0 for the root: its position after the root's."""
        return (0, *map(len, self.choices))

    @functools.cached_property
    def parents(self) -> tuple[int, ...]:
        """Index of every node's parent; the root is its own."""
        index: dict[Choice, int] = {(): 0} | {choice: i for i, choice in enumerate(self.choices, 1)}
        return (0, *(index[choice[:-1]] for choice in self.choices))

    @functools.cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """Nodes from the root to every node, both included: what is kept when that node is the last accepted one."""
        paths: list[tuple[int, ...]] = [(0,)]
        for node in range(1, self.num_nodes):
            paths.append((*paths[self.parents[node]], node))
        return tuple(paths)

    @functools.cached_property
    def attention_mask(self) -> tuple[tuple[bool, ...], ...]:
        """Row i, column j: whether node i attends to node j, which is so for itself and its ancestors."""
        return tuple(tuple(node in path for node in range(self.num_nodes)) for path in map(set, self.paths))

    @property
    def picks(self) -> tuple[tuple[int, int], ...]:
        """`(head, rank)` of every node but the root: the draft token that it takes from the heads' best tokens."""
        return tuple((len(choice) - 1, choice[-1]) for choice in self.choices)

    @property
    def top_k(self) -> int:
        """Best tokens per head that the tree needs: its largest rank + 1, 0 for the empty tree."""
        return max((choice[-1] + 1 for choice in self.choices), default=0)

    def ranks_of(self, head: int) -> int:
        """Best tokens of one head that the tree needs: its largest rank + 1, 0 for none."""
        return max((choice[-1] + 1 for choice in self.choices if len(choice) == head + 1), default=0)

    def candidates(self, root: int, top_tokens: Sequence[Sequence[int]]) -> list[int]:
        """The tokens of all nodes, one pick per node and no expansion of paths.

        Args:
            root: The target's own token.
            top_tokens: Best tokens first of every head, `[depth or more][top_k or more]`.
        """
        return [root, *(top_tokens[head][rank] for head, rank in self.picks)]

    def check_fits(self, num_heads: int, available_top_k: int | None = None) -> None:
        """Checks that the heads can fill the tree.

        Raises:
            ValueError: The tree is deeper than there are heads, or takes ranks beyond `available_top_k`.
        """
        if self.depth > num_heads:
            raise ValueError(
                f"tree has depth {self.depth}, but there are {num_heads} heads: take a tree of at most that depth"
            )
        if available_top_k is not None and self.top_k > available_top_k:
            raise ValueError(
                f"tree takes rank {self.top_k - 1} of a head, but only ranks 0 to {available_top_k - 1} are available"
            )


def chain(num_drafts: int) -> Tree:
    """The best token of each of the first `num_drafts` heads; 0 is plain decoding.

    Raises:
        ValueError: `num_drafts` is negative.
    """
    if num_drafts < 0:
        raise ValueError(f"a chain has {num_drafts} draft tokens, expected 0 or more")
    return Tree(tuple((0,) * depth for depth in range(1, num_drafts + 1)))


def typical_accuracy(head: int, rank: int) -> float:
    """Chance that the token of this rank is right: `top1 · (rank + 1) ** -(0.5 + 3 · top1)`, top1 of `TYPICAL_TOP1`.

    The exponent is a fit to the published top-5 accuracies: of head 0 rank 1 is right a fifth as often as rank 0, of
    head 4 more than half as often.
    """
    top1 = TYPICAL_TOP1[head]
    return float(top1 * (rank + 1) ** -(_DECAY_AT_ZERO + _DECAY_PER_ACCURACY * top1))


def default_tree(num_heads: int = len(TYPICAL_TOP1), nodes: int = DEFAULT_NODES, top_k: int = DEFAULT_TOP_K) -> Tree:
    """The tree whose nodes are likeliest to be accepted with typical heads; `search_tree` finds the one for real ones.

    No joint accuracies are published, so a node's chance is taken as the product of `typical_accuracy` along its path.

    Args:
        num_heads: Heads that there are; those past the fifth are not used.
        nodes: Nodes with the root.
        top_k: Ranks per head to choose from.

    Raises:
        ValueError: `nodes`, `num_heads` or `top_k` is below 1.
    """
    if min(num_heads, nodes, top_k) < 1:
        raise ValueError(
            f"a tree of {nodes} nodes from top {top_k} of {num_heads} heads was asked for, expected each from 1"
        )
    depth = min(num_heads, len(TYPICAL_TOP1))

    def entry(choice: Choice) -> tuple[float, Choice]:
        return -math.prod(typical_accuracy(head, rank) for head, rank in enumerate(choice)), choice

    # A node is never likelier than its parent or its better sibling, so those two suffice to reach every node in order.
    waiting = [entry((0,))]
    chosen: list[Choice] = []
    while waiting and len(chosen) < nodes - 1:
        choice = heapq.heappop(waiting)[1]
        chosen.append(choice)
        if choice[-1] + 1 < top_k:
            heapq.heappush(waiting, entry((*choice[:-1], choice[-1] + 1)))
        if len(choice) < depth:
            heapq.heappush(waiting, entry((*choice, 0)))
    return Tree.from_choices(chosen)


def named_tree(name: str | Path, num_heads: int) -> Tree:
    """The tree that a user names.

    Args:
        name: `none` (plain decoding), `chain` (all heads), `chain-3`, `default`, `default-16`, or a JSON file.
        num_heads: Heads that there are.

    Raises:
        ValueError: It is none of them, or does not fit the heads.
    """
    kind, _, size = str(name).partition("-")
    is_size = not size or (size.isdecimal() and len(size) <= len(str(MAX_NODES)) and int(size) <= MAX_NODES)
    if name == "none":
        tree = Tree()
    elif kind == "chain" and is_size:
        tree = chain(int(size) if size else num_heads)
    elif kind == "default" and is_size:
        tree = default_tree(num_heads, int(size) if size else DEFAULT_NODES)
    elif Path(name).expanduser().is_file():
        tree = read_tree(name)
    else:
        raise ValueError(
            f"unknown tree {name}: expected none, chain, chain-N, default, default-N (N up to {MAX_NODES}), or a JSON file "
            "that is there"
        )
    tree.check_fits(num_heads)
    return tree


def asked_tree(tree: Tree | str | Path | None, num_heads: int, available_top_k: int) -> Tree:
    """The tree that an argument means: itself, what `named_tree` knows, or by default `default_tree`.

    Args:
        tree: The argument.
        num_heads: Heads that there are.
        available_top_k: Tokens that they choose among.

    Raises:
        ValueError: It is unknown or does not fit the heads.
    """
    if tree is None:
        return default_tree(num_heads, top_k=min(DEFAULT_TOP_K, available_top_k))
    found = tree if isinstance(tree, Tree) else named_tree(tree, num_heads)
    found.check_fits(num_heads, available_top_k)
    return found


def likely_part(tree: Tree, log_probabilities: Sequence[Sequence[float]], least: float) -> Tree:
    """The nodes of a tree whose paths are likely enough, by what the heads say of their own drafts.

    Args:
        tree: The tree.
        log_probabilities: Of every head's best tokens, `[heads][ranks]`; heads that are missing have no likely token.
        least: Least product of the probabilities along a node's path.
    """
    bound = math.log(least) if least > 0 else -math.inf
    sums: dict[Choice, float] = {(): 0.0}
    for choice in tree.choices:
        above = sums.get(choice[:-1])
        if above is not None and len(choice) <= len(log_probabilities):
            own = above + log_probabilities[len(choice) - 1][choice[-1]]
            if own >= bound:
                sums[choice] = own
    return tree if len(sums) == tree.num_nodes else Tree(tuple(choice for choice in tree.choices if choice in sums))


def read_tree(file: str | Path) -> Tree:
    """Reads `{"choices": [[0], [1], [0, 0], ...], ...}`, or the bare list that other Medusa software keeps.

    Raises:
        ValueError: It is missing, not JSON, or not a tree.
    """
    try:
        content = parse_json(Path(file).expanduser().read_bytes(), str(file))
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): expected a tree's JSON file") from error
    choices = content.get("choices") if isinstance(content, dict) else content
    if not isinstance(choices, list):
        raise ValueError(f'{file} holds no list of choices: expected {{"choices": [[0], [1], [0, 0]]}}')
    if len(choices) >= MAX_NODES:
        raise ValueError(f"{file} has {len(choices)} choices, expected fewer than {MAX_NODES}: take a smaller tree")
    try:
        tree = Tree.from_choices(choices)
        if tree.top_k > MAX_TOP_K or tree.depth > MAX_DEPTH:
            found = f"rank {tree.top_k - 1} at most and depth {tree.depth}"
            raise ValueError(f"tree has {found}, expected ranks below {MAX_TOP_K} and a depth up to {MAX_DEPTH}")
        return tree
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_least_probability(file: str | Path) -> float:
    """How likely a draft's path must be to be verified, as a tree's file says; 0 where it says nothing.

    Raises:
        ValueError: It is no probability.
    """
    content = parse_json(Path(file).expanduser().read_bytes(), str(file))
    least = content.get("least_probability", 0.0) if isinstance(content, dict) else 0.0
    if not isinstance(least, int | float) or isinstance(least, bool) or not 0 <= least <= 1:
        raise ValueError(f"{file}: least_probability is {shorten(least)}, expected a number from 0 to 1")
    return float(least)


def write_tree(file: str | Path, tree: Tree, **facts: Any) -> None:
    """Writes a tree and facts about it (where it comes from, what is expected of it), whole or not at all."""
    file = Path(file).expanduser()
    part = file.with_name(file.name + ".part")
    content = {"choices": [list(choice) for choice in tree.choices], "num_nodes": tree.num_nodes, **facts}
    part.write_text(json.dumps(content) + "\n", encoding="utf-8")
    part.replace(file)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _order(choice: Choice) -> tuple[int, Choice]:
    return len(choice), choice
