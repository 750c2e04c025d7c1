"""Acceptance rules on logits that are written down."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.stats import chisquare

from axolotl_medusa.decoding.acceptance import (
    accept_greedy,
    accept_rejection,
    accept_typical,
    acceptance_rule,
    tree_tensors,
)
from axolotl_medusa.decoding.tree import Tree, default_tree

CPU = torch.device("cpu")
TREE = tree_tensors(Tree.from_choices([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0)]), CPU)
"""Nodes: 0 root; 1, 2 below it; 3, 4 below 1; 5 below 2; 6 below 4."""

TOKENS = [9, 1, 2, 3, 4, 3, 5]
VOCAB = 10

FALSE_ALARM = 1e-4
"""Chance that a chi-square test would fail with a correct rule and another seed."""


def logits_that_want(*wanted: int) -> torch.Tensor:
    """Logits `[1, 7, vocab]` whose argmax at node i is wanted[i]."""
    return torch.nn.functional.one_hot(torch.tensor([wanted]), VOCAB).float() * 10


@pytest.mark.parametrize(
    ("wanted", "node", "token"),
    [
        ((7, 3, 3, 5, 5, 5, 8), 0, 7),  # nothing after the root
        ((1, 7, 3, 5, 5, 5, 8), 1, 7),
        ((2, 3, 7, 5, 5, 5, 8), 2, 7),
        ((2, 3, 3, 5, 5, 6, 8), 5, 6),
        ((1, 3, 3, 6, 5, 5, 8), 3, 6),
        ((1, 4, 3, 6, 5, 5, 8), 6, 8),  # to the end
        ((1, 7, 3, 6, 5, 5, 8), 1, 7),  # what fits below a rejected node does not count
    ],
)
def test_greedy_accepts_the_path_of_argmaxes(wanted, node, token):
    accepted = accept_greedy(logits_that_want(*wanted), torch.tensor([TOKENS]), TREE)
    assert (accepted.node.item(), accepted.token.item()) == (node, token)


def test_greedy_decides_every_row_for_itself():
    logits = torch.cat([logits_that_want(7, *[0] * 6), logits_that_want(1, 4, 3, 6, 5, 5, 8)])
    accepted = accept_greedy(logits, torch.tensor([TOKENS, TOKENS]), TREE)
    assert (accepted.node.tolist(), accepted.token.tolist()) == ([0, 6], [7, 8])


def test_greedy_never_accepts_a_node_that_is_not_there():
    """Padded leaves of token 0 are what the first public decoder accepts when the model predicts token 0."""
    accepted = accept_greedy(logits_that_want(*[0] * 7), torch.tensor([TOKENS]), TREE)
    assert (accepted.node.item(), accepted.token.item()) == (0, 0)


def test_every_rule_works_on_the_root_alone():
    tree = tree_tensors(Tree(), CPU)
    logits, tokens = logits_that_want(4), torch.tensor([[9]])
    typical = dict(temperature=1.0, epsilon=0.09, delta=0.3)
    for accepted in (
        accept_greedy(logits, tokens, tree),
        accept_typical(logits, tokens, tree, **typical, sample=False),
        accept_typical(logits, tokens, tree, **typical, sample=True),
        accept_rejection(logits * 10, tokens, tree, temperature=1.0),
    ):
        assert (accepted.node.item(), accepted.token.item()) == (0, 4)


def typical(probabilities: list[float], token: int, *, temperature=1.0, epsilon=0.09, delta=0.3) -> bool:
    """Whether typical acceptance takes `token` after a root with these probabilities."""
    tree = tree_tensors(Tree.from_choices([(0,)]), CPU)
    logits = torch.tensor(probabilities).log().expand(1, 2, -1)
    settings = dict(temperature=temperature, epsilon=epsilon, delta=delta)
    return bool(accept_typical(logits, torch.tensor([[0, token]]), tree, **settings, sample=False).node.item())


def test_typical_threshold_is_the_smaller_of_epsilon_and_entropy():
    sure = [0.9, 0.085, 0.015]  # entropy 0.367: δ·exp(-H) = 0.208, so ε = 0.09 rules
    assert not typical(sure, 1)
    assert typical(sure, 1, epsilon=0.084)
    flat = [1 / 16] * 16  # entropy log 16: δ·exp(-H) = 0.3 / 16
    assert typical(flat, 3)
    assert typical(flat, 3, delta=0.99)
    assert not typical(flat, 3, delta=1.0)


def test_typical_acceptance_follows_the_temperature():
    sure = [0.9, 0.085, 0.015]
    assert typical(sure, 1, temperature=1.5)
    assert not typical([0.6, 0.3, 0.1], 2, temperature=0.5)


def test_typical_takes_the_longest_path_and_of_those_the_likeliest():
    p = torch.full((1, 7, VOCAB), 1e-6)
    p[0, 0, 1], p[0, 0, 2] = 0.6, 0.4
    p[0, 1, 3], p[0, 1, 7] = 0.3, 0.7
    p[0, 2, 3], p[0, 2, 7] = 0.8, 0.2
    p[0, 3:, 6] = 1.0
    settings = dict(temperature=1.0, epsilon=0.09, delta=0.3, sample=False)
    assert accept_typical(p.log(), torch.tensor([TOKENS]), TREE, **settings).node.item() == 5  # 0.4·0.8 > 0.6·0.3
    p[0, 1, 3], p[0, 1, 4] = 1e-6, 0.3
    p[0, 4, 5] = 1.0
    accepted = accept_typical(p.log(), torch.tensor([TOKENS]), TREE, **settings)
    assert (accepted.node.item(), accepted.token.item()) == (6, 6)  # 0.6·0.3·0.5 is less, but longer


def test_typical_sampling_draws_only_what_it_would_accept():
    probabilities = torch.tensor([0.55, 0.3, 0.1, 0.05])  # the threshold is 0.09
    logits = probabilities.log().expand(4000, 1, -1)
    torch.manual_seed(0)
    settings = dict(temperature=1.0, epsilon=0.09, delta=0.3, sample=True)
    drawn = accept_typical(logits, torch.zeros(4000, 1, dtype=torch.long), tree_tensors(Tree(), CPU), **settings).token
    counts = torch.bincount(drawn, minlength=4)
    assert counts[3] == 0
    assert chisquare(counts[:3], 4000 * (probabilities[:3] / 0.95).double().numpy()).pvalue > FALSE_ALARM


def test_typical_sampling_of_a_flat_distribution_can_draw_every_token():
    torch.manual_seed(0)
    logits, tokens = torch.zeros(200, 1, 4), torch.zeros(200, 1, dtype=torch.long)
    settings = dict(temperature=1.0, epsilon=0.5, delta=1.0, sample=True)  # the threshold is every token's probability
    assert set(accept_typical(logits, tokens, tree_tensors(Tree(), CPU), **settings).token.tolist()) == {0, 1, 2, 3}


def test_rejection_sampling_walks_the_tree_with_the_targets_probabilities():
    """Frequencies of (last node, own token) over all outcomes, false alarms at FALSE_ALARM."""
    torch.manual_seed(0)
    temperature, draws = 0.8, 20_000
    logits = torch.randn(1, 7, VOCAB)
    p = torch.softmax(logits[0].double() / temperature, -1)
    children = {0: [1, 2], 1: [3, 4], 2: [5], 4: [6]}
    expected = {}
    for node, path in enumerate(TREE.tree.paths):
        reach = math.prod(float(p[parent, TOKENS[child]]) for parent, child in itertools.pairwise(path))
        for token in range(VOCAB):
            if token not in [TOKENS[child] for child in children.get(node, [])]:
                expected[node, token] = reach * float(p[node, token])
    assert sum(expected.values()) == pytest.approx(1)
    rows = torch.tensor([TOKENS]).expand(draws, -1)
    accepted = accept_rejection(logits.expand(draws, -1, -1), rows, TREE, temperature=temperature)
    found = dict.fromkeys(expected, 0)
    for outcome in zip(accepted.node.tolist(), accepted.token.tolist(), strict=True):
        found[outcome] += 1
    likely = [outcome for outcome in expected if expected[outcome] * draws >= 5]
    counts = [found[outcome] for outcome in likely] + [draws - sum(found[outcome] for outcome in likely)]
    chances = [expected[outcome] * draws for outcome in likely]
    assert chisquare(counts, [*chances, draws - sum(chances)]).pvalue > FALSE_ALARM


def test_structure_as_tensors_is_the_trees():
    tree = default_tree()
    tensors = tree_tensors(tree, CPU)
    assert tensors.parents.tolist() == list(tree.parents)
    assert tensors.depths.tolist() == list(tree.depths)
    assert tensors.ancestors.tolist() == [list(row) for row in tree.attention_mask]
    assert list(zip(tensors.heads.tolist(), tensors.ranks.tolist(), strict=True)) == list(tree.picks)
    for node, children in enumerate(tensors.children.tolist()):
        assert [child for child in children if child] == [i for i, p in enumerate(tree.parents) if p == node and i]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("greedy", True, 1.0, 0.09, 0.3), "acceptance='greedy' with do_sample=True"),
        (("rejection", False, 1.0, 0.09, 0.3), "acceptance='rejection' with do_sample=False"),
        (("nucleus", True, 1.0, 0.09, 0.3), "acceptance is 'nucleus', expected 'greedy', 'typical' or 'rejection'"),
        ((None, True, 0.0, 0.09, 0.3), "temperature is 0.0, expected above 0"),
        (("typical", True, float("nan"), 0.09, 0.3), "temperature is nan"),
        (("typical", True, 1.0, 0.0, 0.3), "epsilon is 0.0 and delta is 0.3"),
        (("typical", True, 1.0, 0.09, 1.5), "epsilon is 0.09 and delta is 1.5"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        acceptance_rule(*settings)


def test_rule_without_a_name_is_greedy_or_rejection():
    assert acceptance_rule(None, False, 1.0, 0.09, 0.3) is accept_greedy
    rule = acceptance_rule(None, True, 0.5, 0.09, 0.3)
    assert (rule.func, rule.keywords) == (accept_rejection, {"temperature": 0.5})
