"""Acceptance rules decide the same on numpy's arrays as on torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from axolotl_medusa.decoding.acceptance import accept_greedy, accept_rejection, accept_typical, tree_arrays
from axolotl_medusa.decoding.arrays import NumpyArrays
from axolotl_medusa.decoding.torch_arrays import TorchArrays
from axolotl_medusa.decoding.tree import Tree, default_tree, likely_part

TREES = [Tree(), default_tree(3, 4), default_tree(3, 20)]
RULES = {
    "greedy": accept_greedy,
    "typical": lambda *of: accept_typical(*of, temperature=0.7, epsilon=0.05, delta=0.2, sample=False),
}
FALSE_ALARM = 1e-4


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.num_nodes)
@pytest.mark.parametrize("rule", RULES)
def test_rules_decide_the_same_on_both(rule, tree):
    torch.manual_seed(0)
    logits = torch.randn(200, tree.num_nodes, 6) * 3
    logits[:, :, 5] = -torch.inf
    tokens = torch.randint(0, 6, (200, tree.num_nodes))
    theirs = RULES[rule](logits, tokens, tree_arrays(tree, TorchArrays(torch.device("cpu"))))
    ours = RULES[rule](logits.numpy(), tokens.numpy(), tree_arrays(tree, NumpyArrays()))
    assert ours.node.tolist() == theirs.node.tolist()
    assert ours.token.tolist() == theirs.token.tolist()
    assert tree.num_nodes == 1 or len(set(ours.node.tolist())) > 1


def test_rejection_on_numpy_draws_from_the_distribution():
    shares, rows = np.array([0.5, 0.3, 0.15, 0.05]), 3000
    tree = default_tree(1, 3)
    logits = np.log(shares)[None, None].repeat(rows, 0).repeat(tree.num_nodes, 1)
    tokens = np.array([[9, 1, 3]]).repeat(rows, 0)
    accepted = accept_rejection(logits, tokens, tree_arrays(tree, NumpyArrays(3)), temperature=1.0)
    first = np.where(accepted.node == 0, accepted.token, tokens[0][accepted.node])
    assert set(accepted.node.tolist()) == {0, 1, 2}
    assert chisquare(np.bincount(first, minlength=4), shares * rows).pvalue > FALSE_ALARM
    assert (
        chisquare(np.bincount(accepted.token[accepted.node == 1], minlength=4), shares * sum(accepted.node == 1)).pvalue
        > FALSE_ALARM
    )


def test_numpy_never_draws_what_has_no_weight():
    drawn = NumpyArrays(0).draw(np.array([[0.0, 1.0, 0.0, 2.0, 0.0]]).repeat(2000, 0))
    assert set(drawn.tolist()) == {1, 3}


def test_likely_part_keeps_paths_whose_product_is_large_enough():
    tree = Tree.from_choices([(0,), (1,), (0, 0), (0, 1), (1, 0)])
    log_p = np.log([[0.6, 0.2], [0.5, 0.4]]).tolist()
    assert likely_part(tree, log_p, 0.0) == tree
    assert likely_part(tree, log_p, 0.2).choices == ((0,), (1,), (0, 0), (0, 1))
    assert likely_part(tree, log_p, 0.25).choices == ((0,), (0, 0))
    assert likely_part(tree, log_p, 0.9) == Tree()
    assert likely_part(tree, log_p[:1], 0.1).choices == ((0,), (1,))
