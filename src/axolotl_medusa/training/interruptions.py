"""Axolotl's trainer made safe to interrupt: no checkpoint looks whole that is not, and SIGTERM saves one and ends.

Contract: knows checkpoints as folders and nothing of heads; which checkpoint a later run goes on from is `resuming`'s to say.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_medusa.model.checkpoints import checkpoints
from axolotl_medusa.model.file_names import STATE_FILE
from axolotl_medusa.training.stopping import stop


class Sigterm(TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint at the end of the step in which SIGTERM reached any rank.

    Attributes:
        ends_the_run: Whether the next checkpoint is the last of this run.
    """

    ends_the_run = False

    def __init__(self, any_rank: Callable[[list[bool]], list[bool]]) -> None:
        self._any_rank = any_rank
        self._has_come = False

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Notes SIGTERM while inside; in a thread, as Ray trains in, Python allows no handler, and the signal ends the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, *_: Any) -> None:
        self._has_come = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Saves without evaluating first: the time that is left may be short."""
        (self.ends_the_run,) = self._any_rank([self._has_come])
        if self.ends_the_run:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


class InterruptibleTrainer(AxolotlTrainer):  # type: ignore[misc]
    """Saves checkpoints so that a kill at any time leaves whole ones and unfinished ones that are known as such."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sigterm = Sigterm(self._any_rank)
        self.add_callback(self._sigterm)

    def _any_rank(self, flags: list[bool]) -> list[bool]:
        if self.args.world_size == 1:
            return flags
        counts = torch.tensor(flags, dtype=torch.long, device=self.accelerator.device)
        return [bool(count) for count in self.accelerator.reduce(counts, reduction="sum").tolist()]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; SIGTERM saves a checkpoint and ends the process.

        Raises:
            SystemExit: SIGTERM came, and the checkpoint is saved.
        """
        with self._sigterm.awaited():
            return super().train(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Not where a run goes on from its last step: the Trainer would train one step more before it looks."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any, **kwargs: Any) -> None:
        """Without trainer_state.json until the rest is there, also where an older checkpoint of this step is written over."""
        run_dir = Path(self._get_output_dir(trial=trial))
        directory = run_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (directory / STATE_FILE).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # the Trainer counts unfinished ones too
        try:
            super()._save_checkpoint(model, trial, **kwargs)
        finally:
            self.args.save_total_limit = limit
        if limit and self.args.should_save:
            best = self.state.best_model_checkpoint
            remove_surplus(run_dir, limit, directory, None if best is None else Path(best))
        if self._sigterm.ends_the_run:
            self.accelerator.wait_for_everyone()  # launchers kill all ranks once the first has ended
            raise _preempted(directory) if self.args.should_save else SystemExit(1)

    def _save_rng_state(self, output_dir: str) -> None:
        """The last that every rank writes: the one that goes on to trainer_state.json waits for all."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()


def remove_surplus(run_dir: Path, limit: int, newest: Path, best: Path | None) -> None:
    """Keeps the `limit` newest whole checkpoints, among them always the newest and the best one.

    A checkpoint loses its trainer_state.json first, so that one that is half removed does not look whole. Unfinished ones
    of earlier steps are removed, and count for nothing.

    Args:
        run_dir: Where the checkpoints are.
        limit: `save_total_limit`.
        newest: The one that was saved just now.
        best: The best so far.
    """
    whole = checkpoints(run_dir, STATE_FILE)
    by_age = sorted(
        whole, key=lambda each: (each / STATE_FILE).stat().st_mtime
    )  # stable: equal times leave the steps' order
    kept = {each.resolve() for each in (newest, best) if each is not None}
    removable = [each for each in by_age if each.resolve() not in kept]
    surplus = removable[: max(0, len(whole) - max(limit, len(kept)))]
    existing = checkpoints(run_dir)
    unfinished = [each for each in existing[: existing.index(newest)] if each not in whole]
    for each in surplus + unfinished:
        (each / STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(each, ignore_errors=True)


def _preempted(checkpoint: Path) -> SystemExit:
    return stop(
        f"SIGTERM: saved {checkpoint} and stopped before the end of training; start again with auto_resume_from_checkpoints: true, "
        f"or with resume_from_checkpoint: {checkpoint}, to go on from there"
    )
