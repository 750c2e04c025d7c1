"""Forms of heads, and how a `config.json` of a heads directory names what they are.

Contract: pure functions of configs; imports nothing, so that what only reads JSON needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

HeadForm = Literal["separate", "shared", "trained"]

FORM_KEY = "medusa_lm_head"
"""Names the form where `original_lm_head` alone does not tell it."""

TOKEN_MAP = "token_map"
"""Name of the tokens that heads of a draft vocabulary choose among, in the state dict and in the file."""

DRAFT_VOCAB_KEY = "truncated_vocab_size"
"""How many these are."""


def form_of(config: Mapping[str, Any]) -> HeadForm:
    """Form of the heads that a config describes.

    `original_lm_head` tells servers that one output layer follows all heads' blocks; whether that is the model's or one
    that was trained for the heads, only we ask.
    """
    if not config["original_lm_head"]:
        return "separate"
    return "trained" if config.get(FORM_KEY) == "trained" else "shared"
