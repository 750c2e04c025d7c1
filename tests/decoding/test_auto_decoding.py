"""Decoding whose tree is chosen step by step: its tokens, what it counts, and its time by a clock that the test drives."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB
from decoding_models import CYCLE, counting_heads, counting_model, fitted_heads, prompts, random_heads, varied_model

from axolotl_medusa.decoding import auto_decoding
from axolotl_medusa.decoding.auto_decoding import WARM_UP_S, head_ranks_of
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
    medusa.chooser()
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
    nodes, share, stats, reason = decoded(lambda nodes: 2.5, right)
    assert set(nodes) == {1} and share <= 1.02 and stats.acceptance_length == 1
    assert reason.startswith("plain decoding: no tree would gain 5%")


def test_heads_are_asked_seldom_and_about_many_positions_at_once():
    medusa = MedusaModel(counting_model(), counting_heads([False] * 3))
    medusa.base_model.config.max_position_embeddings = 1000
    machine = Machine(medusa, lambda nodes: 2.5)
    medusa.chooser()
    machine.counts = 0
    medusa.generate(torch.tensor([[3]]), None, 500, tree="auto")
    assert machine.counts == 5  # after 16, 32, 64, 128 and 256 tokens more


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
        medusa.chooser()
        used = []
        trees = [PLAIN, *medusa.chooser().trees]
        medusa.chooser().next = lambda used=used, trees=trees: used.append(0) or trees[len(used) % len(trees)]
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


@pytest.mark.parametrize(("step_s", "known"), [(0.001, 10), (0.2, 1), (5.0, 0)])
def test_warm_up_ends_in_time_and_leaves_what_it_measured(step_s, known):
    """A step that has begun is finished; a tree counts as measured after its second one."""
    medusa = MedusaModel(counting_model(), counting_heads([True] * 3))
    machine = Machine(medusa, lambda nodes: 1.0, plain_s=step_s)
    chooser = medusa.chooser()
    assert machine.now <= WARM_UP_S + step_s
    assert len(chooser._measured()) == min(known, len(chooser.trees))
    if known == 1:
        assert chooser._measured()[0][0] == 2, "the smallest tree comes first"
    assert medusa.chooser() is chooser


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": prompts()[0]}, "tree='auto' with a batch of 4, expected one prompt that is not compiled: name a tree"),
        ({"compile": True}, "tree='auto' with compile=True, expected one prompt that is not compiled: name a tree"),
        ({"acceptance": "typical"}, "tree='auto' with acceptance='typical', whose text depends on the tree"),
    ],
)
def test_what_auto_cannot_choose_for_is_refused(options, message, monkeypatch):
    monkeypatch.setattr(auto_decoding, "warm_up", None)
    medusa = MedusaModel(varied_model(), random_heads())
    with pytest.raises(ValueError, match=message):
        medusa.generate(options.pop("ids", prompts()[0][:1]), tree="auto", **options)


def test_default_of_python_stays_the_same_tree_every_time():
    model = varied_model()
    ids, mask = prompts()
    medusa = MedusaModel(model, random_heads())
    used = []
    run = medusa._decoding
    medusa._decoding = lambda *arguments: used.append(arguments[2]) or run(*arguments)
    medusa.generate(ids, mask, 4)
    assert used[0].num_nodes == 64 and medusa._chooser is None


def test_no_tree_is_deeper_than_the_heads():
    medusa = MedusaModel(counting_model(), counting_heads([True]))
    assert all(isinstance(tree, Tree) and tree.depth == 1 for tree in medusa.chooser().trees)
    assert medusa.chooser().trees[0] == chain(1)
