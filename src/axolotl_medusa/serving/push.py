"""Uploads an export to the Hugging Face Hub.

Contract: one directory that `axolotl-medusa export` wrote, as it is; nothing is converted, and nothing else is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CARD_FILE = "README.md"
_WEIGHTS = ("*.safetensors", "*.pt")
_META_FILE = "medusa_meta.json"
_SECRET = re.compile(r"(api_?key|(auth|access|hub|hf)_?token|secret|password)$", re.IGNORECASE)


def push(directory: str | Path, repo: str, private: bool = False) -> str:
    """Creates the repository if needed and uploads the directory with its model card.

    Args:
        directory: What `axolotl-medusa export` wrote.
        repo: Name of the model repository, `owner/name`.
        private: Whether a new repository is private; one that exists stays as it is.

    Returns:
        The repository's address.

    Raises:
        ValueError: The directory is no export, holds an unfinished file or a secret, or the Hub refuses.
    """
    directory = Path(directory).expanduser()
    _check(directory)
    import httpx
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=directory, repo_id=repo, commit_message="Medusa heads, exported by axolotl-medusa"
        )
    except (OSError, ValueError, httpx.HTTPError) as error:  # no token, no right, a bad name, no connection
        reason = " ".join(str(error).split())
        raise ValueError(f"the Hub refused {repo}: {reason}; log in with `hf auth login` or check the name") from error
    return str(address)


def _check(directory: Path) -> None:
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory: expected one that `axolotl-medusa export` wrote")
    if not (directory / _CARD_FILE).is_file() or not any(next(directory.glob(kind), None) for kind in _WEIGHTS):
        raise ValueError(
            f"{directory} has no {_CARD_FILE} with weights beside it: write an export with `axolotl-medusa export` and push it"
        )
    if unfinished := next(directory.rglob("*.part"), None):
        raise ValueError(f"{unfinished} is half a file: an export was interrupted; run it again")
    meta = directory / _META_FILE
    if meta.is_file() and (key := next(_secrets(json.loads(meta.read_text(encoding="utf-8"))), None)):
        raise ValueError(f"{meta} holds the YAML's {key}, which would be published: empty it there first")


def _secrets(content: Any) -> Iterator[str]:
    """Keys of a JSON value that are named like a secret and hold a text."""
    if isinstance(content, list):
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if isinstance(value, str) and value and _SECRET.search(str(key)):
            yield key
        yield from _secrets(value)
