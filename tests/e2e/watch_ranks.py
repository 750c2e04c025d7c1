"""A plugin for tests only: says on every rank which step it has finished, and what a rank holds while a model is saved."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from transformers import Trainer, TrainerCallback

from axolotl_medusa.model.heads import attached_heads


class _Steps(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        line = f"rank {args.process_index} pid {os.getpid()} finished step {state.global_step}"
        os.write(sys.stdout.fileno(), f"\n{line}\n".encode())  # at once: other ranks and progress bars write there too


class WatchRanksPlugin(BasePlugin):
    """Prints finished steps; with `COPIES` set, appends `RANK COPIES` to that file at every save.

    A copy is a plain tensor of the shape of a head's output layer that is none of the model's.
    """

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return [_Steps()]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if "COPIES" not in os.environ:
            return
        save_model = Trainer.save_model

        def watched(self: Any, *args: Any, **kwargs: Any) -> None:
            with Path(os.environ["COPIES"]).open("a") as lines:
                lines.write(f"{self.args.process_index} {_copies(self.model)}\n")
            save_model(self, *args, **kwargs)

        Trainer.save_model = watched


def _copies(model: Any) -> int:
    heads = attached_heads(model)
    shape = (heads.vocab_size, heads.hidden_size)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    tensors = (held for held in gc.get_objects() if type(held) is torch.Tensor and tuple(held.shape) == shape)
    return sum(held.data_ptr() not in own for held in tensors)
