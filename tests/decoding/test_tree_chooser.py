"""Which tree is chosen, in worlds whose step times and heads are written down; nothing here looks at a clock."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from axolotl_medusa.decoding.tree import Tree, chain, default_tree, write_tree
from axolotl_medusa.decoding.tree_chooser import (
    PLAIN,
    POSITIONS,
    USUAL_TOKENS,
    TreeChooser,
    candidate_trees,
    tuned_trees,
)

HEADS = 3
PLAIN_S = 0.07
WORST = 1.02


def depth(path, tree: Tree) -> int:
    fits = [n for n in range(1, len(path) + 1) if all(tuple(path[:m]) in tree.choices for m in range(1, n + 1))]
    return max(fits, default=0)


@dataclass
class World:
    """A machine and heads: what a step costs in plain steps by nodes, and the ranks of the true tokens at every position."""

    ratio: Callable[[int], float]
    ranks: Callable[[int], tuple[int, ...]]
    count: float = 0.4
    plain_s: Callable[[int], float] = lambda position: PLAIN_S
    used: Counter = field(default_factory=Counter)
    times: list[tuple[int, float, float]] = field(default_factory=list)

    def answer(self, chooser: TreeChooser, tokens: int) -> float:
        """Decodes an answer; returns its time in that of plain decoding, and keeps the time after every token."""
        chooser.begin(tokens)
        done, spent, plain, waiting = 0, 0.0, 0.0, []
        self.used, self.times = Counter(), []
        while done < tokens:
            tree = chooser.next()
            path = self.ranks(done)
            accepted = tuple(path[: depth(path, tree)])
            seconds = self.plain_s(done) * (1.0 if tree == PLAIN else self.ratio(tree.num_nodes))
            new = min(1 + len(accepted), tokens - done)
            waiting += [done] if tree == PLAIN else []
            done, spent = done + new, spent + seconds
            self.used[tree] += 1
            chooser.stepped(tree, accepted, new, seconds)
            known = [position for position in waiting if position + 1 + HEADS <= done][-POSITIONS:]
            if chooser.wants_count(len(known)):
                chooser.counted([self.ranks(position) for position in known], self.count * self.plain_s(done))
                spent, waiting = spent + self.count * self.plain_s(done), []
            plain = sum(map(self.plain_s, range(done)))
            self.times.append((done, spent / self.plain_s(0), plain / self.plain_s(0)))
        return spent / plain

    def warmed(self, trees, **options) -> TreeChooser:
        """A chooser after a warm-up that timed all trees."""
        chooser = TreeChooser(trees, **options)
        chooser.timed(PLAIN, self.plain_s(0))
        for tree in chooser.trees * 2:
            chooser.timed(tree, self.ratio(tree.num_nodes) * self.plain_s(0))
        chooser.timed_count(self.count * self.plain_s(0))
        return chooser


TREES = candidate_trees(HEADS, vocab_size=1000)
CHEAP, DEAR = (lambda nodes: 1 + nodes / 200), (lambda nodes: 1.7 + nodes / 30)


def heads(accuracy: float, seed: int = 0, rank: int = 0) -> Callable[[int], tuple[int, ...]]:
    """Every head is right at a share of the positions, by its token of one rank."""

    def ranks(position: int) -> tuple[int, ...]:
        draw = random.Random(seed * 1_000_003 + position)
        return tuple(rank if draw.random() < accuracy else 99 for _ in range(HEADS))

    return ranks


def test_candidates_are_chains_and_default_trees_that_the_heads_can_fill():
    assert [*map(chain, (1, 2, 3)), *(default_tree(HEADS, nodes) for nodes in (8, 16, 32, 64))] == TREES
    assert candidate_trees(1, vocab_size=2) == [chain(1), Tree(((0,), (1,)))]


@pytest.mark.parametrize("warmed", [True, False])
def test_plain_is_kept_where_no_tree_pays(warmed):
    """The machine on which the default tree had a third of plain decoding's speed."""
    world = World(lambda nodes: 1.74 + nodes / 32, heads(0.3))
    chooser = world.warmed(TREES) if warmed else TreeChooser(TREES)
    assert world.answer(chooser, 300) <= WORST
    assert sum(count for tree, count in world.used.items() if tree != PLAIN) <= 2
    why = "no tree would gain 5%" if warmed else "trying a tree would have cost too much"
    assert chooser.reason().startswith(f"plain decoding: {why}; the best, ")


def test_good_heads_are_tried_in_a_short_answer_though_asking_them_took_half_of_what_may_be_lost():
    """Trees that pay were never tried where the account covered no step without an accepted draft token."""
    world = World(lambda nodes: 1.8, heads(1.0), count=0.7)
    assert world.answer(TreeChooser(TREES), 96) < 0.7


