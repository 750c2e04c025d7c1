"""What to change: cheapest first, and each change saves what it says."""

from __future__ import annotations

import pytest
from estimated_plans import FULL, MEDUSA_1, MEDUSA_2, SIZES, plan

from axolotl_medusa.estimating.advice import changes_until_it_fits
from axolotl_medusa.estimating.memory import GIB, memory_of
from axolotl_medusa.estimating.plan import plan_of


def lines(cfg, gib, gpus=1):
    changes = changes_until_it_fits(cfg, plan(cfg, gpus), gib)
    return [change.lines[0] for change in changes], changes


def test_what_fits_needs_no_change():
    assert lines(MEDUSA_2, 1000) == ([], [])


def test_what_costs_nothing_comes_first():
    cfg = {**MEDUSA_2, "medusa_lm_head": "shared"}
    peak = memory_of(plan(cfg)).peak / GIB
    (first,), (change,) = lines(cfg, peak - 0.2)
    assert first == "micro_batch_size: 1" and change.lines[1] == "gradient_accumulation_steps: 8"


def test_order_on_one_gpu():
    found, changes = lines({**MEDUSA_2, "gradient_checkpointing": False, "micro_batch_size": 4}, 4)
    assert found[:5] == [
        "micro_batch_size: 1",
        "optimizer: adamw_bnb_8bit",
        "gradient_checkpointing: true",
        "medusa_lm_head: shared",
        "adapter: qlora",
    ]
    assert found[5:] and all(line.startswith("sequence_len") for line in found[5:])
    peaks = [change.gib for change in changes]
    assert peaks == sorted(peaks, reverse=True)


def test_several_gpus_share_out_before_anything_gets_worse():
    found, changes = lines(MEDUSA_2, 8, gpus=4)
    engines = [line for line in found if line.startswith("deepspeed")]
    assert engines == sorted(engines) and engines[-1] == "deepspeed: deepspeed_configs/zero3_bf16.json"
    assert "medusa_lm_head: shared" not in found[: found.index(engines[-1])]
    assert changes[-1].plan.engine == "zero-3" and "adapter: qlora" not in found


def test_all_weights_give_way_to_an_adapter():
    found, changes = lines(FULL, 10)
    assert "adapter: lora" in found
    assert changes[-1].gib <= 10


@pytest.mark.parametrize("cfg", [MEDUSA_1, MEDUSA_2, FULL], ids=["medusa-1", "medusa-2", "full"])
@pytest.mark.parametrize("gpus", [1, 4])
def test_changes_written_into_the_yaml_give_the_memory_that_is_said(cfg, gpus):
    import yaml

    keys = dict(cfg)
    for change in changes_until_it_fits(cfg, plan(cfg, gpus), 5):
        count = gpus
        for line in change.lines:
            if line.endswith(" GPUs"):
                count = int(line.split()[0])
            else:
                keys |= yaml.safe_load(line)
        found = plan_of(keys, gpus=count, sizes=SIZES)
        assert memory_of(found).peak / GIB == pytest.approx(change.gib)


def test_model_that_is_too_large_for_one_gpu_asks_for_more():
    found, changes = lines({**MEDUSA_2, "sequence_len": 512}, 4.5)
    assert changes[-1].gib <= 4.5 or not found[-1].endswith("GPUs")
