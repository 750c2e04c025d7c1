"""The GiB that examples/medusa states for each YAML are those of `axolotl-medusa estimate`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from docs.write_pages import sizes
from example_files import BIG, GPUS, README, header_of, load, table_after, text_of

from axolotl_medusa.cli import main
from axolotl_medusa.estimating.memory import GIB, Memory, memory_of
from axolotl_medusa.estimating.plan import plan_of


def estimated(cfg: Mapping[str, Any], gpus: int = 1, engine: str | None = None) -> Memory:
    return memory_of(plan_of(cfg, gpus=gpus, engine=engine, sizes=sizes(cfg["base_model"])))


def gib(cfg: Mapping[str, Any], gpus: int = 1, engine: str | None = None) -> float:
    return estimated(cfg, gpus, engine).peak / GIB


def in_words(memory: Memory) -> str:
    """The parts of the peak as the headers of the examples give them."""
    parts = {
        "base model": memory.weights,
        "all that trains": memory.heads + memory.gradients + memory.optimizer,
        "gathered weights": memory.gathered,
        "activations and losses": memory.activations + memory.losses,
    }
    return " + ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items() if value) + " + 3 for CUDA"


def test_example_memory_of_qwen3_is_no_less_than_what_was_measured_on_a_gpu():
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "train_step_gpu_8bit.json"
    (step,) = json.loads(file.read_text(encoding="utf-8"))["steps"].values()
    as_measured = {"micro_batch_size": 1, "sequence_len": 4096, "gradient_accumulation_steps": 1}
    measured = step["memory_mib"]["ours"]["peak"] / 1024
    estimate = estimated({**load("qwen3"), **as_measured}).tensors / GIB
    assert measured <= estimate <= 1.2 * measured
    assert f"take {measured:.1f} GiB at most there, and the estimate says {estimate:.1f} without" in " ".join(
        README.split()
    )


@pytest.mark.parametrize("name", BIG)
def test_example_memory_is_what_estimate_says(name):
    gpus = GPUS.get(name, 1)
    memory = estimated(load(name), gpus)
    estimate = round(memory.peak / GIB)
    header = " ".join(header_of(name).split())
    each = " on each" if gpus > 1 else ""
    assert f"Estimated, not measured: {estimate} GiB{each} = {in_words(memory)}" in header
    ((count, size),) = re.findall(r"Needs: (\d+) GPUs? with (\d+) GB", header)
    assert int(count) == gpus
    assert estimate * 2**30 < 0.95 * int(size) * 1e9
    (cell,) = (row[8] for row in table_after("# Recipes") if row[0] == f"`{name}.yml`")
    assert cell == (f"{estimate} on {gpus} GPUs" if gpus > 1 else str(estimate))


def test_example_memory_of_the_alternatives_in_comments():
    qwen3, large, vicuna = load("qwen3"), load("qwen3_32b"), load("vicuna_7b_medusa1")
    separate = {"medusa_lm_head": "separate"}
    assert f"separate: {round(gib({**qwen3, **separate}) - gib(qwen3))} GiB more to train" in text_of("qwen3")
    medusa_1 = {**qwen3, "medusa_only_heads": True, "medusa_self_distillation": False}
    assert f"Medusa-1 {round(gib(medusa_1))} GiB" in header_of("qwen3")
    assert f"On 2 GPUs {round(gib(large, 2))} GiB each" in " ".join(header_of("qwen3_32b").split())
    assert f"are small: {round(gib(large, 4, 'zero-2'))} GiB on every GPU" in " ".join(header_of("qwen3_32b").split())
    more = f"separate: {round(gib({**large, **separate}, 4))} GiB instead of {round(gib(large, 4))}"
    assert more in text_of("qwen3_32b")
    one_by_one = {"micro_batch_size": 1, "gradient_accumulation_steps": 8}
    less = gib(vicuna) - gib({**vicuna, **one_by_one})
    assert f"--micro_batch_size 1 --gradient_accumulation_steps 8 needs {less:.1f} GiB less" in header_of(
        "vicuna_7b_medusa1"
    )


def test_example_readme_shows_what_the_command_prints(tmp_path, monkeypatch, capsys):
    """Its model is in a cache that holds its config alone."""
    from docs.published_models import CONFIGS
    from example_files import ROOT

    repository = tmp_path / "models--Qwen--Qwen3-8B"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc" / "config.json").write_text(json.dumps(CONFIGS["Qwen/Qwen3-8B"]))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(ROOT)
    (command,) = re.findall(r"(?m)^    \$ axolotl-medusa (estimate .+)$", README)
    assert main(command.split()) == 0
    shown = README.split(f"    $ axolotl-medusa {command}\n")[1].split("<!-- end -->")[0]
    assert [line.strip() for line in shown.splitlines()] == [
        line.strip() for line in capsys.readouterr().out.splitlines()
    ]
