"""Medusa heads as a drafter of vLLM's method `custom_class`.

Contract: what vLLM calls; imports torch alone when it is imported. After every step vLLM asks for the drafts of all requests
in the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from axolotl_medusa.serving.draft_heads_files import Part, read_draft_heads
from axolotl_medusa.serving.draft_plan import DraftPlan, read_plan
from axolotl_medusa.serving.heads_drafter import HeadsDrafter, Step
from axolotl_medusa.serving.vllm_interface import (
    OutputLayer,
    Ranks,
    check_interface,
    read_options,
    repair_sampling,
    sample_plainly,
    unknown_vllm,
    watch_steps,
)

LOG = logging.getLogger("vllm.axolotl_medusa")
"""Below vLLM's own logger, whose handlers and level it takes."""


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

    drafter: HeadsDrafter

    def __init__(self, vllm_config: Any) -> None:
        check_interface()
        watch_steps()
        sample_plainly()
        self.options = read_options(vllm_config)
        self._step: Step | None = None

    def load_model(self, target: nn.Module) -> None:
        """Reads the heads; vLLM calls it once with the served model.

        Raises:
            ValueError: The heads do not belong to the model, or a file beside them is damaged.
        """
        if next(target.parameters()).device.type == "cpu" and repair_sampling():
            LOG.info("Medusa: this vLLM's sampling with drafts at a temperature is repaired")
        self.take_heads(target, Ranks())

    def take_heads(self, target: nn.Module, ranks: Any) -> None:
        """`load_model` with the ranks given."""
        options = self.options
        if options.record is not None:
            options.record.mkdir(parents=True, exist_ok=True)
        plan = read_plan(options.heads) if options.adaptive else DraftPlan()
        device, part = next(target.parameters()).device, Part(ranks.rank, ranks.count)
        heads = read_draft_heads(options.heads, options.num_drafts, options.sizes, options.dtype, device, part)
        self.drafter = HeadsDrafter(options, heads, OutputLayer(target), plan, ranks)
        form = "the model's output layer" if heads.outputs is None else "output layers of their own"
        known = [name for name, there in (("calibration", plan.calibration), ("step times", plan.step_times)) if there]
        how = f"as many drafts as pay (beside them: {' and '.join(known) or 'no plan'})"
        how = how if options.adaptive else f"always {options.num_drafts} drafts"
        LOG.info("Medusa: %d heads with %s of %s, %s", heads.num_heads, form, options.heads, how)

    def take_step(self, step: Step) -> None:
        """Takes what the step computed that `propose` is called for."""
        self._step = step

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
        step, self._step = self._step, None
        if step is None:
            raise unknown_vllm("the model runner does not tell a drafter its hidden states")
        return self.drafter.drafts(step, sampled_token_ids, num_tokens_no_spec)
