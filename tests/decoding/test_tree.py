"""Candidate trees: what a set of choices means, what is refused, presets and files."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from axolotl_medusa.decoding.tree import (
    TYPICAL_TOP1,
    Tree,
    chain,
    default_tree,
    named_tree,
    read_tree,
    typical_accuracy,
    write_tree,
)

SMALL = Tree.from_choices([(1,), (0,), (0, 1), (0, 0), (1, 0), (0, 1, 2)])


def test_choices_are_sorted_by_depth_and_rank():
    assert SMALL.choices == ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 2))
    assert (SMALL.num_nodes, SMALL.depth, SMALL.top_k) == (7, 3, 3)


def test_structure_of_a_small_tree():
    assert SMALL.parents == (0, 0, 0, 1, 1, 2, 4)
    assert SMALL.depths == (0, 1, 1, 2, 2, 2, 3)
    assert SMALL.paths == ((0,), (0, 1), (0, 2), (0, 1, 3), (0, 1, 4), (0, 2, 5), (0, 1, 4, 6))
    assert SMALL.picks == ((0, 0), (0, 1), (1, 0), (1, 1), (1, 0), (2, 2))


@pytest.mark.parametrize("tree", [Tree(), chain(4), SMALL, default_tree()], ids=["none", "chain", "small", "default"])
def test_mask_has_every_node_and_its_ancestors_only(tree):
    paths = [(), *tree.choices]
    for i, j in itertools.product(range(tree.num_nodes), repeat=2):
        assert tree.attention_mask[i][j] == (paths[i][: len(paths[j])] == paths[j])


def test_candidates_are_one_token_per_node():
    tokens = [[10, 11, 12], [20, 21, 22], [30, 31, 32]]
    assert SMALL.candidates(7, tokens) == [7, 10, 11, 20, 21, 20, 32]


def test_empty_tree_is_the_root_alone():
    tree = Tree.from_choices([])
    assert (tree.num_nodes, tree.depth, tree.top_k, tree.parents, tree.attention_mask) == (1, 0, 0, (0,), ((True,),))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([(0,), ()], r"has the choice \(\), expected ranks"),
        ([(0,), (-1,)], r"has the choice \(-1,\), expected ranks"),
        ([(0,), (0, True)], r"has the choice \(0, True\), expected ranks"),
        ([[0], [0.5]], r"has the choice \[0.5\], expected ranks"),
        (["0"], r"has the choice '0', expected ranks"),
        ([3], r"has the choice 3, expected ranks"),
        ([(0,), (0,)], r"has the choice \[0\] twice"),
        ([(0,), (1, 0)], r"has the choice \[1, 0\] without its parent \[1\]"),
    ],
)
def test_invalid_choices_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        Tree.from_choices(choices)


def test_tree_that_the_heads_cannot_fill_is_refused():
    SMALL.check_fits(3, 3)
    with pytest.raises(ValueError, match="depth 3, but there are 2 heads"):
        SMALL.check_fits(2)
    with pytest.raises(ValueError, match="rank 2 of a head, but only ranks 0 to 1 are available"):
        SMALL.check_fits(3, 2)


def test_chain_takes_the_best_token_of_each_head():
    assert chain(3).choices == ((0,), (0, 0), (0, 0, 0))
    assert chain(0) == Tree()
    with pytest.raises(ValueError, match="-1 draft tokens, expected 0 or more"):
        chain(-1)


def test_typical_accuracy_is_near_the_published_top5():
    published_top5 = (0.780, 0.562, 0.417, 0.340, 0.300)
    for head, (top1, top5) in enumerate(zip(TYPICAL_TOP1, published_top5, strict=True)):
        assert typical_accuracy(head, 0) == top1
        assert sum(typical_accuracy(head, rank) for rank in range(5)) == pytest.approx(top5, abs=0.02)


@pytest.mark.parametrize(
    ("num_heads", "nodes", "top_k"), [(5, 64, 10), (3, 64, 10), (5, 17, 2), (2, 1, 10), (7, 30, 10)]
)
def test_default_tree_has_the_likeliest_nodes(num_heads, nodes, top_k):
    def likelihood(choice):
        return math.prod(typical_accuracy(head, rank) for head, rank in enumerate(choice))

    depth = min(num_heads, 5)
    every = [c for d in range(1, min(depth, 4) + 1) for c in itertools.product(range(top_k), repeat=d)]
    best = sorted(map(likelihood, every), reverse=True)[: nodes - 1]
    tree = default_tree(num_heads, nodes, top_k)
    assert sorted(map(likelihood, tree.choices), reverse=True) == pytest.approx(best)
    assert tree.num_nodes == nodes
    tree.check_fits(num_heads, top_k)


def test_default_tree_stops_where_nodes_run_out():
    assert default_tree(num_heads=2, nodes=64, top_k=2).num_nodes == 1 + 2 + 4


def test_default_tree_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a tree of 0 nodes from top 10 of 5 heads"):
        default_tree(nodes=0)


def test_tree_file_is_read_as_written(tmp_path):
    file = tmp_path / "tree.json"
    write_tree(file, SMALL, expected_length=2.5)
    assert read_tree(file) == SMALL
    assert json.loads(file.read_text())["expected_length"] == 2.5
    assert list(tmp_path.iterdir()) == [file]


def test_bare_list_of_choices_is_read(tmp_path):
    (tmp_path / "choices.json").write_text("[[0], [0, 0], [1]]")
    assert read_tree(tmp_path / "choices.json").choices == ((0,), (1,), (0, 0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[0], ", "is not JSON"),
        ('{"nodes": 3}', "holds no list of choices"),
        ("7", "holds no list of choices"),
        ("[[0], [1, 0]]", r"bad.json: tree has the choice \[1, 0\] without its parent"),
        (None, "cannot be read"),
    ],
)
def test_file_that_is_no_tree_is_refused(tmp_path, content, message):
    file = tmp_path / "bad.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_tree(file)
    assert "\n" not in str(error.value)


def test_names_of_trees(tmp_path):
    write_tree(tmp_path / "t.json", SMALL)
    assert named_tree("none", 3) == Tree()
    assert named_tree("chain", 3) == chain(3)
    assert named_tree("chain-2", 3) == chain(2)
    assert named_tree("default", 3) == default_tree(3)
    assert named_tree("default-16", 3) == default_tree(3, 16)
    assert named_tree(tmp_path / "t.json", 3) == SMALL


@pytest.mark.parametrize("name", ["chains", "chain-x", "default--1", "/no/such/file.json", ""])
def test_unknown_tree_is_refused(name):
    with pytest.raises(ValueError, match=f"unknown tree {name}: expected none, chain"):
        named_tree(name, 3)


def test_named_tree_deeper_than_the_heads_is_refused():
    with pytest.raises(ValueError, match="depth 4, but there are 3 heads"):
        named_tree("chain-4", 3)
