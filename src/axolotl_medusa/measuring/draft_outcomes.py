"""What becomes of a chain's drafts on the model's own greedy text: each with its probability, accepted or not.

Contract: reads continuations; counts and decides nothing. Head i at position t predicts the token t + 2 + i, i from 0; a
draft is looked at where those of the heads before it are right, as a server verifies them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.measuring.evaluate import PLAIN, PromptTokens, check_fits, decode_in_turn
from axolotl_medusa.model.anatomy import backbone, causal_lm, logit_transform

Outcomes = list[list[tuple[float, bool]]]
"""Of each head, probability and acceptance of its drafts."""

_LOGITS_AT_ONCE = 1 << 25
"""Elements of the heads' logits that are held at a time."""


def outcomes_of(model: MedusaModel, prompts: Sequence[PromptTokens], max_new_tokens: int) -> Outcomes:
    """What becomes of the drafts on the model's own greedy answers.

    Args:
        model: The model with its heads.
        prompts: What it answers.
        max_new_tokens: Tokens of an answer at most.

    Raises:
        ValueError: There are no prompts, or one does not fit the model's context.
    """
    check_fits(model, prompts, max_new_tokens)
    outcomes: Outcomes = [[] for _ in range(model.heads.num_heads)]
    for prompt in prompts:
        answer = decode_in_turn(model, prompt.input_ids, {}, max_new_tokens)[PLAIN].tokens
        for own, found in zip(outcomes, draft_outcomes(model, prompt.input_ids, answer), strict=True):
            own += found
    return outcomes


@torch.no_grad()
def draft_outcomes(model: MedusaModel, prompt: Sequence[int], continuation: Sequence[int]) -> Outcomes:
    """Looks at the drafts at a prompt's last token and at every token after it.

    Args:
        model: The model with its heads.
        prompt: Tokens that the model was given.
        continuation: Tokens that it wrote.
    """
    heads = model.heads.num_heads
    outcomes: Outcomes = [[] for _ in range(heads)]
    if len(continuation) < 2:
        return outcomes
    device = causal_lm(model.base_model).get_input_embeddings().weight.device
    text = torch.tensor([*prompt, *continuation], device=device)
    hidden = backbone(model.base_model)(input_ids=text[None, :-1], use_cache=False)[0][0, len(prompt) - 1 : -1]
    tokens, probabilities = _guesses(model, hidden)
    for position, (drafts, chances) in enumerate(zip(tokens, probabilities, strict=True)):
        for head, (draft, chance) in enumerate(zip(drafts, chances, strict=True)):
            if position + 1 + head >= len(continuation):
                break
            outcomes[head].append((chance, draft == continuation[position + 1 + head]))
            if not outcomes[head][-1][1]:
                break
    return outcomes


def _guesses(model: MedusaModel, hidden: Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """The best token of every head at every position, and its probability as a server computes it."""
    heads = model.heads.num_heads
    # A server runs shared heads through the model's own logits, with what the model does to them.
    transform = (
        logit_transform(causal_lm(model.base_model).config) if model.heads.form == "shared" else torch.Tensor.float
    )
    tokens: list[list[int]] = []
    probabilities: list[list[float]] = []
    for states in torch.split(hidden, max(1, _LOGITS_AT_ONCE // (heads * model.heads.vocab_size))):
        logits = transform(model.draft_logits(states, heads)).float()
        values, best = logits.max(-1)
        tokens += best.tolist()
        probabilities += (values - logits.logsumexp(-1)).exp().tolist()
    return tokens, probabilities
