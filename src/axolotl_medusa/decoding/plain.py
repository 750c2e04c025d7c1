"""Plain greedy decoding, one token per forward: the baseline that Medusa decoding is measured against.

Contract: the shortest loop over transformers' own cache. It shares no code with the tree decoder, so that agreement with
it says something, and does less per token than transformers' `generate`, so that speed-ups are not flattered.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from axolotl_medusa.model.anatomy import backbone, causal_lm, logit_transform, output_embedding


class PlainDecoding:
    """One prompt that is being continued greedily; call `step` until `done`.

    Args:
        base_model: The causal LM, possibly wrapped by peft.
        input_ids: The prompt, `[1, prompt]`, on the model's device.
        max_new_tokens: Tokens to write at most.
        eos_token_ids: Tokens after which it stops.

    Attributes:
        tokens: New tokens.
    """

    def __init__(
        self, base_model: Any, input_ids: Tensor, max_new_tokens: int, eos_token_ids: Collection[int] = ()
    ) -> None:
        self.tokens: list[int] = []
        self._backbone, self._lm_head = backbone(base_model), output_embedding(base_model)
        config = causal_lm(base_model).config
        self._transform = logit_transform(config)
        self._cache = DynamicCache(config=config)
        self._next, self._max_new_tokens, self._eos = input_ids, max_new_tokens, frozenset(eos_token_ids)

    @property
    def done(self) -> bool:
        """Whether the last token was written."""
        return len(self.tokens) >= self._max_new_tokens or bool(self.tokens and self.tokens[-1] in self._eos)

    @torch.no_grad()
    def step(self) -> None:
        """One forward: over the prompt at first, over the last token from then on."""
        hidden = self._backbone(input_ids=self._next, past_key_values=self._cache, use_cache=True)[0][:, -1:]
        self._next = self._transform(self._lm_head(hidden)).argmax(-1)
        self.tokens.append(int(self._next))
