"""Heads are saved wherever axolotl saves the model: in checkpoints, at the end of training and at an interruption.

Contract: what a heads directory holds is `model.heads_directory`'s to say; this module only sees to it that it is written.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_medusa.model.file_names import HEADS_FOLDER
from axolotl_medusa.model.heads import attached_heads
from axolotl_medusa.model.heads_directory import (
    HeadsFile,
    heads_config,
    heads_file,
    heads_meta,
    without_heads,
    write_heads,
)

LOG = get_logger(__name__)


class HeadsSaver:
    """Saves heads beside the backbone wherever the model is saved: checkpoints, the end of training, an interruption.

    Axolotl calls the model's own `save_pretrained` directly at the end and on SIGINT, without a hook; so the instance's
    method is replaced, here and nowhere else.
    """

    def __init__(self, model: Any, cfg: DictDefault, tokenizer: Any) -> None:
        self.model = model
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.collected: HeadsFile | None = None
        self._own_save = model.save_pretrained
        model.save_pretrained = MethodType(lambda _model, *args, **kwargs: self.save(*args, **kwargs), model)

    def collect(self) -> HeadsFile:
        """Copies the heads to the CPU; under ZeRO-3 and FSDP every rank must call it."""
        recipe = "medusa-1" if self.cfg.medusa_only_heads else "medusa-2"
        config = heads_config(attached_heads(self.model), self.cfg.base_model)
        return heads_file(self.model, config, heads_meta(self.model, recipe, self.cfg))

    def save(
        self, save_directory: str | Path, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Writes the backbone without heads (Medusa-2 only) and the heads into `medusa_heads`."""
        if not self.cfg.medusa_only_heads:
            if state_dict is None:
                state_dict = self.model.state_dict()
            self._own_save(save_directory, *args, state_dict=without_heads(state_dict), **kwargs)
        directory = Path(save_directory) / HEADS_FOLDER
        write_heads(directory, self.collected or self.collect())
        self.tokenizer.save_pretrained(str(directory))
        LOG.info(f"Medusa heads saved to {directory}")
