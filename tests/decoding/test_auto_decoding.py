"""Decoding whose tree is chosen step by step: its tokens, what it counts, and its time by a clock that the test drives."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB
from decoding_models import CYCLE, counting_heads, counting_model, fitted_heads, prompts, random_heads, varied_model

from axolotl_medusa.decoding.auto_decoding import head_ranks_of
from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.tree import Tree, chain
from axolotl_medusa.decoding.tree_chooser import PLAIN, POSITIONS
from axolotl_medusa.measuring.calibration import head_ranks

NEW = 90
PLAIN_S = 0.01


class Machine:
    """A clock that only forwards move: `plain_s` for one token, `ratio` times that for a tree, `count` times for all heads."""

    def __init__(self, medusa: MedusaModel, ratio, count=0.3, plain_s=PLAIN_S):
        self.now, self.nodes, self.counts = 0.0, [], 0
        forward, draft_logits = medusa.base_model.model.forward, medusa.draft_logits

        def timed_forward(**inputs):
            nodes = inputs["input_ids"].shape[1]
            self.nodes.append(nodes)
            self.now += plain_s * (1 if nodes == 1 else ratio(nodes))
            return forward(**inputs)

        def timed_heads(hidden, num_heads):
            if len(hidden) == POSITIONS:
                self.counts += 1
                self.now += plain_s * count
            return draft_logits(hidden, num_heads)

        medusa.base_model.model.forward, medusa.draft_logits = timed_forward, timed_heads
        medusa._clock = lambda: self.now


def decoded(ratio, right, new=200, answers=1):
    """Nodes of every step of the last answer, the share of plain decoding's time that it took, the stats and the reason."""
    medusa = MedusaModel(counting_model(), counting_heads(right))
    medusa.base_model.config.max_position_embeddings = 1000
    machine = Machine(medusa, ratio)
    for _ in range(answers):
        machine.nodes.clear()
        begin = machine.now
        prompt = torch.tensor([[3]])
        tokens, stats = medusa.generate(prompt, None, new, tree="auto", return_stats=True)
        assert tokens[0].tolist() == [(3 + i) % CYCLE for i in range(1 + new)]
    return machine.nodes, (machine.now - begin) / (new * PLAIN_S), stats, medusa.chooser().reason()


def test_right_heads_are_used_where_their_steps_cost_little():
    nodes, share, stats, reason = decoded(lambda nodes: 1 + nodes / 100, [True] * 3)
    assert nodes[:17] == [1] * 17, "the heads are asked about the first 16 tokens"
    assert set(nodes[25:]) == {4}, "a chain of three after that"
    assert share < 0.45 and stats.acceptance_length > 2.5
    assert reason.startswith("a chain of 3 in ") and "4.00 tokens a step at the cost of 1.04 plain steps" in reason


def test_second_answer_begins_with_the_tree_of_the_first():
    nodes, share, _, _ = decoded(lambda nodes: 1 + nodes / 100, [True] * 3, answers=2)
    assert nodes[:2] == [1, 1] and set(nodes[2:]) == {4} and share < 0.3


@pytest.mark.parametrize("right", [[False] * 3, [True, False, False]])
def test_plain_decoding_is_kept_where_trees_cost_more_than_they_accept(right):
    nodes, share, _, reason = decoded(lambda nodes: 2.5, right)
    assert len(nodes) - nodes.count(1) <= 2 and share <= 1.02
    assert reason.startswith("plain decoding: no tree would gain 5%")


def test_heads_are_asked_seldom_and_about_many_positions_at_once():
    medusa = MedusaModel(counting_model(), counting_heads([False] * 3))
    medusa.base_model.config.max_position_embeddings = 1000
    machine = Machine(medusa, lambda nodes: 2.5)
    medusa.generate(torch.tensor([[3]]), None, 500, tree="auto")
    assert machine.counts == 3  # after 16, 64 and 256 tokens more


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("sample", [False, True])
def test_tokens_are_those_of_plain_decoding_whatever_is_chosen(right, sample):
    """Trees of all sizes take turns; at a temperature near 0 sampling is greedy."""
    model = varied_model(eos_token_id=None)
    ids, mask = prompts()
    heads = fitted_heads(model, ids, mask, tokens=60) if right else random_heads()
    for row in range(3):
        prompt = ids[row][mask[row].bool()][None]
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)
        medusa = MedusaModel(model, heads)
        used = []
        trees = [PLAIN, *medusa.chooser().trees]
        medusa.chooser().next = lambda used=used, trees=trees: used.append(0) or trees[(len(used) - 1) % len(trees)]
        options = dict(do_sample=sample, temperature=1e-4 if sample else 1.0)
        found, stats = medusa.generate(prompt, None, NEW, tree="auto", eos_token_id=[], return_stats=True, **options)
        assert torch.equal(found, expected)
        assert (stats.acceptance_length > 1.2) == right and len(used) == stats.batch_forwards - 1


