"""Which checkpoints are removed, and what SIGTERM asks the Trainer for."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
from transformers import TrainerControl

from axolotl_medusa.training.interruptions import Sigterm, remove_surplus


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a checkpoint of a step; `age` orders them as times of change do, None is an unfinished one."""

    def make(step: int, age: int | None = 0) -> Path:
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        (directory / "optimizer.pt").touch()
        if age is not None:
            (directory / "trainer_state.json").write_text("{}")
            os.utime(directory / "trainer_state.json", (1000 - age, 1000 - age))
        return directory

    return make


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in run_dir.glob("checkpoint-*"))


def test_unfinished_checkpoint_of_a_later_step_does_not_cost_the_newest_whole_one(checkpoint, tmp_path):
    checkpoint(4), checkpoint(6, age=None)
    remove_surplus(tmp_path, limit=1, newest=checkpoint(5), best=None)
    assert steps(tmp_path) == [5, 6]


def test_unfinished_checkpoint_of_an_earlier_step_is_removed_and_counts_for_nothing(checkpoint, tmp_path):
    checkpoint(2), checkpoint(3, age=None)
    remove_surplus(tmp_path, limit=2, newest=checkpoint(4), best=None)
    assert steps(tmp_path) == [2, 4]


def test_best_and_newest_are_kept_and_of_the_others_the_oldest_go(checkpoint, tmp_path):
    best = checkpoint(1, age=9)
    checkpoint(2, age=8), checkpoint(8, age=7), checkpoint(3, age=6)  # 8 is of a run that went on from 2
    newest = checkpoint(4)
    remove_surplus(tmp_path, limit=3, newest=newest, best=best)
    assert steps(tmp_path) == [1, 3, 4]
    remove_surplus(tmp_path, limit=1, newest=newest, best=best)
    assert steps(tmp_path) == [1, 4]


def test_checkpoint_that_is_half_removed_does_not_look_whole(checkpoint, tmp_path, monkeypatch):
    older = checkpoint(1)
    monkeypatch.setattr(shutil, "rmtree", lambda directory, **_: None)
    remove_surplus(tmp_path, limit=1, newest=checkpoint(2), best=None)
    assert (older / "optimizer.pt").exists() and not (older / "trainer_state.json").exists()


def test_sigterm_saves_and_stops_at_the_end_of_the_step_without_evaluating():
    sigterm = Sigterm(any_rank=lambda flags: flags)
    before = signal.getsignal(signal.SIGTERM)
    with sigterm.awaited():
        control = TrainerControl(should_evaluate=True)
        sigterm.on_step_end(None, None, control)
        assert not sigterm.ends_the_run and not control.should_save and control.should_evaluate
        os.kill(os.getpid(), signal.SIGTERM)
        sigterm.on_step_end(None, None, control)
    assert sigterm.ends_the_run and control.should_save and control.should_training_stop
    assert not control.should_evaluate
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_of_another_rank_ends_this_one_too():
    sigterm = Sigterm(any_rank=lambda flags: [True for _ in flags])
    control = TrainerControl()
    sigterm.on_step_end(None, None, control)
    assert sigterm.ends_the_run and control.should_save and control.should_training_stop


def test_sigterm_is_left_alone_in_a_thread():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def train() -> None:
        with Sigterm(any_rank=lambda flags: flags).awaited():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [before]