def test_largest_tree_is_taken_where_nodes_cost_little_and_low_ranks_are_right():
    world = World(lambda nodes: 1 + nodes / 1000, heads(1.0, rank=2), count=0.1)
    chooser = world.warmed(TREES)
    last = default_tree(HEADS, 64)
    assert depth((2, 2, 2), last) > max(depth((2, 2, 2), tree) for tree in TREES[:-1]), "what this test is about"
    assert world.answer(chooser, 200) < 0.75
    assert world.used[last] > 0.8 * sum(count for tree, count in world.used.items() if tree != PLAIN)
    assert chooser.reason().startswith("64 nodes in ")


@pytest.mark.parametrize("warmed", [True, False])
def test_chain_is_taken_where_heads_are_right_and_nodes_are_dear(warmed):
    world = World(lambda nodes: 1.2 + nodes / 10, heads(1.0))
    chooser = world.warmed(TREES) if warmed else TreeChooser(TREES)
    assert world.answer(chooser, 200) < 0.6
    assert world.used.most_common(1)[0][0] == chain(3)
    assert chooser.reason() == (
        f"a chain of 3 in {world.used[chain(3)]} of {world.used.total()} steps, "
        "4.00 tokens a step at the cost of 1.60 plain steps"
    )


def test_next_answer_begins_with_what_was_learned():
    world = World(CHEAP, heads(0.9))
    chooser = world.warmed(TREES)
    world.answer(chooser, 200)
    first = world.used[PLAIN]
    world.answer(chooser, 200)
    assert first > POSITIONS
    assert world.used[PLAIN] <= 3


def test_heads_that_get_worse_are_left():
    """The first 200 tokens are easy, the rest cannot be guessed."""
    easy = heads(1.0)
    world = World(lambda nodes: 1.7, lambda position: easy(position) if position < 200 else (99,) * HEADS)
    assert world.answer(world.warmed(TREES), 1000) <= WORST
    last = [after[0] - before[0] for before, after in itertools.pairwise(world.times)][-500:]
    spent = {n: time for n, time, _ in world.times}
    assert set(last) == {1} and spent[1000] - spent[500] < 1.01 * 500, "steps are plain again"


def test_heads_that_get_better_are_found():
    hard = (99,) * HEADS
    world = World(CHEAP, lambda position: hard if position < 200 else (0,) * HEADS)
    assert world.answer(world.warmed(TREES), 1000) < 0.6


def test_slower_steps_of_a_longer_text_are_noticed():
    """Plain steps take three times as long at the end, and so do trees: nothing is lost by comparing with old ones."""
    world = World(lambda nodes: 1.1, heads(1.0), plain_s=lambda position: PLAIN_S * (1 + position / 500))
    assert world.answer(world.warmed(TREES), 1000) < 0.35


