"""Every engine trains the same: DDP, FSDP2 and ZeRO-1 to 3 in two processes give the losses and the heads of one process.

The cells marked `long` are those of the table in docs/engines.md that `make test` leaves out; `make test-engines` runs all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl_process import log_history
from test_evaluate import FOUR_BIT_RTOL, QLORA
from test_train import LORA
from two_processes import torchrun

from axolotl_medusa.cli import main
from axolotl_medusa.model.heads_directory import read_heads
from axolotl_medusa.model.sources import find_source

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

CONFIGS = Path(__file__).parents[2] / "deepspeed_configs"
STEPS = 3
SAVED_AT = STEPS - 1
TRAINING = {
    "sample_packing": False,
    "num_epochs": STEPS,
    "max_steps": STEPS,
    "save_steps": SAVED_AT,
    "optimizer": "sgd",  # Adam would turn the rounding of gradients near zero into whole steps
    "learning_rate": 0.5,
    "max_grad_norm": 0.2,  # every step's gradient is longer, and is clipped
}
SEED, OURS = "seed_adapter.SeedAdapterPlugin", "axolotl_medusa.MedusaPlugin"
FSDP2 = {
    "fsdp_version": 2,
    "fsdp_config": {
        "state_dict_type": "SHARDED_STATE_DICT",
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "reshard_after_forward": True,
        "cpu_ram_efficient_loading": True,
    },
}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": FSDP2,
    "zero1": {"deepspeed": "zero1.json"},
    "zero2": {"deepspeed": "zero2.json"},
    "zero3": {"deepspeed": "zero3_bf16.json"},
}
RECIPES: dict[str, dict[str, Any]] = {
    "full": {"medusa_only_heads": False},
    "lora": {**LORA, "medusa_self_distillation": True},
    "qlora": {**QLORA, "medusa_self_distillation": True},
    "medusa-1": {"medusa_only_heads": True, "medusa_lm_head": "separate"},
}
LEAVES = {"full": "full", "lora": "adapter", "qlora": "adapter", "medusa-1": "base"}
TRAINED_IN_EVERY_RUN = {
    *(("full", engine) for engine in ENGINES),
    ("lora", "fsdp2"),
    ("lora", "zero3"),
    ("medusa-1", "zero3"),
}
RESUMED_IN_EVERY_RUN = {("lora", "fsdp2"), ("medusa-1", "zero3")}
NUMBERS = (
    "loss",
    "grad_norm",
    "medusa0_loss",
    "medusa1_loss",
    "medusa2_loss",
    "medusa0_top1",
    "medusa_acceptance_length",
)
RTOL = 5e-4


IMPOSSIBLE = {("qlora", "fsdp2"), ("qlora", "zero3")}
"""axolotl puts 4-bit weights on a GPU for FSDP2; bitsandbytes cannot save those that ZeRO-3 has divided on a CPU."""


def cells(in_every_run: set[tuple[str, str]]) -> pytest.MarkDecorator:
    """All pairs of a recipe and an engine that works with it."""
    pairs = [(recipe, engine) for recipe in RECIPES for engine in ENGINES if (recipe, engine) not in IMPOSSIBLE]
    return pytest.mark.parametrize(
        ("recipe", "engine"),
        [pytest.param(*pair, marks=[] if pair in in_every_run else [pytest.mark.long]) for pair in pairs],
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
def runs() -> dict[tuple[str, str], Path]:
    """output_dirs by recipe and engine, each trained once."""
    return {}


@pytest.fixture
def one_process(runs, make_yaml, axolotl, tmp_path, four_chats) -> Callable[[str], Path]:
    """One process, four micro-batches a step."""

    def run(recipe: str) -> Path:
        if (recipe, "one") not in runs:
            out = runs[recipe, "one"] = tmp_path / "one"
            keys = {**TRAINING, **RECIPES[recipe], "datasets": four_chats, "plugins": [SEED, OURS]}
            axolotl("train", make_yaml(**keys, gradient_accumulation_steps=4, output_dir=str(out)))
        return runs[recipe, "one"]

    return run


@pytest.fixture
def train_in_two(make_yaml, tmp_path, four_chats) -> Callable[..., None]:
    """Two processes, two micro-batches of each a step."""

    def run(recipe: str, engine: str, out: Path, **changes: Any) -> None:
        keys = {**TRAINING, **RECIPES[recipe], **ENGINES[engine], "datasets": four_chats, "output_dir": str(out)}
        if name := keys.get("deepspeed"):
            keys["deepspeed"] = str(tmp_path / name)
            in_fp32 = json.loads((CONFIGS / name).read_text()) | {"bf16": {"enabled": False}}
            Path(keys["deepspeed"]).write_text(json.dumps(in_fp32))
        keys |= {"gradient_accumulation_steps": 2, "plugins": [SEED, "cpu_ranks.CpuRanksPlugin", OURS], **changes}
        torchrun(make_yaml(**keys), **({} if name else {"ACCELERATE_USE_CPU": "true"}))

    return run


@pytest.fixture
def two_processes(runs, train_in_two, tmp_path) -> Callable[[str, str], Path]:
    def run(recipe: str, engine: str) -> Path:
        if (recipe, engine) not in runs:
            train_in_two(recipe, engine, tmp_path / "two")
            runs[recipe, engine] = tmp_path / "two"
        return runs[recipe, engine]

    return run


def logged(out: Path) -> list[dict[str, float]]:
    return [entry for entry in log_history(out) if "loss" in entry]


def assert_same(expected: Path, found: Path, recipe: str) -> None:
    rtol = FOUR_BIT_RTOL if recipe == "qlora" else RTOL
    numbers = NUMBERS if recipe == "medusa-1" else (*NUMBERS, "base_loss")  # Medusa-1 samples it from each batch
    logs = logged(expected), logged(found)
    assert len(logs[0]) == len(logs[1]) == STEPS
    for first, second in zip(*logs, strict=True):
        assert first["grad_norm"] > TRAINING["max_grad_norm"]
        for key in numbers:
            if (recipe, key) != ("qlora", "grad_norm"):  # a save changes the kernel of 4-bit weights on a CPU
                assert second[key] == pytest.approx(first[key], rel=rtol, abs=1e-5), key
    for folder in ("medusa_heads", f"checkpoint-{STEPS}/medusa_heads"):
        heads, own = (read_heads(out / folder).tensors for out in (expected, found))
        assert heads.keys() == own.keys()
        for name, tensor in heads.items():
            assert tensor.abs().max() > 0
            torch.testing.assert_close(own[name], tensor, rtol=20 * rtol, atol=20 * rtol * tensor.abs().max().item())


def backbone_files(out: Path) -> list[Path]:
    """Files of a model, or of an engine's state that has parameters beside the heads."""
    found = [path for pattern in ("model*.safetensors", "pytorch_model*") for path in out.rglob(pattern)]
    for file in out.rglob("*model_states.pt"):
        names = torch.load(file, map_location="cpu", weights_only=False)["module"]
        assert names
        found += [file] * any("medusa_heads" not in name for name in names)
    return found


