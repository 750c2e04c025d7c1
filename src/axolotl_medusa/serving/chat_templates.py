"""Whether a model's tokenizer is the one that heads were trained with: chat template and tokens.

Contract: reads tokenizer files as they are, without transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from axolotl_medusa.model.json_files import read_json


def chat_template(directory: Path) -> str | None:
    """The chat template of a tokenizer, None where it has none; of several the one that is used by default."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(directory / name).get("chat_template") if (directory / name).is_file() else None
        if isinstance(found, list):
            named = (entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default")
            found = next(named, {}).get("template")
        if isinstance(found, str):
            return found
    return None


def tokenizer_notes(trained: Path, served: Path) -> Iterator[str]:
    """What differs between the tokenizer beside the heads and the one that a server will use, a line each.

    Args:
        trained: Directory with the tokenizer that the heads were trained with.
        served: The served model's directory.
    """
    own, other = chat_template(trained), chat_template(served)
    if own is not None and (other is None or own.strip() != other.strip()):
        brings = "brings none" if other is None else "brings another"
        file = trained / "chat_template.jinja"
        advice = f"add --chat-template {file}" if file.is_file() else f"take the one in {trained}"
        yield (
            f"the heads were trained with the chat template in {trained}, but {served} {brings}: chats may be accepted less; "
            f"{advice}"
        )
    token = _other_token(trained / "tokenizer.json", served / "tokenizer.json")
    if token is not None:
        yield (
            f"the tokenizer in {served} does not number tokens as the one in {trained}, which the heads were trained with "
            f"(first difference: {token!r}): give the model that was trained as --base-model, or add --tokenizer {trained}"
        )


def _other_token(file: Path, other: Path) -> str | None:
    """The first token whose id is another in `other`, None where both are the same or one of them is missing."""
    if not file.is_file() or not other.is_file() or file.read_bytes() == other.read_bytes():
        return None
    ids, other_ids = _token_ids(file), _token_ids(other)
    if not ids or not other_ids:
        return None
    return next((token for token, number in sorted(ids.items()) if other_ids.get(token) != number), None)


def _token_ids(file: Path) -> dict[str, Any]:
    """Ids by token, empty where the file lists them in another way."""
    content = read_json(file)
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            ids[entry["content"]] = entry.get("id")
    return ids
