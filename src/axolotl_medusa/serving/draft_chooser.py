"""How many tokens to draft for whom: as many as pay at the present load.

Contract: numbers alone, no server and no heads. With n requests and m drafts in a step, expected tokens per second are
(n + S) / (T + D): S is the sum of the drafts' probabilities to be accepted (each a product over its request's drafts up to
it), T the seconds of a step with n + m tokens, D those of the heads. At a rate of R tokens per second a draft pays if its
probability is more than R times what it adds to T; drafts are taken in the order of their probability. Where even the best
rate is not better than n / T(n), the heads are not run at all, but for a few requests now and then, so that drafting can
come back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from axolotl_medusa.serving.draft_acceptance import Acceptance
from axolotl_medusa.serving.draft_plan import DraftPlan, StepTimes, uncalibrated
from axolotl_medusa.serving.draft_prices import TimeTable, seconds_up_to

_REVIEW_STEPS = (8, 32)
"""Steps between two looks at what was measured: in the first `_EARLY` steps, and later."""
_EARLY = 128
_POOL = 128
"""Requests whose guesses are remembered, as a sample of what the next ones will be like."""
_PROBED_REQUESTS = 4
"""Requests that the heads guess for where they only look whether drafting would pay."""
_PROBE_STEPS = (16, 256)
"""Steps between two such looks: at first, and at most; each in vain doubles them."""
_PROBES_COST = 0.005
"""Largest part of the time that they may take, whatever the steps between them."""
_ALL_HEADS_STEPS = 32
"""Steps between two passes of all heads where fewer of them pay."""
_MARGIN = 0.01
"""By how much drafting must be better than not: measured seconds are that uncertain at best."""
_FIRST_STEP = 2
"""Drafts that a step may have beyond what was measured; or a quarter of its tokens."""


class Pass(NamedTuple):
    """What the heads are to do in a step.

    Attributes:
        heads: How many of them run, from the first; 0: none.
        requests: Which requests they guess for.
    """

    heads: int
    requests: list[int]


class Reviewed(NamedTuple):
    """What decisions are made from until the next review.

    Attributes:
        steps: Seconds of a step by tokens.
        heads: Seconds of the heads by rows.
        pool: Of requests of late, the probability that their first 1, 2, ... drafts are all accepted, `[requests, heads]`.
        measured_from: The smallest number of tokens whose step was measured.
    """

    steps: StepTimes | None = None
    heads: StepTimes | None = None
    pool: Tensor | None = None
    measured_from: int | None = None


class _Decision(NamedTuple):
    heads: int
    tokens_per_s: float


class DraftChooser:
    """Decides, step by step, how many tokens to draft.

    Args:
        plan: What is known from the files beside the heads.
        num_heads: Drafts per step at most.
        agreed: Given what this process would decide from, returns what all ranks of tensor parallelism decide from.
    """

    def __init__(self, plan: DraftPlan, num_heads: int, agreed: Callable[[Reviewed], Reviewed] | None = None) -> None:
        self.num_heads = num_heads
        self.acceptance = Acceptance(plan.calibration or uncalibrated(num_heads), num_heads)
        self.step_times, self.heads_times = TimeTable(plan.step_times), TimeTable(plan.heads_times)
        self._agreed = agreed
        self._pool: deque[list[int]] = deque(maxlen=_POOL)
        self._steps, self._turn = 0, 0
        self._next_probe, self._probe_steps = 0, _PROBE_STEPS[0]
        self._reviewed, self._decided = Reviewed(), dict[int, _Decision]()
        self._seconds = torch.zeros(0, dtype=torch.float64)
        self._shares = self._hopeful = self.acceptance.shares()
        self._probing = False

    def next_pass(self, requests: int) -> Pass:
        """What the heads are to do for that many requests; called once in every step."""
        if self._steps % _REVIEW_STEPS[self._steps >= _EARLY] == 0:
            self._review()
        self._steps += 1
        self._probing = False
        if not requests or not self._knows(requests):
            return Pass(0, [])
        if heads := self._decision(requests).heads:
            self._probe_steps = _PROBE_STEPS[0]
            heads = self.num_heads if self._steps % _ALL_HEADS_STEPS == 0 else heads
            return Pass(heads, list(range(requests)))
        if self._steps < self._next_probe:
            return Pass(0, [])
        return self._probe(requests)

    def _probe(self, requests: int) -> Pass:
        """A pass for few requests, in turn, to see whether drafting would pay."""
        self._probing = True
        self._turn += _PROBED_REQUESTS
        some = {(self._turn + place) % requests for place in range(_PROBED_REQUESTS)}
        steps, heads = self._reviewed.steps, self._reviewed.heads
        plain_s = float(self._step_seconds(steps, requests, 1)) if steps else 1.0
        heads_s = float(seconds_up_to(heads, len(some) * self.num_heads)[-1]) if heads else 0.0
        self._next_probe = self._steps + max(self._probe_steps, int(heads_s / plain_s / _PROBES_COST))
        self._probe_steps = min(2 * self._probe_steps, _PROBE_STEPS[1])
        return Pass(self.num_heads, sorted(some))

    def _review(self) -> None:
        self._shares, self._hopeful = self.acceptance.shares(), self.acceptance.shares(hopeful=True)
        pool = self._products(torch.tensor(list(self._pool)), self._shares) if self._pool else None
        steps, heads = self.step_times.times(), self.heads_times.times()
        reviewed = Reviewed(steps, heads, pool, self.step_times.measured_from())
        self._reviewed = self._agreed(reviewed) if self._agreed else reviewed
        self._decided = {}
        self._seconds = self._seconds[:0]

    def _step_seconds(self, steps: StepTimes, first: int, count: int) -> Tensor:
        """Seconds of steps of `first`, `first + 1`, ... tokens; computed once between two reviews."""
        if len(self._seconds) < first + count:
            self._seconds = seconds_up_to(steps, 2 * (first + count))
        return self._seconds[first : first + count]

    @staticmethod
    def _products(bins: Tensor, shares: list[Tensor]) -> Tensor:
        """Probabilities that the first 1, 2, ... drafts are all accepted, from their bins, `[requests, heads]` of both."""
        return torch.stack([shares[head][bins[:, head]] for head in range(bins.shape[1])], 1).cumprod(1)

    def _knows(self, requests: int) -> bool:
        """Whether steps of that many tokens, which are plain ones, have a price."""
        return self._reviewed.measured_from is not None and self._reviewed.measured_from <= requests

    def _decision(self, requests: int) -> _Decision:
        if requests not in self._decided:
            self._decided[requests] = self._decide(requests)
        return self._decided[requests]

    def _decide(self, requests: int) -> _Decision:
        """The number of heads whose drafts are expected to pay for them all, and the rate that is expected then."""
        steps, heads, pool, _ = self._reviewed
        if steps is None:
            return _Decision(0, 0.0)
        seconds = self._step_seconds(steps, requests, 1 + requests * self.num_heads)
        plain = requests / float(seconds[0])
        if pool is None:
            return _Decision(0, plain)
        best = _Decision(0, plain * (1.0 + _MARGIN))
        products = pool.repeat(-(-requests // len(pool)), 1)
        products = products[: len(products) // requests * requests].view(-1, requests, self.num_heads)
        for count in range(1, self.num_heads + 1):
            heads_s = float(seconds_up_to(heads, requests * count)[-1]) if heads else 0.0
            ordered = products[..., :count].flatten(1).sort(1, descending=True).values
            gains = pad(ordered.cumsum(1), (1, 0))
            prices = seconds[: gains.shape[1]]
            drafts = (gains - plain * prices).argmax(1, keepdim=True)
            tokens = requests + gains.gather(1, drafts).mean()
            rate = float(tokens / (prices[drafts].mean() + heads_s))
            if rate > best.tokens_per_s:
                best = _Decision(count, rate)
        return best

    def choose(self, probabilities: Tensor, requests: int) -> tuple[list[int], list[list[int]]]:
        """Decides how many drafts each request gets.

        Args:
            probabilities: Of the heads' best tokens, `[guessed, heads]`, fp32 on the CPU; the requests of the pass.
            requests: All requests that go on.

        Returns:
            Of each guessed request the number of drafts, and the bins of its probabilities, for `Acceptance.learn`.
        """
        bins = self.acceptance.bins(probabilities)
        products = self._products(bins, self._hopeful if self._probing else self._shares)
        listed: list[list[int]] = bins.tolist()
        if bins.shape[1] == self.num_heads:
            self._pool.extend(listed)
        ordered, order = products.flatten().sort(descending=True, stable=True)
        count = self._count_that_pays(ordered, requests)
        lengths = torch.bincount(order[:count] // bins.shape[1], minlength=len(bins))
        return lengths.tolist(), listed

    def _count_that_pays(self, ordered: Tensor, requests: int) -> int:
        steps = self._reviewed.steps
        if steps is None:
            return 0
        largest = max(steps.seconds)
        allowed = largest + max(_FIRST_STEP, largest // 4) - requests
        gains = pad(ordered.cumsum(0), (1, 0))[: max(1, allowed + 1)]
        seconds = self._step_seconds(steps, requests, len(gains))
        return int((gains - self._decision(requests).tokens_per_s * seconds).argmax())
