"""Which checkpoint a run goes on from: the newest whole one, and never one that only looks whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from axolotl.utils.dict import DictDefault
from conftest import HIDDEN, VOCAB, make_model

from axolotl_medusa.model.heads import MedusaHeads, attach_heads
from axolotl_medusa.model.heads_directory import heads_config, heads_file, write_heads
from axolotl_medusa.training.resuming import Resumption, resumption, what_is_missing

FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a checkpoint of a step as a run on one device saves it."""
    model = make_model()
    attach_heads(model, MedusaHeads(HIDDEN, VOCAB, 2))

    def make(step: int) -> Path:
        directory = tmp_path / f"checkpoint-{step}"
        write_heads(directory / "medusa_heads", heads_file(model, heads_config(model.medusa_heads, "org/base"), {}))
        for name in FILES:
            (directory / name).write_bytes(b"anything")
        (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        return directory

    return make


def spoil(directory: Path, name: str) -> None:
    """Removes a file or folder, or with `~` in front cuts it in half."""
    path = directory / name.removeprefix("~")
    if name.startswith("~"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


SPOILED = [
    ("trainer_state.json", "it has no trainer_state.json, which is written last"),
    ("~trainer_state.json", "its trainer_state.json breaks off"),
    ("optimizer.pt", "it has no optimizer state (optimizer* or global_step*)"),
    ("rng_state.pth", "it has no state of the random numbers (rng_state*.pth)"),
    ("medusa_heads", "medusa_lm_head.safetensors"),
    ("~medusa_heads/medusa_lm_head.safetensors", "medusa_lm_head.safetensors"),
]


@pytest.mark.parametrize(("name", "reason"), SPOILED)
def test_checkpoint_that_is_not_whole_is_passed_over_or_refused_in_one_line(checkpoint, tmp_path, name, reason):
    older, newer = checkpoint(9), checkpoint(10)
    spoil(newer, name)
    assert reason in what_is_missing(newer)
    cfg = {"output_dir": str(tmp_path), "auto_resume_from_checkpoints": True}
    found = resumption(DictDefault(cfg))
    assert found.checkpoint == str(older) and found.refusal is None
    (line,) = found.passed_over
    assert line.startswith(f"{newer} is passed over, because it was not saved to its end: ") and reason in line
    refusal = resumption(DictDefault({**cfg, "resume_from_checkpoint": str(newer)})).refusal
    assert f"resume_from_checkpoint {newer} is not a whole checkpoint: " in refusal
    assert reason in refusal and refusal.endswith(f"use {older}, the newest whole one") and "\n" not in refusal


def test_named_checkpoint_is_taken_although_a_newer_one_is_there(checkpoint, tmp_path):
    older, _ = checkpoint(9), checkpoint(10)
    cfg = {"output_dir": str(tmp_path), "resume_from_checkpoint": str(older), "auto_resume_from_checkpoints": True}
    assert resumption(DictDefault(cfg)) == Resumption(str(older))


def test_nothing_is_resumed_without_a_key_and_from_nothing_whole(checkpoint, tmp_path):
    directory = checkpoint(3)
    assert resumption(DictDefault({"output_dir": str(tmp_path)})) == Resumption(None)
    spoil(directory, "trainer_state.json")
    auto = resumption(DictDefault({"output_dir": str(tmp_path), "auto_resume_from_checkpoints": True}))
    assert auto.checkpoint is None and len(auto.passed_over) == 1
    named = resumption(
        DictDefault({"output_dir": str(tmp_path), "resume_from_checkpoint": str(tmp_path / "checkpoint-4")})
    )
    assert named.refusal.endswith("remove resume_from_checkpoint: there is no whole checkpoint")


def test_checkpoint_saved_without_optimizer_is_whole_where_the_yaml_saves_none(checkpoint):
    directory = checkpoint(3)
    for name in FILES:
        spoil(directory, name)
    assert what_is_missing(directory, model_only=True) is None
    assert what_is_missing(directory) is not None
