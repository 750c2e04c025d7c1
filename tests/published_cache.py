"""A cache of the Hub that holds the small files of published models: their config and their tokenizer's."""

from __future__ import annotations

import json
from pathlib import Path

from docs.published_models import CONFIGS, TOKENIZERS


def write_cache(cache: Path) -> None:
    """Writes what the Hub's cache has of each published model that the examples train."""
    for name, tokenizer in TOKENIZERS.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
        (snapshot / "config.json").write_text(json.dumps(CONFIGS[name]))
        (snapshot / "tokenizer_config.json").write_text(json.dumps(tokenizer))
