"""How many drafts are chosen, in simulated servers whose step times and acceptance are known."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from axolotl_medusa.serving.draft_chooser import DraftChooser, Reviewed
from axolotl_medusa.serving.draft_plan import DraftPlan, StepTimes

HEADS = 3


class Server:
    """Serves `requests` at a time: steps take `step_s(tokens)`, heads `heads_s(rows)`, drafts are accepted as often as they say."""

    def __init__(self, step_s, heads_s, probabilities, plan=None, seed=0, noise=0.0):
        self.step_s, self.heads_s, self.probabilities, self.noise = step_s, heads_s, probabilities, noise
        self.random = random.Random(seed)
        self.chooser = DraftChooser(plan or DraftPlan(), HEADS)

    def _measured(self, seconds):
        return seconds * (1.0 + self.random.uniform(-self.noise, self.noise))

    def serve(self, requests, steps):
        """Returns tokens per second, drafts per step and request, and the share of steps in which heads ran."""
        tokens, seconds, drafted, passes, pending = 0, 0.0, 0, 0, []
        for _ in range(steps):
            batch = requests + sum(len(bins) for bins, _ in pending)
            step = self._measured(self.step_s(batch))
            self.chooser.step_times.add(batch, step)
            seconds, tokens = seconds + step, tokens + requests
            for bins, chances in pending:
                accepted = sum(1 for _ in itertools.takewhile(lambda p: self.random.random() < p, chances))
                self.chooser.acceptance.learn(bins, len(bins), accepted)
                tokens += accepted
            pending = []
            planned = self.chooser.next_pass(requests)
            if planned.heads:
                passes += 1
                rows = [[self.random.choice(self.probabilities)] * HEADS for _ in planned.requests]
                took = self._measured(self.heads_s(len(rows) * planned.heads))
                self.chooser.heads_times.add(len(rows) * planned.heads, took)
                seconds += took
                lengths, bins = self.chooser.choose(torch.tensor(rows)[:, : planned.heads], requests)
                pending = [(own[:n], row[:n]) for own, row, n in zip(bins, rows, lengths, strict=True) if n]
                drafted += sum(lengths)
        return tokens / seconds, drafted / steps / requests, passes / steps


def flat(tokens):
    return 1.0


def linear(tokens):
    return 0.5 + 0.5 * tokens


def cheap(rows):
    return 0.001 * rows


def test_all_drafts_where_tokens_cost_nothing():
    rate, drafts, _ = Server(flat, cheap, [0.9]).serve(4, 400)
    assert drafts > 0.85 * HEADS
    assert rate > 2.5 * 4


def test_next_to_nothing_where_every_token_costs_as_much_as_it_is_worth():
    server = Server(linear, cheap, [0.2])
    server.serve(16, 300)
    rate, drafts, passes = server.serve(16, 600)
    assert rate > 0.99 * 16 / linear(16)
    assert drafts < 0.02
    assert passes < 0.03


def test_expensive_heads_are_not_run_though_their_drafts_would_pay():
    server = Server(flat, lambda rows: 0.5 * rows, [0.6])
    server.serve(8, 300)
    rate, _, passes = server.serve(8, 1000)
    assert rate > 0.98 * 8
    assert passes < 0.03


def test_drafts_end_where_the_product_of_probabilities_no_longer_pays():
    """A token costs half of a plain step: the first of drafts at 0.75 pays, the second hardly (0.56), the third (0.42) not."""
    server = Server(linear, cheap, [0.75])
    server.serve(1, 300)
    _, drafts, _ = server.serve(1, 500)
    assert 0.8 < drafts < 2.1


def test_likely_drafts_are_chosen_before_unlikely_ones():
    chooser = DraftChooser(DraftPlan(step_times=StepTimes({1: 1.0, 4: 1.3, 64: 15.0})), HEADS)
    chooser.next_pass(4)
    lengths, bins = chooser.choose(
        torch.tensor([[0.95, 0.95, 0.95], [0.05, 0.9, 0.9], [0.95, 0.01, 0.9], [0.3, 0.3, 0.3]]), 4
    )
    assert lengths[0] == 3
    assert lengths[1] == 0
    assert lengths[2] == 1
    assert len(bins) == 4


def test_drafting_comes_back_when_the_load_falls():
    server = Server(lambda tokens: 1.0 if tokens <= 8 else tokens / 8, cheap, [0.5])
    server.serve(32, 600)
    assert server.serve(32, 600)[1] < 0.05
    server.serve(1, 600)
    assert server.serve(1, 300)[1] > 1.0


def test_drafting_comes_back_when_the_text_gets_easier():
    server = Server(linear, cheap, [0.1])
    server.serve(2, 1000)
    server.probabilities = [0.97]
    server.serve(2, 600)
    assert server.serve(2, 300)[1] > 1.0


@pytest.mark.parametrize("requests", [1, 16])
@pytest.mark.parametrize("probabilities", [[0.02], [0.05, 0.9]])
@pytest.mark.parametrize("step_s", [linear, lambda tokens: 1.0 if tokens == 1 else 1.8 + 0.05 * tokens])
def test_never_slower_than_without_heads(requests, probabilities, step_s):
    """With noise of 5% in every measurement, after 200 steps that learn."""
    server = Server(step_s, lambda rows: 0.05 + 0.02 * rows, probabilities, noise=0.05)
    server.serve(requests, 200)
    rate, _, _ = server.serve(requests, 600)
    assert rate >= 0.97 * requests / step_s(requests)


def test_plan_makes_the_first_steps_draft():
    plan = DraftPlan(step_times=StepTimes({1: 1.0, 64: 1.1}), heads_times=StepTimes({3: 0.01}))
    server = Server(flat, cheap, [0.9], plan)
    assert server.serve(1, 8)[2] > 0


def test_decisions_are_those_that_the_ranks_agreed_on():
    """What this process measured is not what it decides from, but what comes back from the first rank."""
    agreed = Reviewed(StepTimes({1: 1.0, 64: 1.0}), None, torch.tensor([[0.9, 0.8, 0.7]]), 1)
    chooser = DraftChooser(DraftPlan(), HEADS, lambda own: agreed)
    assert chooser.next_pass(2) == (HEADS, [0, 1])
    stubborn = DraftChooser(DraftPlan(), HEADS, lambda own: Reviewed())
    assert stubborn.next_pass(2) == (0, [])


def test_no_requests_need_no_pass():
    assert DraftChooser(DraftPlan(step_times=StepTimes({1: 1.0})), HEADS).next_pass(0) == (0, [])


def test_looks_at_single_requests_take_turns():
    chooser = DraftChooser(DraftPlan(step_times=StepTimes({1: 1.0, 200: 200.0})), HEADS)
    seen = set()
    for _ in range(2500):
        planned = chooser.next_pass(16)
        assert len(planned.requests) <= 4
        seen |= set(planned.requests)
        if planned.heads:
            chooser.choose(torch.full((len(planned.requests), HEADS), 0.01), 16)
    assert seen == set(range(16))
