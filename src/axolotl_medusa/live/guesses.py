"""What the model and its heads say along a text that a server wrote, and what they would say with parts of the heads missing.

Contract: one forward of the model per text; the heads are as they were afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.model.anatomy import backbone, causal_lm

_LOGITS_AT_ONCE = 1 << 25
"""Elements of logits that are held at a time."""

TRAINED = "trained"
WITHOUT_BIASES = "without biases"
WITHOUT_BLOCKS = "without blocks"
WITHOUT_OUTPUT_LAYERS = "without output layers"
"""Forms of the heads: as they were trained, and as a server has them that did not find a part of their tensors."""


@dataclass(frozen=True)
class Along:
    """What is said at every token of a continuation.

    Attributes:
        own: Whether each token is the model's own first choice.
        logprobs: The log-probability that the model gives each token.
        drafts: By form of the heads, `[positions][heads]`: what each head guesses where token i is the newest.
    """

    own: list[bool]
    logprobs: list[float]
    drafts: dict[str, list[list[int]]]


@torch.no_grad()
def along(model: MedusaModel, prompt: Sequence[int], tokens: Sequence[int], *, adapter: bool = True) -> Along:
    """Reads a continuation.

    Args:
        model: The model with its heads.
        prompt: Tokens before it.
        tokens: The continuation.
        adapter: Whether an adapter on the model is on.
    """
    device = causal_lm(model.base_model).get_input_embeddings().weight.device
    text = torch.tensor([[*prompt, *tokens]], device=device)
    base: Any = model.base_model
    with nullcontext() if adapter else base.disable_adapter():
        hidden = backbone(model.base_model)(input_ids=text, use_cache=False)[0][0]
        own, logprobs = _said(model, hidden[len(prompt) - 1 : -1], text[0, len(prompt) :])
    newest = hidden[len(prompt) - 1 : -1]
    drafts = {}
    for form in forms(model):
        with _form(model, form):
            drafts[form] = _guessed(model, newest, form)
    return Along(own, logprobs, drafts)


def forms(model: MedusaModel) -> Iterator[str]:
    """The forms that are told apart for these heads; shared heads have no output layers to be missing."""
    yield from (TRAINED, WITHOUT_BIASES, WITHOUT_BLOCKS)
    if model.heads.form != "shared":
        yield WITHOUT_OUTPUT_LAYERS


def _said(model: MedusaModel, hidden: Tensor, tokens: Tensor) -> tuple[list[bool], list[float]]:
    own: list[bool] = []
    logprobs: list[float] = []
    for states, wanted in _in_chunks(hidden, tokens, model.heads.vocab_size):
        logits = model.logits(states).float().to(wanted.device)
        own += (logits.argmax(-1) == wanted).tolist()
        logprobs += logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0].tolist()
    return own, logprobs


def _guessed(model: MedusaModel, hidden: Tensor, form: str) -> list[list[int]]:
    num_heads = model.heads.num_heads
    rows: list[list[int]] = []
    for states, _ in _in_chunks(hidden, hidden, model.heads.vocab_size * num_heads):
        if form == WITHOUT_OUTPUT_LAYERS:
            states = torch.stack([model.heads.hidden(head, states) for head in range(num_heads)], -2)
            logits = model.logits(states)
        else:
            logits = model.draft_logits(states, num_heads)
        rows += logits.argmax(-1).tolist()
    return rows


def _in_chunks(hidden: Tensor, other: Tensor, elements: int) -> Iterator[tuple[Tensor, Tensor]]:
    chunk = max(1, _LOGITS_AT_ONCE // elements)
    return zip(torch.split(hidden, chunk), torch.split(other, chunk), strict=True)


@contextmanager
def _form(model: MedusaModel, form: str) -> Iterator[None]:
    """Makes the heads what they are in a form, for a while."""
    linear = [part for name, part in model.heads.named_parameters() if ".linear." in name]
    zeroed = {
        WITHOUT_BIASES: [parameter for parameter in linear if parameter.dim() == 1],
        WITHOUT_BLOCKS: linear,  # SiLU(0) = 0: the block is the identity
    }.get(form, [])
    kept = [parameter.clone() for parameter in zeroed]
    try:
        for parameter in zeroed:
            parameter.zero_()
        yield
    finally:
        for parameter, values in zip(zeroed, kept, strict=True):
            parameter.copy_(values)
