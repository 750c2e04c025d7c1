"""Files that a command may write: new ones, and those that the same command wrote before.

Contract: looks at what is there and refuses; writes nothing. It is asked before anything is measured.
"""

from __future__ import annotations

import json
from pathlib import Path

_LARGEST_REPORT_BYTES = 100_000_000
"""A larger file is not parsed: it is none of ours."""


def check_json_output(path: str | Path, keys: set[str], option: str) -> None:
    """Refuses a file that is there already, unless it is a JSON object with the keys of what will be written.

    Args:
        path: The file to write.
        keys: What every earlier file of the same kind has.
        option: The command's option that names the file, for the message.

    Raises:
        ValueError: The file is another, a directory, or its directory is missing.
    """
    path = Path(path).expanduser()
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no directory, expected one to write {path.name} in: make it first")
    if path.is_dir():
        raise ValueError(f"{path} is a directory, expected a file to write: choose another {option}")
    if path.is_file() and path.stat().st_size and not _has_keys(path, keys):
        raise ValueError(
            f"{path} is there already and was not written by this command, expected a new file: choose another {option}"
        )


def _has_keys(path: Path, keys: set[str]) -> bool:
    if path.stat().st_size > _LARGEST_REPORT_BYTES:
        return False
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and keys <= content.keys()
