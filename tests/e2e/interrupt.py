"""A plugin for tests only: interrupts the training in which it is listed, by a signal at a chosen place."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback, TrainerState

from axolotl_medusa.training import saving


class InterruptPlugin(BasePlugin):
    """`INTERRUPT` is the place: a key of `PLACES`, or nothing; `INTERRUPT_STEP` is the step whose end or whose save is meant."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if place := os.environ.get("INTERRUPT"):
            PLACES[place](trainer, int(os.environ["INTERRUPT_STEP"]))


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _instead(trainer: Any, step: int, owner: Any, name: str, act: Callable[..., Any] = _die) -> None:
    """Calls `act` instead of a function, from the step on."""
    usual = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        return (act if trainer.state.global_step >= step else usual)(*args, **kwargs)

    mock.patch.object(owner, name, call).start()


def _before_heads(trainer: Any, step: int) -> None:
    _instead(trainer, step, saving, "write_heads")


def _before_optimizer(trainer: Any, step: int) -> None:
    _instead(trainer, step, trainer, "_save_optimizer_and_scheduler")


def _within_state(trainer: Any, step: int) -> None:
    usual = TrainerState.save_to_json

    def half(self: TrainerState, path: str) -> None:
        usual(self, path)
        text = Path(path).read_text(encoding="utf-8")
        Path(path).write_text(text[: len(text) // 2], encoding="utf-8")
        _die()

    _instead(trainer, step, TrainerState, "save_to_json", half)


def _within_removal(trainer: Any, step: int) -> None:
    def half(directory: str | Path, **_: Any) -> None:
        (Path(directory) / "optimizer.pt").unlink()
        _die()

    _instead(trainer, step, shutil, "rmtree", half)


class _SignalAtStep(TrainerCallback):
    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


PLACES: dict[str, Callable[[Any, int], None]] = {
    "before heads": _before_heads,
    "before optimizer": _before_optimizer,
    "within trainer_state": _within_state,
    "within removal": _within_removal,
    "kill in step": lambda trainer, step: trainer.add_callback(_SignalAtStep(step, signal.SIGKILL)),
    "SIGTERM in step": lambda trainer, step: trainer.add_callback(_SignalAtStep(step, signal.SIGTERM)),
}
