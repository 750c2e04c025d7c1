"""A plugin for tests only: two nodes that are one machine get names of their own, `node0` and `node1`."""

from __future__ import annotations

import os
import socket
from typing import Any

from axolotl.integrations.base import BasePlugin


class NamedNodesPlugin(BasePlugin):
    """Answers for the machine with the number in `NODE`."""

    def register(self, cfg: Any) -> None:
        socket.gethostname = lambda: f"node{os.environ['NODE']}"
