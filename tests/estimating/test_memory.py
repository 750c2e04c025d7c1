"""The formulas: what each engine, optimizer and recipe adds or saves."""

from __future__ import annotations

import pytest
from estimated_plans import FULL, LORA, MEDUSA_1, MEDUSA_2, RECIPES, SIZES, plan

from axolotl_medusa.estimating.memory import base_weights, memory_of
from axolotl_medusa.estimating.plan import ENGINES
from axolotl_medusa.model.heads import MedusaHeads


@pytest.mark.parametrize("form", ["separate", "shared"])
def test_heads_have_the_parameters_of_the_module(form):
    heads = MedusaHeads(SIZES.hidden, SIZES.vocab, 3, 2, form=form, device="meta")
    found = plan(MEDUSA_1, medusa_lm_head=form, medusa_num_layers=2)
    assert found.head_parameters == sum(parameter.numel() for parameter in heads.parameters())


def test_one_gpu_holds_values_gradients_and_two_moments_of_the_heads():
    found = plan(MEDUSA_1, gradient_accumulation_steps=1)
    memory = memory_of(found)
    assert memory.weights == 2 * SIZES.parameters
    assert (memory.heads, memory.gradients, memory.optimizer) == tuple(k * found.head_parameters for k in (4, 4, 8))
    assert memory.gathered == 0


def test_micro_batches_have_gradients_of_output_layers_of_their_own():
    once, summed = (memory_of(plan(MEDUSA_1, gradient_accumulation_steps=steps)).gradients for steps in (1, 2))
    assert summed - once == 4 * 3 * SIZES.output


def test_full_weights_train_in_the_models_type():
    found = plan(FULL, gradient_accumulation_steps=1, medusa_lm_head="shared")
    memory, heads = memory_of(found), found.head_parameters
    assert memory.gradients == 4 * heads + 2 * SIZES.parameters
    assert memory.optimizer == 8 * heads + 4 * SIZES.parameters
    last = plan(FULL, medusa_num_unfreeze_layers=4)
    assert last.trained_base == 4 * SIZES.layer


def test_four_bits_hold_the_layers_matrices_alone():
    found = plan(MEDUSA_2, load_in_4bit=True, adapter="qlora")
    matrices = sum(matrix.parameters for matrix in SIZES.matrices)
    assert base_weights(found) == pytest.approx(0.516 * matrices + 2 * (SIZES.parameters - matrices))


def test_ddp_holds_a_second_copy_of_all_gradients_in_its_buckets():
    one, two = (memory_of(plan(MEDUSA_2, gpus)) for gpus in (1, 2))
    assert two.gradients - one.gradients == 4 * plan(MEDUSA_2).trained
    assert (two.weights, two.heads, two.optimizer) == (one.weights, one.heads, one.optimizer)


def test_zero_holds_values_in_bf16_and_parts_of_fp32_copies():
    found = {stage: memory_of(plan(MEDUSA_2, 4, f"zero-{stage}")) for stage in (1, 2, 3)}
    trained, own_outputs, bucket = plan(MEDUSA_2).trained, plan(MEDUSA_2).own_outputs, SIZES.hidden**2
    assert {found[stage].heads for stage in (1, 2)} == {2 * trained + 4 * trained / 4}
    assert found[3].heads == 2 * trained / 4 + 4 * trained / 4
    assert {memory.optimizer for memory in found.values()} == {8 * trained / 4}
    at_step = 4 * trained / 4
    assert found[1].gradients == 2 * trained + at_step + 2 * 2 * 500_000_000 + 2 * own_outputs
    assert found[2].gradients == 2 * trained / 4 + at_step + 2 * 2 * bucket + 2 * own_outputs
    assert found[3].gradients == 2 * trained / 4 + at_step + 2 * bucket
    assert found[3].gathered == 2 * 1_000_000_000


