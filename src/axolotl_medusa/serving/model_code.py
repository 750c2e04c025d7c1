"""The code that a model brings with it: the files that its configurations name, and what these import from beside them.

Contract: finds files by reading, and runs none of them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from axolotl_medusa.model.file_names import CONFIG_FILE
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.model.safe_paths import stays_inside

_CONFIGS = (CONFIG_FILE, "tokenizer_config.json")
_MODULE = re.compile(r"\w+(\.\w+)*")


def model_code(directory: Path) -> list[Path]:
    """The code files of a model, relative to its directory: those of every `auto_map`, and their relative imports.

    Code that lies in another repository (`org/name--module.Class`) stays there.

    Raises:
        ValueError: A configuration is damaged.
    """
    configs = (read_json(directory / name) for name in _CONFIGS if (directory / name).is_file())
    waiting = [module for config in configs for module in _named(config.get("auto_map"))]
    found: set[Path] = set()
    while waiting:
        file = _file_of(directory, waiting.pop())
        if file is not None and file not in found:
            found.add(file)
            waiting += _imported(directory, file)
    return sorted(found)


def _named(auto_map: Any) -> Iterator[str]:
    """Modules that an `auto_map` names; a tokenizer's has a list of two classes, either of which may be missing."""
    if isinstance(auto_map, dict):
        for value in auto_map.values():
            yield from _named(value)
    elif isinstance(auto_map, list):
        for value in auto_map:
            yield from _named(value)
    elif isinstance(auto_map, str) and "--" not in auto_map:
        yield auto_map.rpartition(".")[0]


def _file_of(directory: Path, module: str) -> Path | None:
    """The file of a module below `directory`, None where there is none, or a link to a file elsewhere."""
    if not _MODULE.fullmatch(module):
        return None
    path = Path(*module.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    found = next((file for file in files if (directory / file).is_file()), None)
    return found if found and stays_inside(directory / found, directory) else None


def _imported(directory: Path, file: Path) -> Iterator[str]:
    """Modules that a file imports relatively, none that lies above `directory`."""
    try:
        tree = ast.parse((directory / file).read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # it could not be run either
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not 1 <= node.level <= len(file.parts):
            continue
        package = [*file.parts[: len(file.parts) - node.level], *filter(None, [node.module])]
        yield from (".".join(package[:length]) for length in range(1, len(package) + 1))  # with the packages around it
        yield from (".".join([*package, alias.name]) for alias in node.names)
