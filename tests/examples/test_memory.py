"""The GiB that examples/medusa states for each YAML are those of the README's formula."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from example_files import BIG, GPUS, README, header_of, load, table_after, text_of


@dataclass(frozen=True)
class Shape:
    """Sizes of a published model, for the memory estimate."""

    hidden: int
    layers: int
    intermediate: int
    query: int
    key: int
    vocab: int

    @property
    def decoder(self) -> int:
        attention = 2 * self.hidden * (self.query + self.key)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def embeddings(self) -> int:
        return 2 * self.vocab * self.hidden

    def lora(self, rank: int) -> int:
        hidden = self.hidden
        layer = 2 * (hidden + self.query) + 2 * (hidden + self.key) + 3 * (hidden + self.intermediate)
        return rank * (self.layers * layer + hidden + self.vocab)


SHAPES = {
    "lmsys/vicuna-7b-v1.5": Shape(4096, 32, 11008, 4096, 4096, 32000),
    "HuggingFaceH4/zephyr-7b-beta": Shape(4096, 32, 14336, 4096, 1024, 32000),
    "mistralai/Mistral-7B-Instruct-v0.3": Shape(4096, 32, 14336, 4096, 1024, 32768),
    "Qwen/Qwen3-8B": Shape(4096, 36, 12288, 4096, 1024, 151936),
    "Qwen/Qwen3-32B": Shape(5120, 64, 25600, 8192, 1024, 151936),
}


def estimated_gib(cfg: Mapping[str, Any], gpus: int = 1) -> float:
    """The formula of the examples' README, section "Memory"."""
    shape = SHAPES[cfg["base_model"]]
    rows = cfg["micro_batch_size"] * cfg["sequence_len"]
    hidden, intermediate, heads = shape.hidden, shape.intermediate, cfg["medusa_num_heads"]
    own_layers = shape.vocab * hidden if cfg["medusa_lm_head"] == "separate" else 0
    head_parameters = heads * (hidden**2 + hidden + own_layers)
    lora = shape.lora(cfg["lora_r"]) if cfg.get("adapter") else 0
    weights = (0.516 if cfg.get("load_in_4bit") else 2) * shape.decoder + 2 * shape.embeddings
    activations = 16 * heads * rows * hidden
    if cfg["medusa_only_heads"]:
        activations += 2 * rows * (4 * hidden + 3 * intermediate)
    else:
        activations += 2 * shape.layers * rows * hidden
        activations += 2 * rows * (8 * hidden + 4 * intermediate) + 10 * rows * (6 * hidden + intermediate)
    if cfg.get("medusa_self_distillation"):
        activations += 2 * rows * hidden
    if "zero3" in str(cfg.get("deepspeed")):
        gathered = 2 * (shape.vocab * hidden + shape.decoder / shape.layers)
        states = (weights + 18 * (head_parameters + lora)) / gpus + gathered
    else:
        states = weights + 14 * head_parameters + (4 if cfg["medusa_only_heads"] else 10) * lora
    return (states + activations) / 2**30 + 3


def test_example_memory_of_qwen3_is_no_less_than_what_was_measured_on_a_gpu():
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "train_step_gpu_8bit.json"
    (step,) = json.loads(file.read_text(encoding="utf-8"))["steps"].values()
    measured, estimate = step["memory_mib"]["ours"]["peak"] / 1024, estimated_gib(load("qwen3")) - 3
    assert measured <= estimate <= 1.2 * measured
    assert f"take {measured:.1f} GiB at most there, and the formula says {estimate:.1f} without" in " ".join(
        README.split()
    )


@pytest.mark.parametrize("name", BIG)
def test_example_memory_is_the_readmes_formula(name):
    gpus = GPUS.get(name, 1)
    estimate = round(estimated_gib(load(name), gpus))
    (written,) = re.findall(r"Estimated, not measured: (\d+) GiB", header_of(name))
    count, size = map(int, re.findall(r"Needs: (\d+) GPUs? with (\d+) GB", header_of(name))[0])
    assert (count, int(written)) == (gpus, estimate)
    assert estimate * 2**30 < 0.95 * size * 1e9
    (cell,) = (row[8] for row in table_after("# Recipes") if row[0] == f"`{name}.yml`")
    assert cell == (f"{estimate} on {gpus} GPUs" if gpus > 1 else str(estimate))


def test_example_memory_of_the_alternatives_in_comments():
    qwen3, large = load("qwen3"), load("qwen3_32b")
    separate = {"medusa_lm_head": "separate"}
    more = estimated_gib({**qwen3, **separate}) - estimated_gib(qwen3)
    assert f"separate: {round(more)} GiB more to train" in text_of("qwen3")
    medusa_1 = {**qwen3, "medusa_only_heads": True, "medusa_self_distillation": False}
    assert f"Medusa-1 {round(estimated_gib(medusa_1))} GiB" in header_of("qwen3")
    assert f"On 2 GPUs {round(estimated_gib(large, 2))} GiB each" in header_of("qwen3_32b")
    assert f"separate: {round(estimated_gib({**large, **separate}, 4))} GiB instead of 26" in text_of("qwen3_32b")
