"""A plugin for tests only: counts the runs of the backbone in training, and can kill the process at one of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin

from axolotl_medusa.model.anatomy import backbone


class WatchBackbonePlugin(BasePlugin):
    """Writes the epoch of each run to the file that `BACKBONE_RUNS` names; `KILL_AT` is the run at which SIGKILL comes."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        runs = Path(os.environ["BACKBONE_RUNS"])

        def watch(*_: Any) -> None:
            with runs.open("a") as lines:
                lines.write(f"{trainer.state.epoch or 0.0}\n")
            if len(runs.read_text().splitlines()) == int(os.environ.get("KILL_AT", 0)):
                os.kill(os.getpid(), signal.SIGKILL)

        backbone(trainer.model).register_forward_pre_hook(watch)
