"""Which checkpoint a run goes on from: one that was saved to its end.

Contract: a checkpoint is whole when its trainer_state.json is, because the Trainer writes that last and
`InterruptibleTrainer` takes it away first; the other files are looked for, since deleting a checkpoint can be interrupted too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from axolotl.utils.dict import DictDefault

from axolotl_medusa.errors import first_line
from axolotl_medusa.model.checkpoints import checkpoints
from axolotl_medusa.model.file_names import HEADS_FOLDER, STATE_FILE
from axolotl_medusa.model.heads_directory import open_heads

_OF_THE_RUN = {"optimizer state": ("optimizer*", "global_step*"), "state of the random numbers": ("rng_state*.pth",)}
"""Files, or folders of an engine, without which the Trainer would go on in silence, but not as the run would have."""


class Resumption(NamedTuple):
    """What a run goes on from.

    Attributes:
        checkpoint: The checkpoint, None for a run from the start.
        passed_over: A line for each newer checkpoint that is not whole.
        refusal: Why the checkpoint that the YAML names cannot be used.
    """

    checkpoint: str | None
    passed_over: tuple[str, ...] = ()
    refusal: str | None = None


def what_is_missing(checkpoint: Path, model_only: bool = False) -> str | None:
    """What a checkpoint lacks to go on from, None where it is whole.

    Args:
        checkpoint: Its folder.
        model_only: Whether the run saves no optimizer state, as with `save_only_model`.
    """
    if not (checkpoint / STATE_FILE).is_file():
        return f"it has no {STATE_FILE}, which is written last"
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except ValueError:
        return f"its {STATE_FILE} breaks off"
    try:
        open_heads(checkpoint / HEADS_FOLDER)
    except ValueError as error:
        return first_line(error)
    for name, patterns in {} if model_only else _OF_THE_RUN.items():
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"it has no {name} ({' or '.join(patterns)})"
    return None


def resumption(cfg: DictDefault) -> Resumption:
    """What the run of a validated YAML goes on from, by the files that are there now."""
    whole, passed_over = _newest_whole(cfg)
    if cfg.resume_from_checkpoint is None:
        return Resumption(whole, passed_over) if cfg.auto_resume_from_checkpoints else Resumption(None)
    named = Path(cfg.resume_from_checkpoint)
    if reason := what_is_missing(named, bool(cfg.save_only_model)):
        other = (
            f"use {whole}, the newest whole one"
            if whole
            else "remove resume_from_checkpoint: there is no whole checkpoint"
        )
        return Resumption(None, refusal=f"resume_from_checkpoint {named} is not a whole checkpoint: {reason}; {other}")
    return Resumption(str(cfg.resume_from_checkpoint))


def _newest_whole(cfg: DictDefault) -> tuple[str | None, tuple[str, ...]]:
    lines: list[str] = []
    for checkpoint in reversed(checkpoints(Path(cfg.output_dir))):
        reason = what_is_missing(checkpoint, bool(cfg.save_only_model))
        if reason is None:
            return str(checkpoint), tuple(lines)
        lines.append(f"{checkpoint} is passed over, because it was not saved to its end: {reason}")
    return None, tuple(lines)
