"""A `type:` for axolotl's datasets: chat_template without the rows that it cannot render.

Contract: axolotl's own strategy does the work; `medusa_skip_bad_rows` puts this one around it.
"""

from __future__ import annotations

import contextlib
from typing import Any

from axolotl.prompt_strategies import load as load_strategy
from axolotl.prompt_tokenizers import PromptTokenizingStrategy
from axolotl.utils.dict import DictDefault

from axolotl_medusa.training.rendering import REFUSALS


class RenderableChats(PromptTokenizingStrategy):  # type: ignore[misc]
    """axolotl's strategy for chat templates, but for rows at which it would stop."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.prompter, self.tokenizer = inner.prompter, inner.tokenizer

    @property
    def supports_batched(self) -> bool:
        """Batches only can come back with fewer rows."""
        return True

    def tokenize_prompt(self, prompt: dict[str, Any]) -> dict[str, list[Any]]:
        """Tokenises a batch, a list for each column, and leaves out what cannot be."""
        tokenized: dict[str, list[Any]] = {}
        for values in zip(*prompt.values(), strict=True):
            with contextlib.suppress(*REFUSALS):
                for name, value in self.inner.tokenize_prompt(dict(zip(prompt, values, strict=True))).items():
                    tokenized.setdefault(name, []).append(value)
        return tokenized


def load(tokenizer: Any, cfg: DictDefault, ds_cfg: Any = None, processor: Any = None) -> RenderableChats:
    """What axolotl calls for `type: axolotl_medusa.training.renderable_chats`."""
    return RenderableChats(load_strategy("chat_template", tokenizer, cfg, ds_cfg, processor=processor))
