"""What lies in a run's directory that a report can show: its log, facts of its heads, and what was measured with them.

Contract: reads JSON by its content, whatever a file is called; leaves out what it does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axolotl_medusa.measuring.training_plots import Series, read_series
from axolotl_medusa.model.checkpoints import checkpoints
from axolotl_medusa.model.file_names import CONFIG_FILE, HEADS_FOLDER, META_FILE
from axolotl_medusa.model.json_files import read_json, read_json_if_there

_KEYS = {
    "evaluations": {"heads", "prompts_file", "overall", "categories"},
    "trees": {"choices", "num_nodes", "calibration"},
    "plans": {"format", "step_s"},
}
"""What tells the files apart; `evaluate`, `tree` and `plan` write them."""

_LARGEST_BYTES = 20_000_000


@dataclass
class Found:
    """What a report shows.

    Attributes:
        directory: Of the run.
        config: The heads' `config.json`, empty where there are none yet.
        meta: Their `medusa_meta.json`.
        series: What the run logged, by picture.
        evaluations: By file what `axolotl-medusa evaluate` measured.
        trees: By file candidate trees.
        plans: By file measurements of a server.
        notes: What is missing, a line each.
    """

    directory: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    series: Mapping[str, Series] = field(default_factory=dict)
    evaluations: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    trees: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    plans: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_files(output_dir: str | Path, more: Iterable[str | Path] = ()) -> Found:
    """Reads what is there.

    Args:
        output_dir: What training wrote to.
        more: Files of measurements that lie elsewhere.

    Raises:
        ValueError: There is neither a log nor a measurement, or one of `more` is neither of them.
    """
    found = Found(Path(output_dir).expanduser())
    if not found.directory.is_dir():
        raise ValueError(f"{found.directory} is no directory, expected what training wrote")
    heads = _heads_dir(found.directory)
    if heads is not None:
        found.config, found.meta = read_json_if_there(heads / CONFIG_FILE), read_json_if_there(heads / META_FILE)
    try:
        found.series = read_series(found.directory)
    except ValueError as error:
        found.notes.append(str(error))
    folders = [found.directory, *([] if heads is None else [heads])]
    for file in sorted(path for folder in folders for path in folder.glob("*.json")):
        _take(found, file)
    for file in map(Path, more):
        if not _take(found, file.expanduser(), strict=True):
            raise ValueError(f"{file} is none of what evaluate, tree and plan write, expected one of their JSON files")
    if not (found.series or found.evaluations or found.trees or found.plans):
        raise ValueError(f"there is nothing to report of {found.directory}: {found.notes[0]}")
    return found


def _heads_dir(directory: Path) -> Path | None:
    if (directory / HEADS_FOLDER).is_dir():
        return directory / HEADS_FOLDER
    if (directory / META_FILE).is_file():
        return directory
    last = checkpoints(directory, HEADS_FOLDER)
    return last[-1] / HEADS_FOLDER if last else None


def _take(found: Found, file: Path, *, strict: bool = False) -> bool:
    """Adds a file to what it is; false where it is nothing of ours."""
    if not strict and (not file.is_file() or file.stat().st_size > _LARGEST_BYTES):
        return False
    try:
        content = read_json(file)
    except ValueError:
        if strict:
            raise
        return False
    for kind, keys in _KEYS.items():
        if keys <= content.keys():
            getattr(found, kind)[file.name] = content
            return True
    return False
