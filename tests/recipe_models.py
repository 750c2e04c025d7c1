"""Directories with the small files that a recipe reads: a config and a tokenizer's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import COMMON, FAMILIES

TEMPLATE = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
SWITCH = TEMPLATE + "{% if enable_thinking is false %}<think></think>{% endif %}"
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write_model(directory: Path, family: str = "llama", template: str | None = TEMPLATE, **changes: Any) -> Path:
    """Writes the small files of a model of a family; `changes` are of its config."""
    directory.mkdir(parents=True)
    (directory / "model.safetensors").touch()
    config = {**COMMON, **FAMILIES[family], **changes}
    config.pop("attn_implementation")
    (directory / "config.json").write_text(json.dumps(config))
    tokens = {**LLAMA_TOKENS, **({"chat_template": template} if template else {})}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokens))
    return directory
