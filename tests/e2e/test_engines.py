"""Every engine trains the same: DDP, FSDP2 and ZeRO-1 to 3 in two processes give the losses and the heads of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from axolotl_process import log_history
from test_train import LORA
from two_processes import torchrun

from axolotl_medusa.model.heads_directory import read_heads

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

CONFIGS = Path(__file__).parents[2] / "deepspeed_configs"
STEPS = 3
TRAINING = {
    "sample_packing": False,
    "num_epochs": STEPS,
    "max_steps": STEPS,
    "save_steps": STEPS - 1,
    "optimizer": "sgd",  # Adam would turn the rounding of gradients near zero into whole steps
    "learning_rate": 0.5,
    "max_grad_norm": 0.5,  # every step's gradient is longer, and is clipped
}
FSDP2 = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "reshard_after_forward": True,
        "cpu_ram_efficient_loading": True,
    },
}
ENGINES = {
    "ddp": {},
    "fsdp2": FSDP2,
    "zero1": {"deepspeed": "zero1.json"},
    "zero2": {"deepspeed": "zero2.json"},
    "zero3": {"deepspeed": "zero3_bf16.json"},
}
RECIPES = {
    "medusa-1": {"medusa_only_heads": True, "medusa_lm_head": "separate"},
    "lora": {**LORA, "medusa_self_distillation": True},
    "full": {"medusa_only_heads": False},
}
NUMBERS = (
    "loss",
    "grad_norm",
    "medusa0_loss",
    "medusa1_loss",
    "medusa2_loss",
    "medusa0_top1",
    "medusa_acceptance_length",
)


@pytest.fixture
def four_chats(tmp_path) -> list[dict[str, str]]:
    """Four conversations of different lengths: every step sees all of them, in whatever order and on whatever rank."""
    file = tmp_path / "four.jsonl"
    answers = [" ".join(map(str, range(length))) for length in (60, 12, 33, 5)]
    rows = [[{"role": "user", "content": "Count."}, {"role": "assistant", "content": text}] for text in answers]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return [{"path": str(file), "type": "chat_template", "field_messages": "messages"}]


@pytest.fixture(scope="module")
def references() -> dict[str, Path]:
    """What one process made of each recipe, once for all engines."""
    return {}


@pytest.fixture
def reference(references, make_yaml, axolotl, tmp_path, four_chats):
    def run(recipe: str) -> Path:
        if recipe not in references:
            out = tmp_path / "reference"
            keys = {**TRAINING, **RECIPES[recipe], "datasets": four_chats, "output_dir": str(out)}
            axolotl("train", make_yaml(**keys, gradient_accumulation_steps=4))
            references[recipe] = out
        return references[recipe]

    return run


@pytest.fixture
def train_in_two(make_yaml, tmp_path, four_chats):
    """Trains a recipe with an engine in two processes, and returns its output_dir."""

    def run(recipe: str, engine: str, **changes) -> Path:
        keys = {**TRAINING, **RECIPES[recipe], **ENGINES[engine], "datasets": four_chats, **changes}
        if "deepspeed" in keys:
            config = json.loads((CONFIGS / keys["deepspeed"]).read_text()) | {"bf16": {"enabled": False}}
            keys["deepspeed"] = str(tmp_path / keys["deepspeed"])
            Path(keys["deepspeed"]).write_text(json.dumps(config))
        plugins = ["cpu_ranks.CpuRanksPlugin", "axolotl_medusa.MedusaPlugin"]
        environment = {} if "deepspeed" in keys else {"ACCELERATE_USE_CPU": "true"}
        torchrun(make_yaml(**keys, gradient_accumulation_steps=2, plugins=plugins), **environment)
        return tmp_path / "out"

    return run


def losses(out: Path) -> list[dict[str, float]]:
    return [entry for entry in log_history(out) if "loss" in entry]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_of_any_engine_equal_one(recipe, engine, reference, train_in_two):
    one, two = reference(recipe), train_in_two(recipe, engine)
    logs = losses(one), losses(two)
    assert len(logs[0]) == len(logs[1]) == STEPS
    assert all(entry["grad_norm"] > TRAINING["max_grad_norm"] for entry in logs[0])
    for first, second in zip(*logs, strict=True):
        for key in NUMBERS:
            assert second[key] == pytest.approx(first[key], rel=5e-4, abs=1e-6), key
    expected = read_heads(one / "medusa_heads").head_tensors()
    for name, tensor in read_heads(two / "medusa_heads").head_tensors().items():
        assert expected[name].abs().max() > 0
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-6)
