"""The estimate against what was measured: peaks in benchmarks/results, of CPUs within a fifth, of an H200 within 5%."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.train_step.cases import LORA_RANK
from benchmarks.train_step.models import LORA_TARGETS, RANDOM_MODELS
from example_files import README

from axolotl_medusa.estimating.memory import RUNTIME, memory_of
from axolotl_medusa.estimating.plan import Plan
from axolotl_medusa.estimating.sizes import sizes_of

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
WITHIN = {"cpu": 0.2, "gpu": 0.05}
"""Malloc leaves holes between activations, and they differ from step to step; a GPU's allocator is asked for tensors."""

MIB = 2**20

SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "tie_word_embeddings": True,
}
LAYERS = {"cpu": 1, "gpu": 36}
"""Of the large models: benchmarks.train_step builds as many on each device."""


def steps() -> dict[str, tuple[dict, str, dict]]:
    """Every measured step by its file and name."""
    found = {}
    for file in (RESULTS / "estimate.json", *sorted(RESULTS.glob("train_step*.json"))):
        content = json.loads(file.read_text(encoding="utf-8"))
        for name, step in content["steps"].items():
            if not content.get("liger"):
                found[f"{file.stem}: {name}"] = (content, name, step)
    return found


STEPS = steps()


def plan_of_step(content: dict, name: str, step: dict) -> Plan:
    """The plan that a step of the harness is."""
    model, stage, form, precision, *more = name.split()
    device = "gpu" if "gpu" in content else "cpu"
    config = SMOLLM2 if model == "smollm2" else RANDOM_MODELS[model]
    sizes = sizes_of(model, {"tie_word_embeddings": False, "num_hidden_layers": LAYERS[device], **config})
    medusa_2, half = stage == "medusa-2", precision == "bf16"
    return Plan(
        sizes=sizes,
        engine="ddp",
        gpus=1,
        device=device,
        micro_batch=step["batch"],
        accumulation=1,
        sequence=step["seq"],
        only_heads=not medusa_2,
        heads=step["heads"],
        blocks=1,
        shared=form == "shared",
        teacher=medusa_2,
        self_distillation=medusa_2,
        adapter=sizes.adapter(LORA_RANK, LORA_TARGETS, every=False) if medusa_2 else 0,
        rank=LORA_RANK if medusa_2 else 0,
        dropout=True,
        adapts_output=medusa_2,
        weight_bits=16 if half else 32,
        half=half,
        head_bits=32 if content["heads_dtype"] == "float32" or not half else 16,
        optimizer={"adamw": "adamw_torch_fused", "adamw8bit": "adamw_bnb_8bit"}[content["optimizer"]],
        recomputed=int(more[0]) if more else 0,
        trained_layers=0,
        trains_embeddings=False,
    )


def test_every_kind_of_step_was_measured():
    devices = {"gpu" if "gpu" in content else "cpu" for content, _, _ in STEPS.values()}
    kinds = {(name.split()[1], name.split()[2]) for _, name, _ in STEPS.values()}
    assert devices == {"cpu", "gpu"} and len(kinds) == 4
    on_gpu = sum("gpu" in content for content, _, _ in STEPS.values())
    words = f"within 5% of {on_gpu} steps on an H200, and within 20% of {len(STEPS) - on_gpu} steps on CPUs"
    assert words in " ".join(README.split())


@pytest.mark.parametrize("step", STEPS)
def test_estimate_is_near_the_measured_peak(step):
    """On a CPU of memory above that of the libraries, and with it; on a GPU of what tensors take."""
    content, name, found = STEPS[step]
    plan = plan_of_step(content, name, found)
    peak = found["memory_mib"]["ours"]["peak"] * MIB
    runtime = found["memory_mib"]["ours"]["runtime"] * MIB
    assert memory_of(plan).tensors == pytest.approx(peak - runtime, rel=WITHIN[plan.device])
    if plan.device == "cpu":
        assert memory_of(plan).peak == pytest.approx(peak, rel=WITHIN["cpu"])
        assert runtime == pytest.approx(RUNTIME["cpu"], rel=0.5)
