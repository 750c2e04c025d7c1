"""Whether a file belongs to the directory that names it.

Contract: looks at paths alone; imports nothing of ours.
"""

from __future__ import annotations

from pathlib import Path


def stays_inside(file: Path, directory: Path) -> bool:
    """Whether a path leads to a file of `directory`, links followed.

    The Hub's cache is one place: its `snapshots/COMMIT` hold links into the `blobs` beside them.
    """
    home, target = directory.resolve(), file.resolve()
    blobs = [place.parents[1] / "blobs" for place in (home, *home.parents) if place.parent.name == "snapshots"]
    return any(target.is_relative_to(place) for place in (home, *blobs))
