"""Which files of a directory belong to the export in it; all others are the user's.

Contract: knows names alone, those that every export has and those that this one has written down; changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from axolotl_medusa.model.file_names import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CARD_FILE,
    CONFIG_FILE,
    META_FILE,
    TOKENIZER_FILES,
)
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.model.safe_paths import stays_inside
from axolotl_medusa.serving.format_rules import TARGETS

MERGED_FOLDER = "merged_model"
"""Where the merged model lies beside heads that have a file of their own."""

WEIGHTS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    ADAPTER_FILE,
    *sorted({target.file for target in TARGETS.values() if target.file}),
)
ONNX_FILES = ("model.onnx", "model.onnx.data", "medusa_head_*.onnx", "medusa_onnx.json")
"""What an export to ONNX writes."""

_WRITTEN = (*WEIGHTS, *ONNX_FILES, "model.safetensors.index.json", CONFIG_FILE, ADAPTER_CONFIG_FILE, CARD_FILE)
_COPIED = ("generation_config.json", *TOKENIZER_FILES)
_PART = re.compile(r"(\.[0-9a-f]+)?\.part$")
"""What an interrupted export leaves: the name of the file that it wrote, and this."""


def read_marker(directory: Path) -> dict[str, Any] | None:
    """What an export wrote down about itself, None where the directory is none.

    Raises:
        ValueError: The file that would say so is damaged.
    """
    file = directory / META_FILE
    marker = read_json(file).get("export") if file.is_file() else None
    return marker if isinstance(marker, dict) else None


def replaced_files(directory: Path) -> list[Path]:
    """Files of an earlier export, complete or not, that another one in the same directory takes away."""
    written = [path for path in _files(directory) if _is_one_of(_PART.sub("", path.name), _WRITTEN)]
    marker = [path for path in directory.glob(f"{META_FILE}.*") if _PART.sub("", path.name) == META_FILE]
    return sorted({*written, *marker, *_noted(directory)})


def published_files(directory: Path) -> list[Path]:
    """Files of an export that may leave the machine, relative to its directory."""
    names = (*_WRITTEN, *_COPIED)
    found = [path for path in _files(directory) if _is_one_of(path.name, names) and path.suffix != ".py"]
    kept = [path for path in {*found, *_noted(directory), directory / META_FILE} if stays_inside(path, directory)]
    return sorted(path.relative_to(directory) for path in kept)


def _files(directory: Path) -> Iterator[Path]:
    for folder in (directory, directory / MERGED_FOLDER):
        if folder.is_dir():
            yield from (path for path in folder.iterdir() if path.is_file() or path.is_symlink())


def _is_one_of(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _noted(directory: Path) -> list[Path]:
    """The copies that an export has written down: a tokenizer's and a model's files, by the names that they had."""
    names = (read_marker(directory) or {}).get("files")
    paths = [directory / name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return [path for path in paths if "\0" not in str(path) and path.is_file() and stays_inside(path, directory)]
