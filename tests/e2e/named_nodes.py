"""A plugin for tests only: two nodes that are one machine get names of their own, and it is noted which of them writes heads."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin

from axolotl_medusa.training import saving

_write = saving.write_heads


def _noted(directory: Path, *args: Any) -> None:
    with Path(os.environ["HEADS_WRITTEN"]).open("a") as lines:
        lines.write(f"{socket.gethostname()} {directory}\n")
    _write(directory, *args)


class NamedNodesPlugin(BasePlugin):
    """Answers for the node with the number in `NODE`; every write is a line of the file that `HEADS_WRITTEN` names."""

    def register(self, cfg: Any) -> None:
        socket.gethostname = lambda: f"node{os.environ['NODE']}"
        saving.write_heads = _noted
