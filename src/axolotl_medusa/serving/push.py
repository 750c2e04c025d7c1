"""Uploads an export to the Hugging Face Hub.

Contract: one directory that `axolotl-medusa export` wrote, of it the files that an export has, as they are; nothing is
converted, and nothing else is read.
"""

from __future__ import annotations

import glob
import io
import json
import logging
import re
import tokenize
from collections.abc import Collection, Iterator
from pathlib import Path

from axolotl_medusa.model.file_names import CARD_FILE, META_FILE
from axolotl_medusa.model.secrets import secrets_in, without_secrets
from axolotl_medusa.serving.export_files import published_files, read_marker, replaced_files

LOG = logging.getLogger(__name__)

_WEIGHTS = (".safetensors", ".pt")
_BINARY = (".model", ".tiktoken")
"""Tokenizers that are no text."""
_WORDS = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
"""Kinds of tokens of Python code that hold words of a person."""
_VOCABULARY = re.compile(r"(tokenizer|vocab|added_tokens)\.json$|(vocab|merges)\.txt$")
"""Files whose words are a tokenizer's."""


def push(directory: str | Path, repo: str, private: bool = False) -> str:
    """Creates the repository if needed and uploads the export with its model card; other files in its directory stay here.

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
    files = _check(directory)
    if others := _others(directory, files):
        LOG.info("not uploaded, as they are no part of the export: %s", ", ".join(others))
    import httpx
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=directory,
            repo_id=repo,
            commit_message="Medusa heads, exported by axolotl-medusa",
            allow_patterns=[glob.escape(file.as_posix()) for file in files],
        )
    except (OSError, ValueError, httpx.HTTPError) as error:  # no token, no right, a bad name, no connection
        reason = without_secrets(" ".join(str(error).split()))
        raise ValueError(f"the Hub refused {repo}: {reason}; log in with `hf auth login` or check the name") from error
    return str(address)


def _others(directory: Path, files: Collection[Path]) -> list[str]:
    """Names at the top of a directory that none of the files is in."""
    tops = {file.parts[0] for file in files}
    return sorted(without_secrets(path.name) for path in directory.iterdir() if path.name not in tops)


def _check(directory: Path) -> list[Path]:
    """The files to upload, relative to the directory, once it is known that all of them may be published."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory: expected one that `axolotl-medusa export` wrote")
    if read_marker(directory) is None:
        raise ValueError(
            f"{directory} is no export, expected a {META_FILE} that says so: write one with `axolotl-medusa export` and push it"
        )
    if unfinished := next((file for file in replaced_files(directory) if file.suffix == ".part"), None):
        raise ValueError(f"{unfinished} is half a file: an export was interrupted; run it again")
    files = published_files(directory)
    if Path(CARD_FILE) not in files or not any(file.suffix in _WEIGHTS for file in files):
        raise ValueError(
            f"{directory} has no {CARD_FILE} with weights beside it: write an export with `axolotl-medusa export` and push it"
        )
    for file in files:
        if where := _secret_in(directory / file):
            what = f"the YAML's {where}" if file.name == META_FILE else f"a credential ({where})"
            raise ValueError(f"{directory / file} holds {what}, which would be published: empty it there first")
    return files


def _secret_in(file: Path) -> str | None:
    """Where the first secret of a file stands: the setting's name in JSON, else the line; None for files without text."""
    if file.suffix in (*_WEIGHTS, *_BINARY) or _VOCABULARY.match(file.name):
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix == ".json":
        try:
            return next(secrets_in(json.loads(text)), None)
        except (ValueError, RecursionError):
            pass
    lines = _words_of_code(text) if file.suffix == ".py" else enumerate(text.splitlines(), 1)
    return next((f"line {number}" for number, line in lines if without_secrets(line) != line), None)


def _words_of_code(text: str) -> Iterator[tuple[int, str]]:
    """Texts and comments of Python code with their lines: names such as `token=token` are no secrets."""
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in _WORDS:
                yield token.start[0], token.string
    except (tokenize.TokenError, SyntaxError):
        yield from enumerate(text.splitlines(), 1)
