"""Whether a file belongs to the directory that names it.

Contract: looks at paths alone; imports nothing of ours.
"""

from __future__ import annotations

from pathlib import Path


def stays_inside(file: Path, directory: Path) -> bool:
    """Whether a path leads to a file of `directory`, links followed.

    A link into the `blobs` of the Hub's cache counts as one: its `snapshots`, and older downloads into a directory of the
    user's, hold nothing but such links.
    """
    target = file.resolve()
    is_blob = target.parent.name == "blobs" and (target.parents[1] / "snapshots").is_dir()
    return is_blob or target.is_relative_to(directory.resolve())
