"""Every file of deepspeed_configs is complete for the Trainer and named in the examples' README."""

from __future__ import annotations

import json
import re

import pytest
from conftest import make_model
from example_files import README, ROOT
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

DEEPSPEED_CONFIGS = sorted((ROOT / "deepspeed_configs").glob("*.json"))


@pytest.mark.parametrize("file", DEEPSPEED_CONFIGS, ids=lambda file: file.stem)
def test_deepspeed_config_leaves_nothing_to_fill_in_after_the_trainer(file):
    from transformers import TrainingArguments

    config = json.loads(file.read_text(encoding="utf-8"))
    assert "optimizer" not in config and "scheduler" not in config
    stage = config["zero_optimization"]["stage"]
    assert file.stem.startswith(f"zero{stage}")
    assert config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save", False) is (stage == 3)
    model = make_model("llama")
    arguments = TrainingArguments(output_dir="unused", report_to=[], per_device_train_batch_size=2, use_cpu=True)
    arguments.bf16 = True  # after the constructor, which refuses it without a GPU
    try:
        parsed = HfTrainerDeepSpeedConfig(config)
        parsed.trainer_config_process(arguments)
        parsed.trainer_config_finalize(arguments, model, num_training_steps=10)
    finally:
        unset_hf_deepspeed_config()  # models made while it is set would be partitioned
    assert "auto" not in json.dumps(parsed.config)
    assert parsed.config["bf16"]["enabled"] is True
    assert parsed.config["train_micro_batch_size_per_gpu"] == 2


def test_deepspeed_configs_are_named_in_the_readme():
    named = set(re.findall(r"deepspeed_configs/(\w+\.json)", README))
    assert named == {file.name for file in DEEPSPEED_CONFIGS}
