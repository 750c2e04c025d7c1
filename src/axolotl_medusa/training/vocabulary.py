"""Tokens that a YAML adds to its base model: axolotl then makes the embeddings larger, and heads fit another model.

Contract: knows a tokenizer, the rows of an embedding and the YAML; neither loads nor changes a model.
"""

from __future__ import annotations

from typing import Any

from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

_NAMED = 3
"""New tokens that a line names."""


def tokenizer_and_rows(cfg: DictDefault) -> tuple[Any, int] | None:
    """The tokenizer with the YAML's own tokens, and the rows of the embeddings of the base model on disk.

    Args:
        cfg: The validated YAML.

    Returns:
        None where one of them cannot be read: axolotl says so when it loads them.
    """
    from axolotl.loaders import load_tokenizer
    from axolotl.loaders.utils import load_model_config

    try:
        return load_tokenizer(cfg), load_model_config(cfg).get_text_config().vocab_size
    except (OSError, ValueError, AttributeError):
        return None


def new_tokens(tokenizer: Any, rows: int) -> list[str]:
    """Tokens that an embedding of `rows` rows has no place for, in the order of their ids."""
    return [token for number, token in sorted((v, k) for k, v in tokenizer.get_vocab().items()) if number >= rows]


def check_new_tokens(cfg: DictDefault, tokenizer: Any, rows: int) -> None:
    """Refuses new tokens in Medusa-1, before the model loads; in Medusa-2 says what has to be served.

    Args:
        cfg: The validated YAML.
        tokenizer: The tokenizer with the YAML's own tokens.
        rows: Rows of the base model's embeddings.

    Raises:
        ValueError: Medusa-1 would train heads for a model that is nowhere on disk.
    """
    new = new_tokens(tokenizer, rows)
    if not new:
        return
    shown = ", ".join(map(repr, new[:_NAMED])) + (f" and {len(new) - _NAMED} more" if len(new) > _NAMED else "")
    if cfg.medusa_only_heads:
        raise ValueError(
            f"base_model {cfg.base_model} has embeddings for {rows} tokens, and {shown} would make them larger: Medusa-1 writes no "
            f"model, and its heads would fit none on disk; {_instead(cfg, tokenizer, new, rows)}"
        )
    LOG.warning(
        f"{shown} {'is' if len(new) == 1 else 'are'} new to base_model, whose embeddings become larger: base_model itself no longer "
        f"fits the heads; serve {served_model(cfg)}"
    )


def _instead(cfg: DictDefault, tokenizer: Any, new: list[str], rows: int) -> str:
    """What to write instead, key by key."""
    known = tokenizer.eos_token if tokenizer.eos_token and tokenizer.eos_token_id < rows else None
    special = dict(cfg.special_tokens or {})
    advice = []
    for key, token in special.items():
        if token in new:
            advice.append(f"special_tokens {key}: use {f'{known!r}, which it has' if known else 'a token that it has'}")
    if any(token in new for token in [*(cfg.tokens or []), *(special.get("additional_special_tokens") or [])]):
        advice.append(
            "tokens: remove them, or give reserved tokens of the model these texts with added_tokens_overrides"
        )
    return "; ".join(advice) or "the tokenizer is not the model's: set tokenizer_config to the right one"


def served_model(cfg: DictDefault) -> str:
    """What a server needs where training changed the size of the vocabulary."""
    if cfg.adapter:
        return f"the model that `axolotl-medusa export {cfg.output_dir} --to vllm --out DIR --model merged` writes"
    return f"the model in {cfg.output_dir}"


def check_rows(cfg: DictDefault, before: int, after: int) -> None:
    """Refuses embeddings of another size in Medusa-1, by whatever key they were resized.

    Raises:
        ValueError: They were.
    """
    if cfg.medusa_only_heads and before != after:
        raise ValueError(
            f"the embeddings of base_model {cfg.base_model} have {before} rows, and axolotl made {after} of them: Medusa-1 writes no "
            "model, and its heads would fit none on disk; remove resize_token_embeddings_to_32x, shrink_embeddings, and tokens "
            "that the model does not have"
        )
