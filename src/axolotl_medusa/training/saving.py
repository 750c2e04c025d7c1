"""Heads are saved wherever axolotl saves the model: in checkpoints, at the end of training and at an interruption.

Contract: what a heads directory holds is `model.heads_directory`'s to say; this module only sees to it that it is written,
from a copy that no rank makes but the one that writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_medusa.model.anatomy import frozen_output_embedding, output_embedding
from axolotl_medusa.model.checkpoints import checkpoints
from axolotl_medusa.model.divided_parameters import is_divided
from axolotl_medusa.model.file_names import HEADS_FOLDER, STATE_FILE
from axolotl_medusa.model.heads import attached_heads
from axolotl_medusa.model.heads_directory import (
    HeadsFile,
    heads_config,
    heads_file,
    heads_meta,
    heads_tensors,
    open_heads,
    parameter_hash,
    without_heads,
    write_heads,
)
from axolotl_medusa.training.stopping import stop

LOG = get_logger(__name__)


class HeadsSaver:
    """Saves heads beside the model wherever it is saved: checkpoints, the end of training, an interruption.

    Axolotl calls the model's own `save_pretrained` directly at the end and on SIGINT, without a hook; so the instance's
    method is replaced, here and nowhere else. At the end it calls it on every machine.

    Args:
        model: The model with its heads.
        cfg: The validated YAML.
        tokenizer: Saved beside the heads.
        writes: Whether this process is the one that writes; on others the model's own method does nothing.

    Attributes:
        written: Where this process has written heads so far.
    """

    def __init__(self, model: Any, cfg: DictDefault, tokenizer: Any, writes: bool = True) -> None:
        self.model = model
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.writes = writes
        self.written: list[Path] = []
        self._collected: HeadsFile | None = None
        self._lm_head_sha256: str | None = None
        self._own_save = model.save_pretrained
        model.save_pretrained = MethodType(lambda _model, *args, **kwargs: self.save(*args, **kwargs), model)

    @contextlib.contextmanager
    def collecting(self, writes: bool) -> Iterator[None]:
        """Keeps the heads for the `save` calls inside; every rank must enter.

        Args:
            writes: Whether this rank will write; only that one holds a copy.
        """
        if writes:
            self._collected = self._collect()
        else:
            self._take_part()
        try:
            yield
        finally:
            self._collected = None

    @contextlib.contextmanager
    def saving(self, directory: str | Path, writes: bool) -> Iterator[None]:
        """As `collecting`, for what saves the model into `directory`; the heads come there also where that saves by other ways."""
        with self.collecting(writes):
            before = len(self.written)
            yield
            if writes and Path(directory).resolve() not in self.written[before:]:
                self.write(directory)

    def _collect(self) -> HeadsFile:
        lm_head_sha256 = self._lm_head_hash()
        recipe = "medusa-1" if self.cfg.medusa_only_heads else "medusa-2"
        config = heads_config(attached_heads(self.model), self.cfg.base_model)
        return heads_file(self.model, config, heads_meta(self.model, recipe, self.cfg, lm_head_sha256))

    def _take_part(self) -> None:
        """Gathers what `_collect` gathers, in its order, and keeps nothing."""
        self._lm_head_hash(keep=False)
        heads_tensors(self.model, keep=False)

    def _lm_head_hash(self, keep: bool = True) -> str:
        """The output embedding's hash, computed again only where training changes it."""
        weight = frozen_output_embedding(output_embedding(self.model)).weight
        if self._lm_head_sha256 is None or weight.requires_grad:
            self._lm_head_sha256 = parameter_hash(weight, keep)
        return self._lm_head_sha256

    def save(
        self, save_directory: str | Path, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Writes the model without heads (Medusa-2 only) and the heads into `medusa_heads`.

        Raises:
            SystemExit: The weights are divided among ranks and only this one came here, as at Ctrl-C: gathering them would
                wait for ranks that do something else.
        """
        collected = self._collected is not None and (self.cfg.medusa_only_heads or state_dict is not None)
        if not collected and any(map(is_divided, self.model.parameters())):
            raise stop(self._nothing_saved(save_directory))
        if not self.writes:
            return  # two machines would write the same files of a shared disk at once
        if not self.cfg.medusa_only_heads:
            if state_dict is None:
                state_dict = self.model.state_dict()
            self._own_save(save_directory, *args, state_dict=without_heads(state_dict), **kwargs)
        self.write(save_directory)

    def write(self, save_directory: str | Path) -> None:
        """Writes the heads into `medusa_heads`."""
        directory = Path(save_directory) / HEADS_FOLDER
        write_heads(directory, self._collected or self._collect())
        self.tokenizer.save_pretrained(str(directory))
        self.written.append(Path(save_directory).resolve())
        LOG.info(f"Medusa heads saved to {directory}")

    def _nothing_saved(self, save_directory: str | Path) -> str:
        whole = checkpoints(Path(self.cfg.output_dir), STATE_FILE)  # the file that is written last
        resume = (
            f"resume_from_checkpoint: {whole[-1]} goes on from there"
            if whole
            else "there is no checkpoint to resume from"
        )
        return (
            f"stopped, and nothing was written to {save_directory}: the weights are divided among the ranks, and one rank alone "
            f"was asked to save them, as at Ctrl-C; {resume}"
        )


def check_heads_were_left(output_dir: str, written: Collection[Path]) -> None:
    """Checks at the end of a run that it left heads, whatever engine trained and saved.

    Args:
        output_dir: Of the run.
        written: Where the run has written heads.

    Raises:
        ValueError: They are missing or not whole.
    """
    if Path(output_dir).resolve() not in written:
        raise ValueError(
            f"training ended, and no heads were written to {Path(output_dir) / HEADS_FOLDER}: axolotl saved the model in a way that "
            "this plugin does not see; take the heads of the last checkpoint, and report this YAML"
        )
    open_heads(Path(output_dir) / HEADS_FOLDER)
