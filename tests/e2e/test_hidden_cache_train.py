"""Medusa-1 training with `medusa_hidden_cache`, through axolotl's own command."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from axolotl_process import log_history

from axolotl_medusa.cpu_instructions import multiplies_bf16
from axolotl_medusa.model.heads_directory import read_heads

pytestmark = pytest.mark.e2e

TWO_EPOCHS = {
    "plugins": ["watch_backbone.WatchBackbonePlugin", "axolotl_medusa.MedusaPlugin"],
    "max_steps": None,
    "num_epochs": 2,
    "save_steps": 2,
    "gradient_accumulation_steps": 1,
    "optimizer": "sgd",  # Adam would turn the rounding of gradients near zero into whole steps
    "learning_rate": 0.05,
    "max_grad_norm": 1e9,
}
BF16_STATES = 2**-8
"""Rounding of the states to bf16, relative: an error of the heads' weights may not be larger than the states' own."""


class Run(NamedTuple):
    heads: dict[str, torch.Tensor]
    losses: list[float]
    epochs: list[float]
    """Epoch of each run of the backbone."""
    output: str


@pytest.fixture
def few_chats(chats, tmp_path) -> list[dict[str, str]]:
    file = tmp_path / "few.jsonl"
    file.write_text("".join(line + "\n" for line in chats.read_text().splitlines()[:14]))
    return [{"path": str(file), "type": "chat_template", "field_messages": "messages"}]


@pytest.fixture
def train(make_yaml, axolotl, tmp_path, few_chats):
    def run(name: str, *, kill_at: int = 0, ok: bool = True, **changes) -> Run:
        out, runs = tmp_path / name, tmp_path / f"{name}{len(list(tmp_path.glob('*.runs')))}.runs"
        runs.touch()
        config = make_yaml(**{**TWO_EPOCHS, "datasets": few_chats, "output_dir": str(out), **changes})
        env = {"BACKBONE_RUNS": str(runs), "KILL_AT": str(kill_at)}
        result = axolotl("train", config, ok=ok and not kill_at, env=env)
        epochs = [float(line) for line in runs.read_text().splitlines()]
        if kill_at or not ok:
            return Run({}, [], epochs, result.output)
        losses = [entry["loss"] for entry in log_history(out) if "loss" in entry]
        return Run(read_heads(out / "medusa_heads").head_tensors(), losses, epochs, result.output)

    return run


def assert_equal(found: Run, expected: Run) -> None:
    assert found.losses == expected.losses
    for name, tensor in expected.heads.items():
        assert tensor.abs().max() > 0
        assert torch.equal(found.heads[name], tensor), name


def test_two_packed_epochs_run_the_backbone_once_and_train_the_heads_of_a_run_without(train, tmp_path):
    plain = train("plain")
    cached = train("cached", medusa_hidden_cache=str(tmp_path / "cache"))
    steps = len(plain.losses)
    assert len(cached.losses) == len(plain.epochs) == steps
    assert [epoch < 1 for epoch in plain.epochs].count(False) > 1
    assert all(epoch < 1 for epoch in cached.epochs)
    assert cached.losses == pytest.approx(plain.losses, rel=1e-4)
    for name, tensor in plain.heads.items():
        assert (cached.heads[name] - tensor).norm() <= BF16_STATES * tensor.norm(), name
    (directory,) = (tmp_path / "cache").iterdir()
    assert "14 samples are stored" in cached.output
    assert (directory / "meta.json").is_file()


def test_bf16_states_of_single_samples_train_bitwise_the_heads_of_a_run_without(train, tmp_path):
    # With an adapter (which Medusa-1 freezes) axolotl keeps norms and embeddings in bf16 on a CPU too.
    adapter = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
    changes = {"bf16": True, "sample_packing": False, "save_steps": 28, **adapter}
    plain = train("plain", **changes)
    cached = train("cached", medusa_hidden_cache=str(tmp_path / "cache"), **changes)
    assert len(plain.epochs) == 2 * len(cached.epochs)
    assert_equal(cached, plain)
    assert ("bf16 is on, but this CPU" in plain.output) is not multiplies_bf16()


def test_killed_and_resumed_run_and_a_second_run_repeat_the_first_bitwise(train, tmp_path):
    whole = train("whole", medusa_hidden_cache=str(tmp_path / "whole-cache"))
    options = {"medusa_hidden_cache": str(tmp_path / "cache")}
    killed = train("resumed", kill_at=5, **options)
    assert all(epoch < 1 for epoch in killed.epochs)
    assert not (tmp_path / "resumed" / "medusa_heads").exists()
    resumed = train("resumed", resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"), **options)
    assert 0 < len(resumed.epochs) < len(whole.epochs)
    assert_equal(resumed, whole)
    again = train("again", **options)
    assert again.epochs == []
    assert_equal(again, whole)


def test_cache_larger_than_its_limit_is_refused_in_one_line(train, tmp_path):
    result = train("out", ok=False, medusa_hidden_cache=str(tmp_path / "cache"), medusa_hidden_cache_limit_gb=1e-6)
    message = result.output[result.output.index("axolotl-medusa:") :]
    assert "more than medusa_hidden_cache_limit_gb 1e-06: raise it" in message
    assert "Traceback" not in message
    assert result.epochs == [] and not (tmp_path / "out" / "medusa_heads").exists()
