"""A plugin for tests only: stands for Ray in the process that hands a run to Ray's workers.

Importing it makes the names of `ray.train` that axolotl imports. `fit` keeps what the workers would get in the file that
`RAY_WORK` names; run as a program, this module is one of them: a new process in a group that Ray has made.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from axolotl.integrations.base import BasePlugin


class TorchTrainer:
    """As Ray's: gets the function and its argument, and how many workers there are to be."""

    def __init__(self, function: Any, train_loop_config: dict[str, Any], scaling_config: Any, run_config: Any) -> None:
        assert scaling_config.num_workers == 2
        self.work = function.__name__, train_loop_config

    def fit(self) -> None:
        Path(os.environ["RAY_WORK"]).write_bytes(pickle.dumps(self.work))


def _module(name: str, **names: Any) -> None:
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(names)


_module("ray")
_module("ray.train", RunConfig=SimpleNamespace, ScalingConfig=SimpleNamespace)
_module("ray.train.torch", TorchTrainer=TorchTrainer)
_module("ray.train.huggingface")
_module("ray.train.huggingface.transformers", prepare_trainer=lambda trainer: trainer)
for child in ("ray.train", "ray.train.huggingface", "ray.train.huggingface.transformers"):
    parent, _, name = child.rpartition(".")
    setattr(sys.modules[parent], name, sys.modules[child])


class RayStandInPlugin(BasePlugin):
    """Named in a YAML so that this module is imported."""


if __name__ == "__main__":
    import torch
    from axolotl.cli import train

    torch.distributed.init_process_group("gloo")
    function, argument = pickle.loads(Path(sys.argv[1]).read_bytes())
    getattr(train, function)(argument)
