"""The checkpoints in an output_dir, by the steps in their names.

Contract: knows folder names alone; when files were last changed says nothing, since copying changes it.
"""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_step(directory: str | Path) -> int | None:
    """The step in a checkpoint's name, None where a path has none."""
    found = _NAME.fullmatch(Path(directory).name)
    return int(found[1]) if found else None


def checkpoints(output_dir: Path, file: str = "") -> list[Path]:
    """The checkpoints, or those that hold a file or folder of this name, from the first step to the last."""
    folders = (path for path in output_dir.glob("checkpoint-*") if path.is_dir() and (path / file).exists())
    steps = {path: checkpoint_step(path) for path in folders}
    return [path for _, path in sorted((step, path) for path, step in steps.items() if step is not None)]
