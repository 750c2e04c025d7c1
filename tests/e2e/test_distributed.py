"""Two CPU processes give the result of one where they share hidden states, and where heads have a learning rate of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from axolotl_process import log_history
from two_processes import torchrun

from axolotl_medusa.model.heads_directory import read_heads

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

NUMBERS = (
    "loss",
    "grad_norm",
    "base_loss",
    "medusa0_loss",
    "medusa1_loss",
    "medusa2_loss",
    "medusa0_top1",
    "medusa_acceptance_length",
)
COMMON = {
    "medusa_only_heads": False,
    "sample_packing": False,
    "gradient_accumulation_steps": 1,
    "num_epochs": 2,
    "max_steps": 2,
    "max_grad_norm": 1e9,
    "optimizer": "sgd",  # Adam would turn the rounding of gradients near zero into whole steps
    "learning_rate": 0.05,
    "plugins": ["cpu_ranks.CpuRanksPlugin", "axolotl_medusa.MedusaPlugin"],
}


@pytest.fixture
def one_process(make_yaml, axolotl, tmp_path):
    """The run that two processes must equal: both samples of a step in one batch."""

    def run(**changes):
        out = tmp_path / "one"
        config = make_yaml(
            **{**COMMON, "plugins": ["axolotl_medusa.MedusaPlugin"], "micro_batch_size": 2, **changes},
            output_dir=str(out),
        )
        axolotl("train", config)
        return out

    return run


def assert_same(one: Path, two: Path, numbers: tuple[str, ...] = NUMBERS) -> None:
    logs = [[entry for entry in log_history(out) if "loss" in entry] for out in (one, two)]
    assert len(logs[0]) == len(logs[1]) == 2
    for first, second in zip(*logs, strict=True):
        for key in numbers:
            assert second[key] == pytest.approx(first[key], rel=5e-4, abs=1e-6), key
    expected = read_heads(one / "medusa_heads").head_tensors()
    found = read_heads(two / "medusa_heads").tensors
    assert "lm_heads.0.weight" in found
    for name, tensor in expected.items():
        assert tensor.abs().max() > 0
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-6)


def test_two_ddp_processes_share_a_hidden_cache_and_equal_one(one_process, make_yaml, tmp_path, two_chats):
    """The second epoch gives each rank what the other may have stored in the first."""
    options = {"medusa_only_heads": True, "datasets": two_chats}
    plugins = [*COMMON["plugins"], "watch_backbone.WatchBackbonePlugin"]
    cached = {**COMMON, **options, "plugins": plugins, "medusa_hidden_cache": str(tmp_path / "cache")}
    two, runs = tmp_path / "two", tmp_path / "runs"
    torchrun(make_yaml(**cached, output_dir=str(two)), ACCELERATE_USE_CPU="true", BACKBONE_RUNS=str(runs))
    assert runs.read_text().split() == ["0.0", "0.0"]
    exact = tuple(key for key in NUMBERS if key != "base_loss")  # Medusa-1 samples it from each batch
    assert_same(one_process(**options, medusa_hidden_cache=str(tmp_path / "own")), two, exact)
    again = tmp_path / "again"
    torchrun(make_yaml(**cached, output_dir=str(again)), ACCELERATE_USE_CPU="true", BACKBONE_RUNS=str(runs))
    assert len(runs.read_text().split()) == 2
    assert_same(two, again)


def with_changes(zero3: str, **changes) -> str:
    file = Path(zero3)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(file)


@pytest.mark.parametrize("own", [False, True], ids=["axolotls-optimizer", "deepspeeds-own"])
def test_two_zero3_processes_multiply_the_heads_learning_rate(own, one_process, make_yaml, tmp_path, two_chats, zero3):
    """DeepSpeed makes any optimizer of torch by its name; SGD shows the learning rate in every step."""
    if own:
        optimizer = {"type": "SGD", "params": {"lr": "auto"}}
        zero3 = with_changes(zero3, optimizer=optimizer, zero_allow_untested_optimizer=True)
    two = tmp_path / "two"
    torchrun(make_yaml(**COMMON, datasets=two_chats, output_dir=str(two), deepspeed=zero3, medusa_lr_multiplier=4.0))
    assert_same(one_process(datasets=two_chats, medusa_lr_multiplier=4.0), two)
