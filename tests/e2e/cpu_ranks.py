"""A plugin for tests only: lets axolotl train with several CPU processes, which its own settings do not foresee."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from axolotl.integrations.base import BasePlugin

_choose = PartialState._prepare_backend


def _gloo_for_deepspeed(state: PartialState, *args: Any, **kwargs: Any) -> tuple[str | None, DistributedType]:
    """Where accelerate knows no backend it takes every process for the only one, and DeepSpeed's ranks would all be rank 0."""
    backend, kind = _choose(state, *args, **kwargs)
    is_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    return ("gloo" if backend is None and is_deepspeed else backend), kind


_begin = AcceleratorState.__init__


def _fsdp_on_cpus(state: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    """Accelerate knows FSDP on accelerators only, and quietly makes it DDP on CPUs."""
    _begin(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = fsdp_plugin
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def _no_peers(*_: Any) -> bool:
    """Axolotl asks whether GPUs reach each other, and a CUDA build of torch without a driver raises what it does not expect."""
    return False


if not torch.cuda.is_available():
    torch.cuda.can_device_access_peer = _no_peers
PartialState._prepare_backend = _gloo_for_deepspeed
AcceleratorState.__init__ = _fsdp_on_cpus


class CpuRanksPlugin(BasePlugin):
    """No device map, gloo between the processes, and for FSDP2 a mesh of CPUs; importing it changes accelerate as said above."""

    def register(self, cfg: Any) -> None:
        if cfg.get("deepspeed"):
            import deepspeed.comm.torch

            # DeepSpeed compiles C++ for a minute to share memory between processes; gloo does without.
            deepspeed.comm.torch.build_shm_op = lambda: None

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        cfg.device_map = None
        if cfg.fsdp_config:
            build = ParallelismConfig.build_device_mesh
            ParallelismConfig.build_device_mesh = lambda self, device_type: build(self, "cpu")

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {"ddp_backend": "gloo"}