@cells(TRAINED_IN_EVERY_RUN)
def test_two_processes_of_any_engine_equal_one(recipe, engine, one_process, two_processes, tmp_path):
    """Accumulation and clipping included; heads whole in the checkpoint and at the end, and exported from there."""
    one, two = one_process(recipe), two_processes(recipe, engine)
    assert_same(one, two, recipe)
    assert read_heads(two / f"checkpoint-{SAVED_AT}" / "medusa_heads").tensors
    assert find_source(two).model_kind == LEAVES[recipe]
    if recipe == "medusa-1":
        assert not backbone_files(two), "Medusa-1 does not change the backbone"
    merged = ["--model", "merged"] if LEAVES[recipe] == "adapter" else []
    assert main(["export", str(two), "--to", "vllm", "--out", str(tmp_path / "export"), *merged]) == 0
    assert (tmp_path / "export" / "config.json").is_file()


@cells(RESUMED_IN_EVERY_RUN)
def test_a_resumed_run_of_any_engine_equals_an_uninterrupted_one(recipe, engine, two_processes, train_in_two, tmp_path):
    whole, resumed = two_processes(recipe, engine), tmp_path / "resumed"
    checkpoint = resumed / f"checkpoint-{SAVED_AT}"
    shutil.copytree(whole / checkpoint.name, checkpoint)
    train_in_two(recipe, engine, resumed, resume_from_checkpoint=str(checkpoint))
    assert_same(whole, resumed, recipe)
