"""Runs that are killed and go on, through axolotl's own command: in the end they have the heads of a run that was left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from axolotl_process import log_history
from safetensors.torch import load_file

from axolotl_medusa.model.heads_directory import read_heads

pytestmark = pytest.mark.e2e

STEPS = 6
EVERYTHING_THAT_A_RUN_REMEMBERS = {
    "plugins": ["interrupt.InterruptPlugin", "axolotl_medusa.MedusaPlugin"],
    "medusa_only_heads": False,
    "medusa_self_distillation": True,
    "medusa_scheduler": "sine_0.5",
    "medusa_lr_multiplier": 4.0,
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.2,  # uses random numbers
    "lora_target_linear": True,
    "lr_scheduler": "cosine",
    "warmup_steps": 2,
    "sequence_len": 1024,  # 3 steps an epoch
    "num_epochs": 3,
    "max_steps": STEPS,
    "save_steps": 1,
    "save_total_limit": 2,
    "auto_resume_from_checkpoints": True,
}
FEW_INTERRUPTIONS = [
    # place, step, what the next run goes on from, what it passes over
    ("before heads", 1, None, "checkpoint-1"),
    ("SIGTERM in step", 3, "checkpoint-3", None),
    ("within removal", 4, "checkpoint-4", None),
    ("within trainer_state", 5, "checkpoint-4", "checkpoint-5"),
    ("SIGTERM in step", 6, "checkpoint-6", None),
]
MORE_INTERRUPTIONS = [
    ("kill in step", 2, "checkpoint-1", None),
    ("before optimizer", 3, "checkpoint-2", "checkpoint-3"),
    ("kill in step", 5, "checkpoint-4", None),
]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return {**read_heads(out / "medusa_heads").tensors, **load_file(out / "adapter_model.safetensors")}


def losses(out: Path) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in log_history(out) if "loss" in entry]


@pytest.mark.parametrize(
    "interruptions",
    [pytest.param(FEW_INTERRUPTIONS, id="few"), pytest.param(MORE_INTERRUPTIONS, id="more", marks=pytest.mark.long)],
)
def test_run_that_is_killed_in_saves_and_preempted_ends_as_one_left_alone(interruptions, make_yaml, axolotl, tmp_path):
    axolotl("train", make_yaml(**EVERYTHING_THAT_A_RUN_REMEMBERS, output_dir=str(tmp_path / "whole")))
    config, out = make_yaml(**EVERYTHING_THAT_A_RUN_REMEMBERS), tmp_path / "out"
    expected, passed_over = None, None
    for place, step, next_expected, next_passed_over in [*interruptions, ("", 0, None, None)]:
        result = axolotl("train", config, ok=not place, env={"INTERRUPT": place, "INTERRUPT_STEP": str(step)})
        assert (f"{out / str(expected)}" in result.output) is (expected is not None), (place, result.output[-3000:])
        assert (f"{out / str(passed_over)} is passed over" in result.output) is (passed_over is not None), place
        if place == "SIGTERM in step":
            last = result.output.strip().splitlines()[-1]
            assert last.startswith(f"axolotl-medusa: SIGTERM: saved {out / f'checkpoint-{step}'} and stopped"), last
            assert "auto_resume_from_checkpoints: true" in last and "Traceback" not in result.output
            assert result.returncode == 1
        expected, passed_over = next_expected, next_passed_over
    found, whole = tensors(out), tensors(tmp_path / "whole")
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(found[name], tensor), name
    assert losses(out) == losses(tmp_path / "whole")
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
