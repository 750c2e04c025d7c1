"""Two CPU processes give the result of one: losses, gradients (through the heads), metrics and files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from axolotl_process import TIMEOUT_S, log_history

from axolotl_medusa.model.heads_directory import read_heads

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

ROOT = Path(__file__).parents[2]
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
def two_chats(tmp_path) -> list[dict[str, str]]:
    """Two conversations of very different lengths: every step sees both, in whatever order and on whatever rank."""
    file = tmp_path / "two.jsonl"
    answers = [" ".join(map(str, range(length))) for length in (60, 12)]
    rows = [[{"role": "user", "content": "Count."}, {"role": "assistant", "content": text}] for text in answers]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return [{"path": str(file), "type": "chat_template", "field_messages": "messages"}]


def torchrun(config: Path, **environment: str) -> None:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    result = subprocess.run(
        [*command, "-m", "axolotl.cli.train", str(config)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=ROOT,
        env=env,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]


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


def test_two_ddp_processes_equal_one(one_process, make_yaml, tmp_path, two_chats):
    two = tmp_path / "two"
    torchrun(make_yaml(**COMMON, datasets=two_chats, output_dir=str(two)), ACCELERATE_USE_CPU="true")
    assert_same(one_process(datasets=two_chats), two)


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


def zero3_yaml(make_yaml, tmp_path, two_chats, out, **changes):
    """With DeepSpeed on CPUs accelerate gives every rank the same data; so there is one conversation and micro-batch 1.

    Returns:
        The YAML, and the data set for a run in one process.
    """
    chat = tmp_path / "one.jsonl"
    chat.write_text(Path(two_chats[0]["path"]).read_text().splitlines()[0] + "\n")
    data = [{**two_chats[0], "path": str(chat)}]
    config = json.loads((ROOT / "deepspeed_configs" / "zero3_bf16.json").read_text())
    config |= {"bf16": {"enabled": False}, **changes.pop("deepspeed", {})}
    file = tmp_path / "zero3_fp32.json"
    file.write_text(json.dumps(config))
    return make_yaml(**{**COMMON, **changes}, datasets=data, output_dir=str(out), deepspeed=str(file)), data


def test_two_zero3_processes_equal_one_and_gather_on_save(one_process, make_yaml, tmp_path, two_chats):
    two = tmp_path / "two"
    config, data = zero3_yaml(make_yaml, tmp_path, two_chats, two, medusa_lr_multiplier=4.0)
    torchrun(config)
    assert_same(one_process(datasets=data, micro_batch_size=1, medusa_lr_multiplier=4.0), two)


def test_two_zero3_processes_with_deepspeeds_own_optimizer_multiply_the_heads_learning_rate(
    one_process, make_yaml, tmp_path, two_chats
):
    """DeepSpeed makes any optimizer of torch by its name; SGD shows the learning rate in every step."""
    own = {"optimizer": {"type": "SGD", "params": {"lr": "auto"}}, "zero_allow_untested_optimizer": True}
    two = tmp_path / "two"
    config, data = zero3_yaml(make_yaml, tmp_path, two_chats, two, medusa_lr_multiplier=4.0, deepspeed=own)
    torchrun(config)
    assert_same(one_process(datasets=data, micro_batch_size=1, medusa_lr_multiplier=4.0), two)