def test_tokens_are_those_of_plain_decoding_by_a_real_clock():
    model = varied_model()
    ids, mask = prompts()
    medusa = MedusaModel(model, fitted_heads(model, ids, mask))
    single = ids[:1]
    expected = model.generate(single, attention_mask=torch.ones_like(single), max_new_tokens=NEW, do_sample=False)
    for _ in range(2):
        assert torch.equal(medusa.generate(single, None, NEW, tree="auto"), expected)


def test_ranks_are_those_that_calibration_counts():
    model = varied_model()
    ids, mask = prompts()
    medusa = MedusaModel(model, fitted_heads(model, ids, mask))
    prompt, new = ids[0].tolist(), medusa.generate(ids[:1], None, 30, tree="none", eos_token_id=[])[0, 9:].tolist()
    expected = [row for row in head_ranks(medusa, prompt, new, top_k=VOCAB) if -1 not in row]
    asked = []

    class Recorder:
        trees = ()

        def begin(self, _): ...
        def stepped(self, *_): ...
        def next(self):
            return PLAIN

        def wants_count(self, positions):
            return positions == POSITIONS

        def counted(self, paths, _):
            asked.extend(paths)

    medusa._chooser = Recorder()
    medusa.generate(ids[:1], None, 30, tree="auto", eos_token_id=[])
    assert len(asked) == POSITIONS  # and less than as many again are left of 30
    assert asked == expected[:POSITIONS]


def test_ranks_count_what_is_better():
    medusa = MedusaModel(counting_model(), counting_heads([True, False]))
    hidden = torch.eye(CYCLE, 32)[:2]  # after tokens 0 and 1
    best = medusa.draft_logits(hidden, 2).argmax(-1).tolist()
    assert best == [[2, 4], [3, 5]]
    assert head_ranks_of(medusa, hidden, best) == [[0, 0], [0, 0]]
    last = CYCLE - 1  # all others tie, and might come before it
    assert head_ranks_of(medusa, hidden, [[9, 4], [3, 9]]) == [[last, 0], [0, last]]


@pytest.mark.parametrize("new", [5, 20, 128, 400])
@pytest.mark.parametrize("right", [[False] * 3, [True, False, False]])
def test_first_answer_of_any_length_takes_at_most_2_percent_more(new, right):
    """Nothing is timed before it: what is spent to find out is within its own time."""
    _, share, _, _ = decoded(lambda nodes: 1 + 0.9 * (nodes - 1), right, new=new)
    assert share <= 1.02


def test_default_is_chosen_for_one_prompt_and_the_same_seed_draws_the_same_tokens_with_every_tree():
    model = varied_model()
    ids, mask = prompts()
    heads = fitted_heads(model, ids, mask)
    drawn = []
    for tree in (None, "auto", "none", "chain", "default"):
        medusa = MedusaModel(model, heads)
        torch.manual_seed(5)
        drawn.append(medusa.generate(ids[:1], None, NEW, tree=tree, do_sample=True, temperature=0.7, eos_token_id=[]))
        assert (medusa._chooser is not None) is (tree in (None, "auto"))
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])
    torch.manual_seed(6)
    assert not torch.equal(drawn[0], MedusaModel(model, heads).generate(ids[:1], None, NEW, do_sample=True))


@pytest.mark.parametrize("tree", [None, "auto"])
@pytest.mark.parametrize("reason", ["batch", "compile"])
def test_what_no_tree_can_be_chosen_for_is_decoded_plainly_and_said_once(tree, reason, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    model = varied_model()
    ids, mask = prompts(4 if reason == "batch" else 1)
    medusa = MedusaModel(model, fitted_heads(model, *prompts()))
    for _ in range(2):
        tokens, stats = medusa.generate(ids, mask, 9, tree=tree, compile=reason == "compile", return_stats=True)
        assert stats.acceptance_length == 1
        assert torch.equal(tokens, medusa.generate(ids, mask, 9, tree="default"))
    said = {
        "batch": "plain decoding: trees are tried on single prompts, not on batches; name one with tree=",
        "compile": "plain decoding: a compiled forward has one tree for all steps, so none is tried; "
        "name one with --tree (tree=)",
    }
    assert caplog.messages == [said[reason]]


def test_typical_acceptance_has_one_tree_as_its_text_depends_on_it():
    model = varied_model()
    ids, mask = prompts()
    medusa = MedusaModel(model, fitted_heads(model, ids, mask))
    options = dict(acceptance="typical", temperature=2.0, epsilon=0.5, eos_token_id=[])
    found = medusa.generate(ids, mask, 20, **options)
    assert torch.equal(found, medusa.generate(ids, mask, 20, tree="default", **options))
    assert not torch.equal(found, medusa.generate(ids, mask, 20, tree="none", **options))
    with pytest.raises(ValueError, match="tree='auto' with acceptance='typical', whose text depends on the tree"):
        medusa.generate(ids[:1], mask[:1], tree="auto", **options)


def test_no_tree_is_deeper_than_the_heads():
    medusa = MedusaModel(counting_model(), counting_heads([True]))
    assert all(isinstance(tree, Tree) and tree.depth == 1 for tree in medusa.chooser().trees)
    assert medusa.chooser().trees[0] == chain(1)
