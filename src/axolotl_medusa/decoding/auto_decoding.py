"""Decoding of one prompt whose tree is chosen step by step.

Contract: runs and times what `tree_chooser` decides; the tokens of greedy decoding are the same whatever it decides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from axolotl_medusa.decoding.acceptance import AcceptanceRule
from axolotl_medusa.decoding.auto_steps import AutoSteps
from axolotl_medusa.decoding.loop import Decoding, ModelWithHeads
from axolotl_medusa.decoding.tree_chooser import PLAIN, TreeChooser


class AutoDecoding(Decoding):
    """One prompt that is being decoded with the trees that a chooser names.

    Args:
        model: The target and its heads.
        input_ids: The prompt, `[1, prompt]`.
        attention_mask: 1 for its tokens, 0 for padding, `[1, prompt]`.
        chooser: Names the trees, and learns.
        num_heads: Heads that there are.
        rule: Which draft tokens are accepted: one that accepts the tokens that plain decoding would write.
        max_new_tokens: Tokens to write at most, at least 1.
        eos_token_ids: Tokens after which it stops.
        clock: Seconds of a clock that never goes back.
    """

    def __init__(
        self,
        model: ModelWithHeads,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        chooser: TreeChooser,
        num_heads: int,
        rule: AcceptanceRule,
        max_new_tokens: int,
        eos_token_ids: Collection[int] = (),
        clock: Callable[[], float],
    ) -> None:
        super().__init__(
            model,
            input_ids,
            attention_mask,
            tree=PLAIN,
            rule=rule,
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids,
        )
        self._auto = AutoSteps(
            self,
            super().step,
            lambda hidden, tokens: head_ranks_of(model, torch.cat(hidden), tokens),
            chooser,
            num_heads,
            max_new_tokens,
            clock,
        )

    def step(self) -> list[list[int]]:
        """One forward of the target, as `Decoding.step`, and sometimes one of the heads over positions that are past."""
        return self._auto.step()


def head_ranks_of(model: ModelWithHeads, hidden: Tensor, tokens: list[list[int]]) -> list[list[int]]:
    """Ranks of known tokens among the heads' best.

    Args:
        model: The target and its heads.
        hidden: Hidden states after the final norm, `[positions, H]`.
        tokens: Per position the token that head 0, 1, ... should have predicted, `[positions][heads]`.

    Returns:
        `[positions][heads]`, 0 for a head's best token; a token that others tie with counts as the worst of them.
    """
    logits = model.draft_logits(hidden, len(tokens[0]))
    wanted = logits.gather(-1, torch.tensor(tokens, device=logits.device)[..., None])
    ranks: list[list[int]] = ((logits >= wanted).sum(-1) - 1).tolist()
    return ranks
