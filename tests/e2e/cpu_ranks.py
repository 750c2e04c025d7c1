"""A plugin for tests only: lets axolotl train with several CPU processes, which its own settings do not foresee."""

from __future__ import annotations

from typing import Any

from accelerate.parallelism_config import ParallelismConfig
from axolotl.integrations.base import BasePlugin


class CpuRanksPlugin(BasePlugin):
    """No device map, gloo between the processes, and for FSDP2 a mesh of CPUs."""

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        cfg.device_map = None
        if cfg.fsdp_config:
            build = ParallelismConfig.build_device_mesh
            ParallelismConfig.build_device_mesh = lambda self, device_type: build(self, "cpu")

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {"ddp_backend": "gloo"}
