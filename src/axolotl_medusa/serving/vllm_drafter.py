"""Medusa heads as a drafter of vLLM's method `custom_class`.

Contract: what vLLM calls, and nothing of its names; imports torch alone when it is imported. After every step vLLM asks for
the drafts of all requests in the batch; the heads read the hidden state of each request's last accepted token.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_medusa.serving.draft_chooser import DraftChooser, Pass, Reviewed
from axolotl_medusa.serving.draft_heads import (
    DraftHeads,
    Guesses,
    best_guesses,
    in_turns,
    joined_guesses,
    part_of_guesses,
)
from axolotl_medusa.serving.draft_heads_files import Part, read_draft_heads
from axolotl_medusa.serving.draft_plan import DraftPlan, read_plan, write_plan
from axolotl_medusa.serving.sample_rows import sample_rows
from axolotl_medusa.serving.vllm_interface import (
    OutputLayer,
    Ranks,
    Step,
    check_interface,
    read_options,
    unknown_vllm,
    watch_steps,
)

LOG = logging.getLogger("vllm.axolotl_medusa")
"""Below vLLM's own logger, whose handlers and level it takes."""

_RECORD_EVERY_S = 2.0


class MedusaDrafter:
    """Drafts with Medusa heads in vLLM.

    `--speculative-config '{"method": "custom_class", "model": "axolotl_medusa.vllm_drafter.MedusaDrafter",
    "num_speculative_tokens": K}' --additional-config '{"medusa_heads": "DIR"}'` serves the first K heads of DIR.
    `"medusa_adaptive": false` drafts K tokens for every request in every step; `"medusa_record": "DIR"` writes there what was
    learnt of acceptance and of step times, in the files of `draft_plan`.

    Args:
        vllm_config: vLLM's configuration.

    Raises:
        ValueError: The configuration is not as the drafter needs it.
        RuntimeError: This vLLM is not as the drafter knows it.
    """

    def __init__(self, vllm_config: Any) -> None:
        check_interface()
        watch_steps()
        self.options = read_options(vllm_config)
        self._step: Step | None = None
        self._drafted: dict[str, list[int]] = {}
        self._last_requests: set[str] = set()
        self._left_s = 0.0
        self._recorded_s = 0.0
        self._served = {"steps": 0, "passes": 0}
        self._verified, self._accepted = [0] * self.options.num_drafts, [0] * self.options.num_drafts

    def load_model(self, target: nn.Module) -> None:
        """Reads the heads; vLLM calls it once with the served model.

        Raises:
            ValueError: The heads do not belong to the model, or a file beside them is damaged.
        """
        self.take_heads(target, Ranks())

    def take_heads(self, target: nn.Module, ranks: Any) -> None:
        """`load_model` with the ranks given."""
        options, self._ranks = self.options, ranks
        if options.record is not None:
            options.record.mkdir(parents=True, exist_ok=True)
        self._output = OutputLayer(target)
        device = next(target.parameters()).device
        part = Part(ranks.rank, ranks.count)
        self.heads: DraftHeads = read_draft_heads(
            options.heads, options.num_drafts, options.sizes, options.dtype, device, part
        )
        self._first_rows = torch.tensor(
            [Part(rank, ranks.count).rows(options.sizes["vocab_size"]).start for rank in range(ranks.count)]
        )
        plan = read_plan(options.heads) if options.adaptive else DraftPlan()
        self.chooser = DraftChooser(plan, options.num_drafts, self._agreed if ranks.count > 1 else None)
        form = "shared" if self.heads.outputs is None else "separate"
        known = [name for name, there in (("calibration", plan.calibration), ("step times", plan.step_times)) if there]
        how = (
            f"adaptive drafts, {' and '.join(known) or 'nothing measured before'}"
            if options.adaptive
            else "all drafts always"
        )
        LOG.info("Medusa: %d heads (%s) of %s, %s", self.heads.num_heads, form, options.heads, how)

    def _agreed(self, reviewed: Reviewed) -> Reviewed:
        agreed: Reviewed = self._ranks.from_first(reviewed)
        return agreed

    def take_step(self, step: Step) -> None:
        """Takes what the step computed that `propose` is called for."""
        self._step = step

    @torch.inference_mode()
    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Sequence[int],
        token_ids_cpu: Any = None,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for every request in the batch.

        Args:
            sampled_token_ids: Tokens that the step added to each request; none where its prompt is not read to the end.
            num_tokens_no_spec: Tokens of each request, these included.
            token_ids_cpu: Not used.
            slot_mappings: Not used.

        Returns:
            Of each request its drafts, which may be none.

        Raises:
            RuntimeError: vLLM did not say what the step computed.
        """
        begun, step, self._step = time.perf_counter(), self._step, None
        if step is None:
            raise unknown_vllm("the model runner does not tell a drafter its hidden states")
        requests, rows = sample_rows(sampled_token_ids, step.num_drafts, len(step.states))
        self._learn(step, sampled_token_ids, begun)
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        planned = self._next_pass(len(requests))
        if planned.heads:
            self._served["passes"] += 1
            chosen = [requests[place] for place in planned.requests]
            self._draft(step, planned, chosen, [rows[place] for place in planned.requests], drafts, len(requests))
            for place in chosen:
                del drafts[place][max(0, self.options.context - 1 - int(num_tokens_no_spec[place])) :]
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
