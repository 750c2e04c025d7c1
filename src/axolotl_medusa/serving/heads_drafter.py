"""Drafts with heads after every step of a server, and learns from the steps how many of them pay.

Contract: knows no server: a step comes as `Step`, what the user wants as `Options`, the served model's output layer as a
function. Nothing of a request is kept beyond the step after it was drafted for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from axolotl_medusa.serving.draft_chooser import DraftChooser, Pass, Reviewed
from axolotl_medusa.serving.draft_heads import (
    DraftHeads,
    Guesses,
    best_guesses,
    in_turns,
    joined_guesses,
    part_of_guesses,
)
from axolotl_medusa.serving.draft_heads_files import Part
from axolotl_medusa.serving.draft_plan import DraftPlan, write_plan
from axolotl_medusa.serving.sample_rows import sample_rows

_RECORD_EVERY_S = 2.0


class Step(NamedTuple):
    """What a step of the server computed.

    Attributes:
        states: Hidden states of the tokens that it sampled after: of each request its drafts and one more, `[rows, H]`.
        num_drafts: Drafts of each request that it verified; None where the batch had none.
        request_ids: Names of the requests.
        tokens: All tokens of its batch, those of prompts too.
    """

    states: Tensor
    num_drafts: list[int] | None
    request_ids: list[str]
    tokens: int


@dataclass(frozen=True)
class Options:
    """What the user and the server's configuration say.

    Attributes:
        heads: Directory of the heads.
        adaptive: Whether a request's drafts end where they no longer pay.
        record: Directory to write what is learnt to, None for nowhere.
        num_drafts: Drafts per step and request at most.
        sizes: `hidden_size` and `vocab_size` of the served model.
        dtype: Its type.
        context: Tokens of a request at most.
    """

    heads: Path
    adaptive: bool
    record: Path | None
    num_drafts: int
    sizes: dict[str, int]
    dtype: torch.dtype
    context: int


class OneRank:
    """No tensor parallelism."""

    rank, count = 0, 1

    def gathered(self, part: Tensor) -> Tensor:
        """The parts of all ranks, `[ranks, ...]`."""
        return part[None]

    def from_first(self, value: Any) -> Any:
        """What the first rank has."""
        return value


class HeadsDrafter:
    """Drafts for the requests of a server.

    Args:
        options: What the user wants, and the served model's sizes.
        heads: The heads.
        output: The served model's output layer: logits `[rows, vocab_size]` of hidden states, None on a rank that gets none.
        plan: What is known of acceptance and of times.
        ranks: The ranks of tensor parallelism, with the attributes and methods of `OneRank`.
    """

    def __init__(
        self,
        options: Options,
        heads: DraftHeads,
        output: Callable[[Tensor], Tensor | None],
        plan: DraftPlan,
        ranks: Any = None,
    ) -> None:
        self.options, self.heads, self._output, self._ranks = options, heads, output, ranks or OneRank()
        vocab, count = options.sizes["vocab_size"], self._ranks.count
        self._first_rows = torch.tensor([Part(rank, count).rows(vocab).start for rank in range(count)])
        self.chooser = DraftChooser(plan, options.num_drafts, self._agreed if count > 1 else None)
        self._drafted: dict[str, list[int]] = {}
        self._last_requests: set[str] = set()
        self._left_s = self._recorded_s = 0.0
        self._served = {"steps": 0, "passes": 0}
        self._verified, self._accepted = [0] * options.num_drafts, [0] * options.num_drafts

    def _agreed(self, reviewed: Reviewed) -> Reviewed:
        agreed: Reviewed = self._ranks.from_first(reviewed)
        return agreed

    @torch.inference_mode()
    def drafts(self, step: Step, sampled: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[int]]:
        """Drafts for every request in the batch.

        Args:
            step: What the step computed.
            sampled: Tokens that the step added to each request; none where its prompt is not read to the end.
            lengths: Tokens of each request, these included.

        Returns:
            Of each request its drafts, which may be none.

        Raises:
            RuntimeError: Step and sampled tokens contradict each other.
        """
        begun = time.perf_counter()
        requests, rows = sample_rows(sampled, step.num_drafts, len(step.states))
        self._learn(step, sampled, begun)
        drafts: list[list[int]] = [[] for _ in sampled]
        planned = self._next_pass(len(requests))
        if planned.heads:
            self._served["passes"] += 1
            chosen = [requests[place] for place in planned.requests]
            self._draft(step, planned, chosen, [rows[place] for place in planned.requests], drafts, len(requests))
            for place in chosen:
                del drafts[place][max(0, self.options.context - 1 - int(lengths[place])) :]
        self._left_s = time.perf_counter()
        if self.options.record is not None and self._left_s - self._recorded_s > _RECORD_EVERY_S:
            self._record()
        return drafts

    def _next_pass(self, requests: int) -> Pass:
        if self.options.adaptive:
            return self.chooser.next_pass(requests)
        return Pass(self.options.num_drafts if requests else 0, list(range(requests)))

    def _draft(
        self, step: Step, planned: Pass, places: list[int], rows: list[int], drafts: list[list[int]], requests: int
    ) -> None:
        """Runs the heads and fills in the drafts of the requests at `places`."""
        options, states = self.options, step.states
        if len(rows) < len(states):
            states = states[torch.tensor(rows, device=states.device)]
        learns = options.adaptive or options.record is not None
        begun = time.perf_counter()
        guesses = self._guess(states.to(options.dtype), planned.heads, learns)
        if guesses is None:  # another rank drafts
            return
        tokens = guesses.tokens.tolist()
        if guesses.probabilities is None:
            for place, row in zip(places, tokens, strict=True):
                drafts[place] = row
            return
        probabilities = guesses.probabilities.cpu()
        self.chooser.heads_times.add(len(rows) * planned.heads, time.perf_counter() - begun)
        if options.adaptive:
            lengths, bins = self.chooser.choose(probabilities, requests)
        else:
            lengths, bins = [planned.heads] * len(rows), self.chooser.acceptance.bins(probabilities).tolist()
        for place, row, length, own_bins in zip(places, tokens, lengths, bins, strict=True):
            if length:
                drafts[place] = row[:length]
                self._drafted[step.request_ids[place]] = own_bins[:length]

    def _guess(self, states: Tensor, heads: int, with_probabilities: bool) -> Guesses | None:
        vocab, own = self.options.sizes["vocab_size"], self.heads.outputs is not None

        def guess(rows: Tensor) -> Guesses | None:
            hidden = self.heads.hidden(rows, heads)
            if own and self._ranks.count > 1:
                parts = self._ranks.gathered(part_of_guesses(self.heads.own_logits(hidden)))
                return joined_guesses(parts, self._first_rows)
            logits = self.heads.own_logits(hidden) if own else self._output(hidden.flatten(0, 1))
            if logits is None:
                return None
            return best_guesses(logits.view(len(rows), heads, -1), with_probabilities=with_probabilities)

        return in_turns(states, heads * vocab, guess)

    def _learn(self, step: Step, sampled: Sequence[Sequence[int]], now: float) -> None:
        """Takes in what the step says: of the drafts that it verified, and how long it took."""
        self._served["steps"] += 1
        drafted, self._drafted = self._drafted, {}
        if drafted and step.num_drafts is not None:
            for name, count, tokens in zip(step.request_ids, step.num_drafts, sampled, strict=True):
                if count and tokens and (bins := drafted.get(name)):
                    self.chooser.acceptance.learn(bins, count, len(tokens) - 1)
                    for place in range(min(count, len(bins))):
                        self._verified[place] += 1
                        self._accepted[place] += place < len(tokens) - 1
        goes_on = any(name in self._last_requests for name in step.request_ids)
        if goes_on and step.tokens == len(step.states):  # no prompt is read, and the server did not wait for requests
            self.chooser.step_times.add(step.tokens, now - self._left_s)
        self._last_requests = set(step.request_ids)

    def _record(self) -> None:
        """Writes down what was learnt so far; only the first rank does."""
        self._recorded_s = self._left_s
        if self._ranks.rank or self.options.record is None:
            return
        served = {**self._served, "verified": self._verified, "accepted": self._accepted}
        chooser = self.chooser
        write_plan(
            self.options.record,
            calibration=chooser.acceptance.calibration(),
            step_times=chooser.step_times.times(),
            heads_times=chooser.heads_times.times(),
            served=served,
        )