def test_fsdp2_holds_parts_in_the_loaded_type_and_gathers_heads_and_embeddings_together():
    memory, found = memory_of(plan(MEDUSA_2, 4, "fsdp2")), plan(MEDUSA_2)
    assert memory.heads == 4 * found.trained / 4
    assert memory.optimizer == 8 * found.trained / 4
    assert memory.gradients == 4 * found.trained / 4 + 2 * found.trained  # micro-batches are added up unshared
    root = SIZES.embeddings + SIZES.others + found.head_parameters
    assert memory.gathered == pytest.approx(2 * root + 2 * 2 * SIZES.layer)


@pytest.mark.parametrize("recipe", RECIPES)
def test_engines_share_out_more_from_one_to_the_next(recipe):
    """ZeRO-1 shares out what DDP does not, ZeRO-2 gradients too, ZeRO-3 and FSDP2 weights too."""
    on_8 = {engine: memory_of(plan(RECIPES[recipe], 8, engine)) for engine in ENGINES}
    assert on_8["zero-1"].optimizer == on_8["zero-2"].optimizer < on_8["ddp"].optimizer
    assert on_8["zero-2"].gradients < on_8["zero-1"].gradients < on_8["ddp"].gradients
    for engine in ("zero-3", "fsdp2"):
        assert on_8[engine].weights == pytest.approx(on_8["ddp"].weights / 8)
        assert on_8[engine].gathered > 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_more_gpus_never_take_more_memory_of_one(recipe, engine):
    peaks = [memory_of(plan(RECIPES[recipe], gpus, engine)).peak for gpus in (2, 4, 8, 64, 512)]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize(
    ("less", "than"),
    [
        ({"optimizer": "adamw_bnb_8bit"}, {}),
        ({"optimizer": "adafactor"}, {"optimizer": "muon"}),
        ({"optimizer": "adamw_torch_fused"}, {"optimizer": "never_heard_of", "micro_batch_size": 4}),
        ({}, {"gradient_checkpointing": False}),
        ({"medusa_checkpoint_layers": 8, "gradient_checkpointing": False}, {"gradient_checkpointing": False}),
        ({"lora_dropout": 0.0, "gradient_checkpointing": False}, {"gradient_checkpointing": False}),
        ({"medusa_lm_head": "shared"}, {}),
        ({"medusa_lm_head": "shared"}, {"medusa_lm_head": "trained"}),
        ({"medusa_lm_head": "trained"}, {}),
        ({"medusa_draft_vocab": 8192}, {}),
        ({}, {"medusa_self_distillation": True}),
        ({}, {"medusa_head_loss": "kl"}),
        ({}, {"medusa_head_loss": "tv"}),
        ({}, {"medusa_head_weighting": "chain"}),
        ({}, {"attn_implementation": "sdpa", "sample_packing": True}),
        ({"attn_implementation": "sdpa"}, {"attn_implementation": "eager"}),
        ({}, {"medusa_num_layers": 2}),
        ({}, {"lora_r": 64}),
        ({"sequence_len": 1024}, {}),
        ({}, {"bf16": False}),
    ],
    ids=str,
)
def test_key_changes_the_peak(less, than):
    assert memory_of(plan({**MEDUSA_2, **less})).peak < memory_of(plan({**MEDUSA_2, **than})).peak


def test_recomputed_layers_lie_between_none_and_all():
    keys = {**MEDUSA_2, "gradient_checkpointing": False}
    some = [memory_of(plan(keys, medusa_checkpoint_layers=count)).peak for count in (0, 4, 8, 12)]
    assert some == sorted(some, reverse=True)
    assert some[-1] > memory_of(plan(MEDUSA_2)).peak


def test_frozen_adapter_of_medusa_1_has_values_alone():
    without, frozen = memory_of(plan(MEDUSA_1)), memory_of(plan({**MEDUSA_1, **LORA}))
    assert frozen.heads - without.heads == 4 * plan({**MEDUSA_1, **LORA}).adapter
    assert (frozen.gradients, frozen.optimizer) == (without.gradients, without.optimizer)
