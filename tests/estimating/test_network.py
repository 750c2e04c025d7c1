"""Bytes on the network against what the collectives of each engine send, counted by hand."""

from __future__ import annotations

import pytest
from estimated_plans import FULL, MEDUSA_1, MEDUSA_2, RECIPES, SIZES, plan

from axolotl_medusa.estimating.network import sent_per_step
from axolotl_medusa.estimating.plan import ENGINES


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_gpu_sends_nothing(recipe, engine):
    assert sent_per_step(plan(RECIPES[recipe], 1, engine)) == 0


def test_ddp_reduces_fp32_gradients_once_however_many_micro_batches():
    for steps in (1, 4):
        found = plan(MEDUSA_2, 4, "ddp", gradient_accumulation_steps=steps)
        assert sent_per_step(found) == 2 * 4 * found.trained * 3 / 4
    full = plan(FULL, 4, "ddp")
    assert sent_per_step(full) == 2 * (4 * full.head_parameters + 2 * SIZES.parameters) * 3 / 4


def test_zero_1_sends_gradients_once_and_zero_2_in_every_micro_batch():
    found = plan(MEDUSA_2, 4, "zero-1")
    trained = 2 * found.trained * 3 / 4
    assert sent_per_step(found) == 2 * trained + trained
    assert sent_per_step(plan(MEDUSA_2, 4, "zero-2")) == 4 * trained + trained


@pytest.mark.parametrize("engine", ["zero-3", "fsdp2"])
def test_weights_are_gathered_in_every_micro_batch(engine):
    one, two, four = (sent_per_step(plan(MEDUSA_2, 8, engine, gradient_accumulation_steps=n)) for n in (1, 2, 4))
    assert two - one == pytest.approx((four - two) / 2)
    assert two - one > 2 * (2 * SIZES.decoder) * 7 / 8


def test_zero_3_gathers_an_output_layer_for_every_chunk_of_the_losses():
    """4096 tokens of 128,256 logits are two chunks; with an adapter on lm_head eight, of the base model alone."""
    found = plan(MEDUSA_1, 8, "zero-3", gradient_accumulation_steps=1)
    blocks = 2 * (found.head_parameters - found.own_outputs)
    layers = 2 * SIZES.parameters * SIZES.decoder / SIZES.parameters
    outputs = 2 * SIZES.output * (2 * 3 * 2)
    embedding = 2 * SIZES.output
    gradients = 2 * found.trained
    assert sent_per_step(found) == pytest.approx((layers + 2 * blocks + outputs + embedding + gradients) * 7 / 8)
    adapted, plain = (
        sent_per_step(plan({**MEDUSA_2, "lora_target_modules": names}, 8, "zero-3", gradient_accumulation_steps=1))
        for names in (["lm_head"], [])
    )
    assert 2 * (8 - 2) * 2 * SIZES.output * 7 / 8 == pytest.approx(adapted - plain, rel=0.01)


def test_passes_over_the_layers_are_counted():
    """ZeRO-3 gathers again to recompute; FSDP2 recomputes while the layer is there; Medusa-1 has no backward through layers."""
    layers = 2 * SIZES.decoder * 7 / 8

    def more(engine, cfg, **keys):
        return sent_per_step(plan(cfg, 8, engine, gradient_accumulation_steps=1, **keys))

    adapter = 2 * plan(MEDUSA_2).adapter * 7 / 8
    recomputed = more("zero-3", MEDUSA_2) - more("zero-3", MEDUSA_2, gradient_checkpointing=False)
    assert recomputed == pytest.approx(layers + adapter)
    assert more("fsdp2", MEDUSA_2) == more("fsdp2", MEDUSA_2, gradient_checkpointing=False)
    for engine in ("zero-3", "fsdp2"):
        teacher = more(engine, MEDUSA_2, medusa_self_distillation=True) - more(engine, MEDUSA_2)
        assert teacher >= layers
    whole = 2 * (SIZES.parameters + plan(MEDUSA_1).head_parameters) * 7 / 8
    gradients = 2 * plan(MEDUSA_1).trained * 7 / 8
    assert more("fsdp2", MEDUSA_1) == pytest.approx(whole + gradients)


def test_hundreds_of_gpus_send_hardly_more_than_eight():
    for engine in ENGINES:
        few, many = (sent_per_step(plan(MEDUSA_2, gpus, engine)) for gpus in (8, 512))
        assert 1 < many / few < 8 / 7
