"""A plugin for tests only: lets axolotl train with several CPU processes, which its own settings do not foresee."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin


class CpuRanksPlugin(BasePlugin):
    """No device map, and gloo between the processes."""

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        cfg.device_map = None

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {"ddp_backend": "gloo"}
