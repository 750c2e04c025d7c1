"""Uploads an export to the Hugging Face Hub.

Contract: one directory that `axolotl-medusa export` wrote, as it is; nothing is converted, and nothing else is read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from axolotl_medusa.model.file_names import META_FILE
from axolotl_medusa.model.secrets import secrets_in, without_secrets

_CARD_FILE = "README.md"
_WEIGHTS = ("*.safetensors", "*.pt")
_TEXT_FILES = (".json", ".jinja", ".md", ".txt", ".yaml", ".yml")
_VOCABULARY = re.compile(r"(tokenizer|vocab|added_tokens)\.json$|(vocab|merges)\.txt$")
"""Files whose words are a tokenizer's."""


def push(directory: str | Path, repo: str, private: bool = False) -> str:
    """Creates the repository if needed and uploads the directory with its model card.

    Args:
        directory: What `axolotl-medusa export` wrote.
        repo: Name of the model repository, `owner/name`.
        private: Whether a new repository is private; one that exists stays as it is.

    Returns:
        The repository's address.

    Raises:
        ValueError: The directory is no export, holds an unfinished file or a secret, or the Hub refuses it.
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
        reason = without_secrets(" ".join(str(error).split()))
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
    for file in sorted(path for path in directory.rglob("*") if path.suffix in _TEXT_FILES and path.is_file()):
        if not _VOCABULARY.match(file.name) and (where := _secret_in(file)):
            what = f"the YAML's {where}" if file.name == META_FILE else f"a credential ({where})"
            raise ValueError(f"{file} holds {what}, which would be published: empty it there first")


def _secret_in(file: Path) -> str | None:
    """Where the first secret of a text file stands: the setting's name in JSON, else the line."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix == ".json":
        try:
            return next(secrets_in(json.loads(text)), None)
        except (ValueError, RecursionError):
            pass
    return next(
        (f"line {number}" for number, line in enumerate(text.splitlines(), 1) if without_secrets(line) != line), None
    )
