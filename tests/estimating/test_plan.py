"""What a YAML means, and one line for what it cannot mean."""

from __future__ import annotations

import json

import pytest
import yaml
from estimated_plans import FULL, LORA, MEDUSA_1, MEDUSA_2, SIZES, plan
from example_files import NAMES, load

from axolotl_medusa.estimating.plan import engine_of, plan_of, yaml_of


@pytest.mark.parametrize(
    ("keys", "engine"),
    [
        ({}, "ddp"),
        ({"deepspeed": "deepspeed_configs/zero1.json"}, "zero-1"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "zero-2"),
        ({"deepspeed": "deepspeed_configs/zero3_bf16.json"}, "zero-3"),
        ({"deepspeed": {"train_batch_size": "auto"}}, "ddp"),
        ({"fsdp_version": 2, "fsdp_config": {"offload_params": False}}, "fsdp2"),
    ],
    ids=str,
)
def test_engine_is_the_yamls(keys, engine, monkeypatch):
    monkeypatch.chdir(yaml_folder())
    assert engine_of(keys) == engine == plan({**MEDUSA_1, **keys}).engine


def yaml_folder():
    from example_files import ROOT

    return ROOT


def test_deepspeeds_buckets_are_those_of_its_file(tmp_path):
    file = tmp_path / "zero1.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000, "overlap_comm": True}}))
    found = plan({**MEDUSA_1, "deepspeed": str(file)})
    assert (found.bucket, found.overlap) == (1000, True)
    shipped = plan({**MEDUSA_1, "deepspeed": str(file)}, engine="zero-2")
    assert (shipped.bucket, shipped.overlap) == (SIZES.hidden**2, True)
    assert plan(MEDUSA_1, engine="zero-1").bucket == 500_000_000
    assert plan(MEDUSA_1).bucket == 0


def test_precision_is_what_axolotl_would_choose():
    assert [plan({**MEDUSA_1, "bf16": value}).half for value in (True, False, "auto", None)] == [
        True,
        False,
        True,
        True,
    ]
    on_cpu = [plan_of({**MEDUSA_1, "bf16": value}, device="cpu", sizes=SIZES).half for value in (True, "auto", None)]
    assert on_cpu == [True, False, False]


def test_recipes_train_what_they_say():
    medusa_1, medusa_2, full = plan(MEDUSA_1), plan(MEDUSA_2), plan(FULL)
    assert medusa_1.trained == medusa_1.head_parameters
    assert medusa_2.trained == medusa_2.head_parameters + medusa_2.adapter
    assert full.trained == full.head_parameters + SIZES.parameters
    frozen = plan({**MEDUSA_1, **LORA})
    assert frozen.trained == frozen.head_parameters and frozen.adapter == medusa_2.adapter


@pytest.mark.parametrize("name", NAMES)
def test_every_example_has_a_plan(name, monkeypatch):
    monkeypatch.chdir(yaml_folder())
    cfg = load(name)
    found = plan_of(cfg, sizes=SIZES)
    assert (found.micro_batch, found.sequence) == (cfg["micro_batch_size"], cfg["sequence_len"])
    assert bool(found.adapter) is bool(cfg.get("adapter"))


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"medusa_num_heads": None}, "medusa_num_heads: Field required"),
        ({"medusa_num_heads": 99}, "medusa_num_heads: Input should be less than or equal to 16"),
        ({"medusa_heads": 3}, "medusa_heads is not a key of axolotl-medusa"),
        ({"base_model": None}, "base_model is missing"),
        ({"deepspeed": "nowhere.json"}, "nowhere.json does not exist"),
        ({"deepspeed": {"zero_optimization": {"stage": 7}}}, "deepspeed asks for stage 7: expected 0, 1, 2 or 3"),
        ({"fsdp_version": 1}, "fsdp_version is 1: heads train with FSDP2"),
        ({"adapter": "loha"}, "adapter is 'loha'"),
        ({"adapter": "lora"}, "adapter is lora without targets"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0: expected a whole number, at least 1"),
        ({"sequence_len": "long"}, "sequence_len is 'long'"),
    ],
    ids=str,
)
def test_yaml_that_means_nothing_is_one_line(keys, reason):
    with pytest.raises(ValueError) as error:
        plan({**MEDUSA_1, **keys})
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_engine_and_number_of_gpus_that_are_none_are_one_line():
    with pytest.raises(ValueError, match="engine megatron is not known: expected ddp, zero-1, zero-2, zero-3, fsdp2"):
        plan(MEDUSA_1, engine="megatron")
    with pytest.raises(ValueError, match="the number of GPUs is 0: expected at least 1"):
        plan(MEDUSA_1, gpus=0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("- a list\n", "holds no keys"), ("a: [\n", "is no YAML"), ("\x00", "is no YAML"), (None, "cannot be read")],
)
def test_file_that_is_no_yaml_is_one_line(text, reason, tmp_path):
    file = tmp_path / "x.yml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=reason) as error:
        yaml_of(file)
    assert "\n" not in str(error.value)


def test_yaml_is_read_as_axolotl_reads_it(tmp_path):
    file = tmp_path / "x.yml"
    file.write_text(yaml.safe_dump(MEDUSA_2))
    assert yaml_of(file) == MEDUSA_2
