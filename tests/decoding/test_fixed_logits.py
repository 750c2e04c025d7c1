"""Medusa decoding with a model and heads of fixed logits: what is accepted, and where rows stop."""

from __future__ import annotations

import pytest
import torch
from decoding_models import CYCLE, counting_heads, counting_model

from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.tree import Tree

BUSHY = Tree.from_choices([(0,), (1,), (0, 0), (0, 1)])


def plain(model, ids, mask, new, **options):
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **options)


@pytest.fixture(scope="module")
def counting():
    return counting_model()


def counted(start: int, new: int) -> list[int]:
    return [(start + i) % CYCLE for i in range(1 + new)]


@pytest.mark.parametrize(
    ("right", "accepted"),
    [
        ([True] * 5, 5),
        ([False] * 5, 0),
        ([True, True, False, True, True], 2),
        ([False, True, True, True, True], 0),
    ],
    ids=["always", "never", "up to a wrong head", "first head wrong"],
)
def test_heads_of_fixed_logits_are_accepted_as_far_as_they_are_right(counting, right, accepted):
    medusa = MedusaModel(counting, counting_heads(right))
    new = 1 + 4 * (accepted + 1)
    tokens, stats = medusa.generate(torch.tensor([[3]]), None, new, tree="chain", return_stats=True)
    assert tokens[0].tolist() == counted(3, new)
    assert stats.acceptance_lengths == {accepted + 1: 4}
    assert (stats.forward_passes, stats.emitted_tokens) == (5, new)
    assert stats.acceptance_length == new / 5


def test_draft_tokens_of_lower_rank_are_accepted_where_the_tree_has_them(counting):
    """Head 0 puts the right token second."""
    heads = counting_heads([False, True])
    with torch.no_grad():
        heads.output_layer(0).weight.add_(counting_heads([True]).output_layer(0).weight * 0.5)
    medusa = MedusaModel(counting, heads)
    for choices, accepted in ([(0,), (0, 0)], 0), ([(0,), (1,), (1, 0)], 2):
        _, stats = medusa.generate(torch.tensor([[3]]), None, 7, tree=Tree.from_choices(choices), return_stats=True)
        assert set(stats.acceptance_lengths) == {accepted + 1}


def test_token_zero_is_never_accepted_from_a_leaf_that_is_not_there(counting):
    """At 14 and 15 the model predicts 15 and 0; a tree of wrong drafts must emit one token per step there too."""
    medusa = MedusaModel(counting, counting_heads([False, False]))
    tokens, stats = medusa.generate(torch.tensor([[14]]), None, 6, tree=BUSHY, return_stats=True)
    assert tokens[0].tolist() == counted(14, 6)
    assert stats.acceptance_lengths == {1: 5}


@pytest.mark.parametrize("distance", range(1, 14))
def test_row_stops_at_an_eos_inside_an_accepted_path(counting, distance):
    """Every step emits six tokens; the EOS token stands at every place of a step in turn."""
    medusa = MedusaModel(counting, counting_heads([True] * 5))
    eos = (2 + distance) % CYCLE
    tokens, stats = medusa.generate(torch.tensor([[2]]), None, 50, tree="chain", eos_token_id=eos, return_stats=True)
    assert tokens[0].tolist() == counted(2, distance)
    assert stats.emitted_tokens == distance
    assert torch.equal(tokens, plain(counting, torch.tensor([[2]]), None, 50, eos_token_id=eos, pad_token_id=0))


@pytest.mark.parametrize("new", range(1, 15))
def test_generation_stops_at_max_new_tokens_exactly(counting, new):
    medusa = MedusaModel(counting, counting_heads([True] * 5))
    tokens, stats = medusa.generate(torch.tensor([[2]]), None, new, tree="chain", return_stats=True)
    assert tokens[0].tolist() == counted(2, new)
    assert stats.forward_passes == 1 + -(-(new - 1) // 6)
    assert stats.emitted_tokens == new


def test_every_row_stops_at_its_own_eos_and_is_padded(counting):
    medusa = MedusaModel(counting, counting_heads([True, True, False]))
    ids = torch.tensor([[0, 3, 4], [0, 0, 8], [5, 6, 7], [10, 11, 12]])
    mask = torch.tensor([[0, 1, 1], [0, 0, 1], [1, 1, 1], [1, 1, 1]])
    options = dict(eos_token_id=[9, 14], pad_token_id=1)
    expected = plain(counting, ids, mask, 12, **options)
    for tree in ("none", "chain", "default"):
        assert torch.equal(medusa.generate(ids, mask, 12, tree=tree, **options), expected)
    assert expected[1].tolist()[3:] == [9, 1, 1, 1, 1]


def test_rows_that_stopped_are_forwarded_no_more(counting, monkeypatch):
    medusa = MedusaModel(counting, counting_heads([False]))
    rows = []
    forward = counting.model.forward
    monkeypatch.setattr(
        counting.model, "forward", lambda **inputs: rows.append(len(inputs["input_ids"])) or forward(**inputs)
    )
    _, stats = medusa.generate(
        torch.tensor([[5], [7]]), None, 20, tree="chain", eos_token_id=9, pad_token_id=0, return_stats=True
    )
    assert rows == [2, 2, 1, 1]
    assert (stats.forward_passes, stats.batch_forwards, stats.emitted_tokens) == (6, 4, 6)
