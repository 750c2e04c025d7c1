"""What a recipe chooses for a model and its GPUs is what `estimate` says of them."""

from __future__ import annotations

import pytest
from docs.write_pages import sizes

from axolotl_medusa.estimating.memory import GIB, memory_of
from axolotl_medusa.estimating.plan import plan_of
from axolotl_medusa.recipes.choices import LARGEST_SHARE, MOST_OWN_OUTPUTS, choose, shown
from axolotl_medusa.recipes.model_facts import ModelFacts

MISTRAL, QWEN, LARGE, LLAMA_70B = (
    "mistralai/Mistral-7B-Instruct-v0.3",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-32B",
    "meta-llama/Meta-Llama-3-70B",
)


def facts(name, **changes):
    return ModelFacts(name, sizes(name), **changes)


@pytest.mark.parametrize(("name", "form"), [(MISTRAL, "separate"), (QWEN, "shared"), (LARGE, "shared")])
def test_form_follows_the_size_of_the_output_layers(name, form):
    found = facts(name)
    outputs = 5 * found.sizes.output
    assert (outputs <= min(MOST_OWN_OUTPUTS, LARGEST_SHARE * found.sizes.parameters)) is (form == "separate")
    assert choose(found).keys["medusa_lm_head"] == form


@pytest.mark.parametrize("method", ["medusa-1", "self-distillation"])
@pytest.mark.parametrize(
    ("name", "gpus", "gib"),
    [
        (MISTRAL, 1, 74.0),
        (MISTRAL, 1, 24.0),
        (MISTRAL, 1, 12.0),
        (QWEN, 2, 16.0),
        (LARGE, 4, 37.0),
        (LLAMA_70B, 8, 74.0),
    ],
)
def test_recipe_fits_and_estimate_of_its_yaml_says_so(name, gpus, gib, method):
    recipe = choose(facts(name), method, gpus=gpus, gpu_gib=gib)
    assert memory_of(recipe.plan).peak / GIB <= gib
    again = plan_of(recipe.keys, gpus=gpus, sizes=sizes(name))
    assert again.engine == recipe.plan.engine
    assert memory_of(again).peak == pytest.approx(memory_of(recipe.plan).peak, rel=0.01)
    keys = recipe.keys
    assert gpus * keys["micro_batch_size"] * keys["gradient_accumulation_steps"] == 8


def test_small_gpu_takes_four_bits_with_a_reason_and_heads_alone_need_no_adapter():
    alone = choose(facts(MISTRAL), gpu_gib=12.0)
    assert alone.keys["load_in_4bit"] is True
    assert not any(key == "adapter" or key.startswith("lora_") for key in alone.keys)
    assert alone.reasons["load_in_4bit"] == "to fit 12 GiB: the base model is rounded to 4 bits"
    both = choose(facts(MISTRAL), "self-distillation", gpu_gib=14.0)
    assert (both.keys["adapter"], both.keys["load_in_4bit"]) == ("qlora", True)


def test_large_model_on_several_gpus_is_shared_out_by_zero_3():
    keys = choose(facts(LARGE), "self-distillation", gpus=4, gpu_gib=37.0).keys
    assert keys["deepspeed"] == "deepspeed_configs/zero3_bf16.json"
    assert keys["optimizer"] == "adamw_torch_fused"


def test_gpus_that_are_too_small_for_zero_3_take_four_bits():
    keys = choose(facts(QWEN), "self-distillation", gpus=2, gpu_gib=16.0).keys
    assert (keys["adapter"], keys["load_in_4bit"]) == ("qlora", True)
    assert "zero3" not in keys.get("deepspeed", "")


@pytest.mark.parametrize(("gpus", "words"), [(1, "on a GPU at the least"), (4, "on each of 4 GPUs at the least")])
def test_model_that_fits_nowhere_is_refused_with_what_it_needs(gpus, words):
    with pytest.raises(ValueError, match=rf"Llama-3-70B needs \d+\.\d GiB {words}, found --gpu-gib 8: take larger"):
        choose(facts(LLAMA_70B), gpus=gpus, gpu_gib=8.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": -1}, "--gpus is -1: expected a number of GPUs, or 0 for a CPU"),
        ({"gpu_gib": 0.0}, "--gpu-gib is 0: expected a number above 0"),
        ({"gpu_gib": float("nan")}, "--gpu-gib is nan: expected a number above 0"),
        ({"gpus": 0, "gpu_gib": 8.0}, "--gpu-gib is 8 with --gpus 0, which trains on a CPU"),
        ({"thinking": True}, "has no enable_thinking: leave the option out"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        choose(facts(MISTRAL), **options)


def test_context_is_the_methods_within_the_models():
    assert choose(facts(MISTRAL)).keys["sequence_len"] == 4096
    assert choose(facts(MISTRAL), "self-distillation").keys["sequence_len"] == 2048
    assert choose(facts(MISTRAL, positions=1500)).keys["sequence_len"] == 1500
    assert choose(facts(QWEN, thoughts="switch"), thinking=True).keys["sequence_len"] == 8192
    assert choose(facts(QWEN, thoughts="always")).thinking is True


def test_cpu_trains_in_fp32_with_what_it_has():
    recipe = choose(facts(QWEN), gpus=0)
    assert recipe.plan.device == "cpu" and not recipe.plan.half
    expected = {"bf16": False, "attn_implementation": "sdpa", "optimizer": "adamw_torch", "medusa_num_heads": 3}
    assert {key: recipe.keys[key] for key in expected} == expected


def test_model_without_flash_attention_gets_sdpa():
    assert choose(facts(MISTRAL, flash_attention=False)).keys["attn_implementation"] == "sdpa"


@pytest.mark.parametrize(
    ("value", "text"),
    [(5e-4, "5.0e-4"), (0.01, "0.01"), (0.0, "0.0"), (True, "true"), (40, "40"), (1.2345e-5, "1.2345e-05")],
)
def test_numbers_are_written_as_the_examples_have_them(value, text):
    assert shown(value) == text
