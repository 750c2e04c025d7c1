"""Search for the best tree from joint ranks, and for the fastest size from step times."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from axolotl_medusa.decoding.tree import Tree, chain
from axolotl_medusa.measuring.tree_search import JointRanks, fastest_size, search_tree

SEARCH_LIMIT_S = 20  # measured: 0.2 s on an idle core


def joint_ranks(rows, top_k=4) -> JointRanks:
    ranks = JointRanks(top_k)
    ranks.add(rows)
    return ranks


def random_rows(count: int, heads: int = 3, top_k: int = 4, seed: int = 0) -> list[list[int]]:
    """Ranks whose heads are right together: an easy position is easy for all of them."""
    source = random.Random(seed)
    rows = []
    for _ in range(count):
        ease = source.choice([0.5, 2.0, 8.0])
        rows.append([min(int(source.expovariate(ease) * 2), top_k) for _ in range(heads)])
    return rows


def naive_expected_length(rows, tree: Tree) -> float:
    """Mean over positions of 1 + the longest prefix of the true path that is in the tree."""
    lengths = [
        1 + max([d for d in range(1, len(row) + 1) if tuple(row[:d]) in tree.choices], default=0) for row in rows
    ]
    return sum(lengths) / len(lengths)


@pytest.mark.parametrize("tree", [Tree(), chain(3), Tree.from_choices([(0,), (1,), (0, 2), (1, 0), (1, 0, 0)])])
def test_expected_length_is_the_mean_longest_path(tree):
    rows = random_rows(300)
    assert joint_ranks(rows).expected_length(tree) == pytest.approx(naive_expected_length(rows, tree))


def test_expected_length_of_a_chain_is_the_joint_prefix_not_a_product():
    ranks = joint_ranks([[0, 0], [0, 0], [4, 4], [4, 4]])
    assert ranks.expected_length(chain(2)) == 1 + 0.5 + 0.5  # marginals would give 1 + 0.5 + 0.25


def test_token_missed_by_one_head_ends_the_path():
    ranks = joint_ranks([[0, 4, 0], [0, -1, 0]])
    assert ranks.reached == {(0,): 2}


def test_counts_of_several_calls_add_up():
    rows = random_rows(200)
    ranks = joint_ranks(rows[:50])
    ranks.add(iter(rows[50:]))
    assert ranks == joint_ranks(rows)


def test_search_finds_the_best_tree_of_every_size():
    """Against all prefix-closed trees over 2 heads with top 3."""
    rows = random_rows(200, heads=2, top_k=3, seed=3)
    search = search_tree(joint_ranks(rows, top_k=3), 6)
    every = [(a,) for a in range(3)] + list(itertools.product(range(3), repeat=2))
    for nodes in range(1, 7):
        trees = [c for c in itertools.combinations(every, nodes - 1) if all(len(x) == 1 or x[:1] in c for x in c)]
        best = max(naive_expected_length(rows, Tree.from_choices(choices)) for choices in trees)
        assert search.expected_lengths[nodes - 1] == pytest.approx(best)
        assert naive_expected_length(rows, search.tree(nodes)) == pytest.approx(best)
        assert search.tree(nodes).num_nodes == nodes


def test_search_leaves_out_what_was_never_right():
    search = search_tree(joint_ranks([[0, 1], [0, 4], [4, 0]]), 64)
    assert search.choices == ((0,), (0, 1))
    assert search.expected_lengths == pytest.approx((1.0, 1 + 2 / 3, 2.0))
    assert search.tree(64).num_nodes == 3


def test_search_without_positions_or_nodes_is_refused():
    with pytest.raises(ValueError, match="0 calibration positions"):
        search_tree(JointRanks(4), 8)
    with pytest.raises(ValueError, match="0 calibration positions"):
        JointRanks(4).expected_length(chain(1))
    with pytest.raises(ValueError, match="a tree of 0 nodes"):
        search_tree(joint_ranks([[0]]), 0)


def test_search_over_a_hundred_thousand_positions_takes_seconds():
    rows = random_rows(100_000, heads=5, top_k=10)
    started = time.process_time()
    search = search_tree(joint_ranks(rows, top_k=10), 64)
    assert time.process_time() - started < SEARCH_LIMIT_S
    assert search.tree(64).num_nodes == 64


SEARCH = search_tree(joint_ranks([[0, 0]] * 50 + [[0, 1]] * 30 + [[1, 4]] * 10 + [[4, 4]] * 10), 5)


def test_expected_lengths_of_the_example():
    assert SEARCH.expected_lengths == pytest.approx((1.0, 1.8, 2.3, 2.6, 2.7))


def test_fastest_size_weighs_length_against_step_time():
    chosen = fastest_size(SEARCH, {1: 1.0, 2: 1.05, 3: 1.1, 4: 1.5, 5: 2.0}, plain_step_s=1.0)
    assert chosen.nodes == 3
    assert chosen.tokens_per_s == pytest.approx(2.3 / 1.1)
    assert chosen.reason.startswith(
        "3 nodes: 2.300 tokens per step, +109.1% against plain decoding; 5 nodes accept 2.700"
    )


def test_step_times_between_measured_sizes_are_interpolated():
    chosen = fastest_size(SEARCH, {1: 1.0, 5: 1.0}, plain_step_s=1.0)
    assert (chosen.nodes, chosen.tokens_per_s) == (5, pytest.approx(2.7))
    chosen = fastest_size(SEARCH, {2: 1.0, 4: 1.2}, plain_step_s=1.0)
    assert (chosen.nodes, chosen.tokens_per_s) == (4, pytest.approx(2.6 / 1.2))
    chosen = fastest_size(SEARCH, {2: 1.0, 4: 2.0}, plain_step_s=1.0)
    assert (chosen.nodes, chosen.tokens_per_s) == (2, pytest.approx(1.8))


def test_no_tree_is_advised_where_none_is_faster():
    chosen = fastest_size(SEARCH, {1: 1.9, 2: 2.0, 5: 4.0}, plain_step_s=1.0)
    assert (chosen.nodes, chosen.tokens_per_s) == (1, 1.0)
    assert chosen.reason.startswith("no tree: the best size, 2 nodes, is expected to be -10.0% against plain decoding")


def test_gain_within_the_measurement_error_is_no_gain():
    times = {2: 1.8 / 1.01}
    assert fastest_size(SEARCH, times, plain_step_s=1.0).nodes == 1
    assert fastest_size(SEARCH, times, plain_step_s=1.0, min_gain=0.005).nodes == 2


def test_sizes_outside_the_measured_ones_are_not_chosen():
    chosen = fastest_size(SEARCH, {8: 1.0, 16: 1.1}, plain_step_s=1.0)
    assert chosen.nodes == 1
    assert chosen.reason == "no tree: of 5 possible sizes none lies within the measured [8, 16]"


@pytest.mark.parametrize(("times", "plain"), [({}, 1.0), ({2: 0.0}, 1.0), ({2: 1.0}, -1.0)])
def test_times_that_cannot_be_are_refused(times, plain):
    with pytest.raises(ValueError, match="expected at least one, all above 0"):
        fastest_size(SEARCH, times, plain)
