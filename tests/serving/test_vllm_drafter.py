"""The drafter under a fake vLLM: what it drafts against heads that run one by one, and what it learns from steps."""

from __future__ import annotations

import pytest
import torch
from drafter_heads import HEADS, HIDDEN, VOCAB, export_for_vllm, write
from fake_vllm import CONTEXT, Target, fake_vllm, step, vllm_config

from axolotl_medusa.serving.draft_plan import StepTimes, calibrate, read_plan, write_plan
from axolotl_medusa.serving.heads_drafter import OneRank
from axolotl_medusa.vllm_drafter import MedusaDrafter


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Builds a runner with a drafter of random heads; returns both, and the heads as training has them."""

    def start(form="shared", export=False, layers=1, drafts=HEADS, ranks=None, **additional):
        runner = fake_vllm(monkeypatch)()
        heads = write(tmp_path / "heads", form, layers)
        directory = export_for_vllm(tmp_path / "heads", tmp_path / "export") if export else tmp_path / "heads"
        additional = {"medusa_adaptive": False, **additional}
        runner.drafter = MedusaDrafter(vllm_config(directory, drafts, **additional))
        runner.target = Target()
        runner.drafter.take_heads(runner.target, ranks or OneRank())
        return runner, heads

    return start


def naive_drafts(heads, target, state, count):
    """What the heads guess after one hidden state, one after the other."""
    drafts = []
    with torch.no_grad():
        for index in range(count):
            layer = heads.output_layer(index) or target.lm_head
            drafts.append(int(layer(heads.hidden(index, state)).argmax()))
    return drafts


@pytest.mark.parametrize("export", [False, True])
@pytest.mark.parametrize("form", ["shared", "separate"])
@pytest.mark.parametrize("layers", [1, 2])
def test_drafts_are_the_heads_own_guesses(serve, form, export, layers):
    runner, heads = serve(form, export, layers)
    states = torch.randn(6, HIDDEN)
    # Requests with 2, 0, 1 and 0 drafts: one accepted; nothing to accept; rejected; a prompt that is not at its end.
    found = step(runner, "abcd", [[1, 2], [3], [4], []], [2, 0, 1, 0], torch.cat([states, torch.zeros(1, HIDDEN)]))
    expected = [naive_drafts(heads, runner.target, states[row], HEADS) for row in (1, 3, 4)]
    assert found == [*expected, []]


def test_output_layer_runs_once_for_all_heads_and_requests(serve):
    runner, _ = serve("shared")
    step(runner, "abc", [[1], [2], [3]], [0, 0, 0], torch.randn(3, HIDDEN))
    assert runner.target.calls == [3 * HEADS]


@pytest.mark.parametrize("form", ["shared", "separate"])
def test_fewer_drafts_than_heads_are_the_first_heads(serve, form):
    runner, heads = serve(form, drafts=2)
    states = torch.randn(2, HIDDEN)
    found = step(runner, "ab", [[1], [2]], [0, 0], states)
    assert found == [naive_drafts(heads, runner.target, state, 2) for state in states]


def test_drafts_end_at_the_context_limit(serve):
    runner, _ = serve()
    lengths = [10, CONTEXT - 2, CONTEXT - 1, CONTEXT]
    found = step(runner, "abcd", [[1], [2], [3], [4]], [0] * 4, torch.randn(4, HIDDEN), lengths)
    assert [len(drafts) for drafts in found] == [HEADS, 1, 0, 0]


def test_batch_of_prompts_alone_drafts_nothing_and_runs_no_head(serve):
    runner, _ = serve()
    assert step(runner, "ab", [[], []], [0, 0], torch.randn(2, HIDDEN), tokens=64) == [[], []]
    assert runner.target.calls == []


def test_step_that_the_runner_does_not_tell_of_ends_in_one_line(serve):
    runner, _ = serve()
    with pytest.raises(RuntimeError, match=r"works with vLLM 0.32 and 0.33, and in vLLM .* hidden states"):
        runner.drafter.propose([[1]], [10], None, slot_mappings=None)


def test_rank_without_logits_drafts_nothing(serve):
    runner, _ = serve("shared")
    runner.target.compute_logits = lambda hidden: None
    runner.drafter.take_heads(runner.target, OneRank())
    assert step(runner, "ab", [[1], [2]], [0, 0], torch.randn(2, HIDDEN)) == [[], []]


def test_ranks_with_parts_of_the_output_layers_draft_as_one(serve):
    states = torch.randn(4, HIDDEN)
    whole, heads = serve("separate")
    expected = [naive_drafts(heads, whole.target, state, HEADS) for state in states]
    parts: list[torch.Tensor] = []

    class Rank:
        count = 2

        def __init__(self, rank):
            self.rank = rank

        def gathered(self, part):
            parts.append(part)
            return torch.stack(parts if len(parts) == self.count else [part] * self.count)

    for rank in range(2):
        runner = whole
        runner.drafter.take_heads(runner.target, Rank(rank))
        found = step(runner, "abcd", [[1]] * 4, [0] * 4, states)
    assert found == expected  # of the rank that heard from both


def adaptive(serve, tmp_path, **additional):
    """A drafter that knows tokens to cost nothing and its guesses to be right."""
    write(tmp_path / "heads", "shared")
    outcomes = [[(p / 100, True) for p in range(100) for _ in range(40)]] * HEADS
    times = {"step_times": StepTimes({1: 1.0, 64: 1.01}), "heads_times": StepTimes({1: 1e-4, 64: 1e-4})}
    write_plan(tmp_path / "heads", calibration=calibrate(outcomes), **times)
    return serve(medusa_adaptive=True, **additional)


def test_adaptive_drafts_all_where_the_plan_says_that_they_pay(serve, tmp_path):
    runner, heads = adaptive(serve, tmp_path)
    states = torch.randn(2, HIDDEN)
    found = step(runner, "ab", [[1], [2]], [0, 0], states)
    assert found == [naive_drafts(heads, runner.target, state, HEADS) for state in states]


def test_adaptive_drafts_nothing_before_a_plain_step_is_measured(serve):
    runner, _ = serve(medusa_adaptive=True)
    assert step(runner, "ab", [[1], [2]], [0, 0], torch.randn(2, HIDDEN)) == [[], []]
    assert runner.target.calls == []


def test_what_was_verified_is_learnt_by_request_whatever_its_place(serve, tmp_path):
    runner, _ = serve(medusa_record=str(tmp_path / "record"))
    step(runner, "ab", [[1], [2]], [0, 0], torch.randn(2, HIDDEN))
    bins = runner.drafter.drafter._drafted
    assert {name: len(own) for name, own in bins.items()} == {"a": HEADS, "b": HEADS}
    # b moved to the first place and had all of its drafts accepted, a is gone, c has drafts that are not ours.
    step(runner, "bc", [[1] * (HEADS + 1), [5]], [HEADS, 2], torch.randn(HEADS + 4, HIDDEN))
    drafter = runner.drafter.drafter
    assert (drafter._verified, drafter._accepted) == ([1] * HEADS, [1] * HEADS)
    counted = [sum(head.drafts) for head in drafter.chooser.acceptance.calibration().heads]
    assert counted == [1] * HEADS
    # Of b's next drafts two were verified and one was accepted; of c's all were cut off.
    step(runner, "bc", [[1, 1], [5]], [2, 0], torch.randn(4, HIDDEN))
    assert (drafter._verified, drafter._accepted) == ([2, 2, 1], [2, 1, 1])


def test_steps_are_timed_where_they_read_no_prompt_and_go_on_from_the_last(serve):
    runner, _ = serve(medusa_adaptive=True)
    times = runner.drafter.drafter.chooser.step_times
    step(runner, "ab", [[1], [2]], [0, 0], torch.randn(2, HIDDEN), tokens=40)  # the prompts
    assert times.times() is None
    step(runner, "ab", [[1], [2]], [0, 0], torch.randn(2, HIDDEN))
    assert list(times.times().seconds) == [2]
    step(runner, "abc", [[1], [2], []], [0, 0, 0], torch.randn(3, HIDDEN), tokens=50)  # a prompt beside them
    step(runner, "de", [[1], [2]], [0, 0], torch.randn(2, HIDDEN), tokens=2)  # after a pause, other requests
    assert len(times._measured[2]) == 1


def test_record_is_a_plan(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("axolotl_medusa.serving.heads_drafter._RECORD_EVERY_S", 0.0)
    runner, _ = serve(medusa_record=str(tmp_path / "record"))
    for _ in range(3):
        step(runner, "a", [[1]], [0], torch.randn(1, HIDDEN))
    plan = read_plan(tmp_path / "record")
    assert list(plan.step_times.seconds) == [1]
    assert list(plan.heads_times.seconds) == [HEADS]
    assert len(plan.calibration.heads) == HEADS
    assert plan.rest["served"] == {"steps": 3, "passes": 3, "verified": [0] * HEADS, "accepted": [0] * HEADS}


def test_nothing_is_kept_of_requests_that_are_gone(serve, tmp_path):
    runner, _ = adaptive(serve, tmp_path)
    for turn in range(50):
        step(runner, [f"{turn}a", f"{turn}b"], [[1], [2]], [0, 0], torch.randn(2, HIDDEN))
    assert len(runner.drafter.drafter._drafted) <= 2
    assert len(runner.drafter.drafter._last_requests) == 2
    assert len(runner.drafter.drafter.chooser._pool) <= 128


def test_vocabulary_of_the_drafts_is_the_models(serve):
    runner, _ = serve("shared")
    found = step(runner, "a", [[1]], [0], torch.randn(1, HIDDEN))
    assert all(0 <= token < VOCAB and type(token) is int for token in found[0])