@pytest.mark.parametrize("warmed", [True, False])
@pytest.mark.parametrize("seed", range(60))
def test_time_is_never_more_than_2_percent_above_plain(seed, warmed):
    """Machines whose steps cost more with every node, but each less than the one before; heads of all kinds, that change."""
    draw = random.Random(seed)
    first, power, each = draw.uniform(0, 1.5), draw.uniform(0.2, 1), draw.uniform(0, 0.3)
    kinds = [heads(draw.random(), seed, rank=draw.choice((0, 0, 1, 2))) for _ in range(4)]
    length = draw.choice((20, 128, 200, 1000))
    world = World(
        lambda nodes: 1 + first + each * (nodes - 1) ** power,
        lambda position: kinds[position // draw.choice((50, 100)) % 4](position),
        count=draw.uniform(0, 1),
    )
    chooser = world.warmed(TREES) if warmed else TreeChooser(TREES)
    for _ in range(3):
        share = world.answer(chooser, length)
        usual = min(length, USUAL_TOKENS)
        assert all(spent <= plain + (WORST - 1) * max(plain, usual) + 1e-9 for _, spent, plain in world.times)
        assert share <= WORST


def test_asking_the_heads_costs_less_and_less_where_nothing_pays():
    world = World(lambda nodes: 3.0, heads(0.3), count=1.0)
    counts = []
    chooser = world.warmed(TREES)
    for _ in range(10):
        counts.append(200 * (world.answer(chooser, 200) - 1))
    assert sum(counts) <= 10 and sum(counts[5:]) <= 3


def test_heads_are_not_asked_where_even_their_best_could_not_pay():
    world = World(lambda nodes: 4.5, heads(1.0))
    assert world.answer(world.warmed(TREES), 500) == pytest.approx(1.0)


def test_first_step_of_a_tree_is_no_measure():
    chooser = TreeChooser([chain(1)])
    chooser.timed(PLAIN, 1.0)
    for seconds in (50.0, 1.1):
        chooser.timed(chain(1), seconds)
    assert chooser._ratio_at_most(chain(1)) == 1.1


def test_expected_length_of_a_tuned_tree_is_trusted_from_the_second_step_on():
    world = World(CHEAP, heads(0.8))
    tree = default_tree(HEADS, 12)
    world.answer(world.warmed(TREES, expected={tree: 2.5}), 100)
    assert world.used[PLAIN] <= 2
    dear = World(lambda nodes: 2.6, heads(0.8))
    dear.answer(dear.warmed(TREES, expected={tree: 2.5}), 60)
    assert set(dear.used) == {PLAIN}


def test_tree_beside_the_heads_is_found_with_what_is_expected_of_it(tmp_path, caplog):
    heads_dir = tmp_path / "run" / "medusa_heads"
    heads_dir.mkdir(parents=True)
    assert tuned_trees(heads_dir, 3, 1000) == tuned_trees(heads_dir.parent, 3, 1000) == {}
    write_tree(tmp_path / "run" / "tree.json", chain(2), expected_acceptance_length=1.5)
    assert tuned_trees(heads_dir, 3, 1000) == tuned_trees(heads_dir.parent, 3, 1000) == {chain(2): 1.5}
    write_tree(heads_dir / "tree.json", chain(3), expected_acceptance_length=2)
    assert tuned_trees(heads_dir, 3, 1000) == {chain(3): 2.0}
    assert not caplog.records
    assert tuned_trees(heads_dir, 2, 1000) == {}
    assert "the tree beside the heads is not used: tree has depth 3, but there are 2 heads" in caplog.text
    write_tree(heads_dir / "tree.json", Tree(((0,), (7,))), expected_acceptance_length=2)
    assert tuned_trees(heads_dir, 2, 7) == {}, "a rank that a vocabulary of seven tokens does not have"


@pytest.mark.parametrize(
    "content",
    [
        [[0]],  # what other Medusa software keeps says nothing of acceptance
        {"choices": [[0]]},
        {"choices": [[0]], "expected_acceptance_length": "2"},
        {"choices": [[0]], "expected_acceptance_length": float("nan")},
        {"choices": [[0]], "expected_acceptance_length": 2.5},  # more than it can accept
        {"choices": [], "expected_acceptance_length": 1.0},
    ],
)
def test_tree_that_nothing_is_known_of_is_left(content, tmp_path):
    (tmp_path / "tree.json").write_text(json.dumps(content))
    assert tuned_trees(tmp_path, 3, 1000) == {}


@pytest.mark.parametrize(
    ("accepted", "ratio", "begun"),
    [
        ([1] * 16, 1.8, True),  # 2 tokens a step, surely
        ([1] * 16, 1.93, False),  # 3.6% are less than a gain must be
        ([3, 0, 0, 0, 0, 0, 0, 0] * 2, 1.25, False),  # 10% by two lucky positions of 16
        ([3, 0, 0, 0, 0, 0, 0, 0] * 2, 1.0, True),
    ],
)
def test_tree_is_begun_with_where_its_gain_is_sure(accepted, ratio, begun):
    world = World(lambda nodes: ratio, heads(0))
    chooser = world.warmed([chain(3)])
    chooser.begin(1000)
    chooser.stepped(PLAIN, (), 1, PLAIN_S)
    chooser.counted([(0,) * depth + (99,) * (HEADS - depth) for depth in accepted], 0.0)
    assert (chooser.next() == chain(3)) is begun


def test_what_a_tree_accepts_is_counted_for_the_trees_within_it():
    large = default_tree(HEADS, 64)
    chooser = World(CHEAP, heads(0)).warmed([chain(1), chain(3), large])
    for _ in range(10):
        chooser.stepped(large, (0, 0), 3, PLAIN_S)
    assert [chooser._lengths[tree].mean for tree in chooser.trees] == pytest.approx([2, 3, 3])
    for _ in range(10):
        chooser.stepped(chain(1), (), 1, PLAIN_S)
    assert [chooser._lengths[tree].mean for tree in chooser.trees][1:] == pytest.approx([3, 3]), (
        "nothing is known of those"
    )
    assert chooser._lengths[chain(1)].mean < 1.5


def test_every_65th_step_at_least_is_plain():
    steps = []
    world = World(CHEAP, heads(1.0))
    chooser = world.warmed(TREES)
    next_ = chooser.next
    chooser.next = lambda: steps.append(next_()) or steps[-1]
    world.answer(chooser, 1000)
    plain = [number for number, tree in enumerate(steps) if tree == PLAIN]
    assert max(later - earlier for earlier, later in itertools.pairwise(plain)) == 65
