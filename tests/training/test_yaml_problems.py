"""Contradictions in a YAML: one line for each, all of them in one go."""

from __future__ import annotations

import math

import pytest
from conftest import AXOLOTL_YAML, LORA

from axolotl_medusa.training.renamed_keys import renamed_key_hints
from axolotl_medusa.training.schedule import parse_schedule
from axolotl_medusa.training.yaml_problems import config_problems


def problems(**keys) -> list[str]:
    return config_problems({**AXOLOTL_YAML, "medusa_num_heads": 3, **keys})


@pytest.mark.parametrize(("key", "value"), [("medusa_num_heads", True), ("medusa_lr_multiplier", math.inf)])
def test_config_problems_value_of_the_wrong_kind_is_an_error(key, value):
    assert any(key in line for line in problems(**{key: value}))


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"medusa_chain_smoothing": 0.1}, "medusa_chain_smoothing is 0.1 with medusa_head_weighting: decay"),
        (
            {"medusa_decay_coefficient": 0.7, "medusa_head_weighting": "chain"},
            "medusa_decay_coefficient is 0.7 with medusa_head_weighting: chain",
        ),
    ],
)
def test_config_problems_key_of_the_other_weighting_is_an_error(keys, line):
    assert problems(**keys) == [f"{line}, which does not use it; remove one of the two"]
    assert problems(medusa_head_weighting="chain", medusa_chain_smoothing=0.1) == []


@pytest.mark.parametrize("schedule", ["constant", "linear", "sine", "sine_0.5", "sine_.25", "sine_1"])
def test_config_problems_known_schedule_is_accepted(schedule):
    assert problems(medusa_scheduler=schedule) == []


@pytest.mark.parametrize(
    ("text", "shape", "ramp"),
    [
        ("constant", "constant", 1.0),
        ("linear", "linear", 1.0),
        ("sine", "sine", 1.0),
        ("sine_1", "sine", 1.0),
        ("sine_0.4", "sine", 0.4),
        ("sine_.5", "sine", 0.5),
    ],
)
def test_parse_schedule_takes_shape_and_ramp_apart(text, shape, ramp):
    assert parse_schedule(text) == (shape, ramp)


BAD_SCHEDULES = [
    "cosine",
    "sine_",
    "sine_0",
    "sine_0.0",
    "sine_1.5",
    "sine_-0.5",
    "sine_-1",
    "sine_x",
    "Sine",
    "Linear",
    "linear_0.5",
    "",
]


@pytest.mark.parametrize("schedule", BAD_SCHEDULES)
def test_config_problems_unknown_schedule_is_an_error(schedule):
    (line,) = problems(medusa_scheduler=schedule)
    assert line.startswith(f"medusa_scheduler is {schedule!r}: expected constant, linear, sine, or sine_R")


HIDDEN_CACHE = {"medusa_only_heads": True, "medusa_hidden_cache": "no/such/directory/yet"}
CONTRADICTIONS = [
    (
        "medusa_only_heads",
        "medusa_self_distillation",
        {"medusa_only_heads": True, "medusa_self_distillation": True, **LORA},
    ),
    ("medusa_self_distillation", "adapter", {"medusa_self_distillation": True}),
    ("medusa_num_unfreeze_layers", "adapter: qlora", {"medusa_num_unfreeze_layers": 2, "adapter": "qlora"}),
    ("medusa_checkpoint_layers", "medusa_only_heads", {"medusa_checkpoint_layers": 2, "medusa_only_heads": True}),
    (
        "medusa_checkpoint_layers",
        "gradient_checkpointing: true",
        {"medusa_checkpoint_layers": 2, "gradient_checkpointing": "true"},
    ),
    ("medusa_num_unfreeze_layers", "medusa_only_heads", {"medusa_num_unfreeze_layers": 2, "medusa_only_heads": True}),
    (
        "medusa_num_unfreeze_layers",
        "unfrozen_parameters",
        {"medusa_num_unfreeze_layers": 2, "unfrozen_parameters": ["norm"]},
    ),
    (
        "medusa_num_unfreeze_layers",
        "lisa_step_interval",
        {"medusa_num_unfreeze_layers": 2, "lisa_step_interval": 20, "lisa_n_layers": 2},
    ),
    ("medusa_hidden_cache", "use_pose", {**HIDDEN_CACHE, "use_pose": True}),
    ("medusa_kl_coefficient", "medusa_self_distillation", {"medusa_kl_coefficient": 0.5}),
    (
        "medusa_kl_coefficient",
        "medusa_self_distillation",
        {"medusa_self_distillation": True, "adapter": "lora", "medusa_kl_coefficient": 0.0},
    ),
    (
        "medusa_distillation_regularization",
        "medusa_only_heads",
        {"medusa_only_heads": True, "medusa_distillation_regularization": 0.5},
    ),
    (
        "medusa_distillation_regularization",
        "medusa_lm_coefficient",
        {"medusa_self_distillation": True, "adapter": "lora", "medusa_distillation_regularization": 0.5},
    ),
    ("medusa_lm_coefficient", "medusa_only_heads", {"medusa_only_heads": True, "medusa_lm_coefficient": 0.5}),
    ("medusa_num_heads is 5", "sequence_len is 6", {"medusa_num_heads": 5, "sequence_len": 6}),
    (
        "metric_for_best_model",
        "medusa_logging",
        {"metric_for_best_model": "eval_medusa0_top1", "medusa_logging": False},
    ),
    ("rl", "Medusa", {"rl": "dpo"}),
    ("reward_model", "Medusa", {"reward_model": True}),
    ("relora", "Medusa", {"relora": True}),
    ("tensor_parallel_size is 2", "Medusa", {"tensor_parallel_size": 2}),
    ("context_parallel_size is 4", "Medusa", {"context_parallel_size": 4}),
    ("sequence_parallel_degree is 2", "Medusa", {"sequence_parallel_degree": 2}),
    ("fsdp_version is 1", "fsdp_version: 2", {"fsdp_version": 1, "fsdp_config": {"reshard_after_forward": True}}),
    ("label_smoothing_factor", "heads", {"label_smoothing_factor": 0.1}),
    ("medusa_hidden_cache", "medusa_only_heads: false", {"medusa_hidden_cache": "d"}),
    ("medusa_hidden_cache", "streaming", {**HIDDEN_CACHE, "streaming": True}),
    ("medusa_hidden_cache", "pretraining_dataset", {**HIDDEN_CACHE, "pretraining_dataset": [{"path": "org/data"}]}),
    ("medusa_hidden_cache", "neftune_noise_alpha: 5", {**HIDDEN_CACHE, "neftune_noise_alpha": 5}),
    ("medusa_hidden_cache", "is a file", {**HIDDEN_CACHE, "medusa_hidden_cache": __file__}),
    ("medusa_hidden_cache_limit_gb", "without medusa_hidden_cache", {"medusa_hidden_cache_limit_gb": 5}),
]


@pytest.mark.parametrize(("first", "second", "keys"), CONTRADICTIONS, ids=[f"{a}-{b}" for a, b, _ in CONTRADICTIONS])
def test_config_problems_contradiction_is_one_line_that_names_both_keys(first, second, keys):
    lines = problems(**keys)
    assert len(lines) == 1, lines
    assert first in lines[0] and second in lines[0] and "\n" not in lines[0]


@pytest.mark.parametrize("fsdp", [{}, {"version": 1}, {"fsdp_version": 1}])
def test_config_problems_fsdp_1_is_found_where_axolotl_takes_it_from(fsdp):
    """Axolotl reads a missing `fsdp_version` from `fsdp_config`, and takes 1 where it is not there either."""
    lines = problems(fsdp_config={"reshard_after_forward": True, **fsdp})
    assert len(lines) == 1 and "fsdp_version" in lines[0], lines


def test_config_problems_several_errors_are_all_reported_in_one_go(tmp_path):
    lines = problems(
        medusa_num_heads="three",
        medusa_lr_multiplier=0,
        medusa_sheduler="sine",
        medusa_scheduler="cosine",
        medusa_only_heads=True,
        medusa_num_unfreeze_layers=2,
        rl="dpo",
        base_model=str(tmp_path / "absent"),
        medusa_init_from=str(tmp_path),
    )
    starts = [
        "medusa_num_heads is 'three'",
        "medusa_lr_multiplier is 0",
        "medusa_sheduler is not",
        "medusa_scheduler is 'cosine'",
    ]
    starts += [
        "medusa_num_unfreeze_layers is 2 with medusa_only_heads",
        "rl and reward",
        "base_model ",
        "medusa_init_from ",
    ]
    for start in starts:
        assert sum(line.startswith(start) for line in lines) == 1, (start, lines)
    assert len(lines) == len(starts)


def test_config_problems_missing_number_of_heads_is_the_only_line():
    assert config_problems(AXOLOTL_YAML) == [
        "medusa_num_heads is missing: set the number of heads, e.g. `medusa_num_heads: 5`"
    ]


def test_config_problems_number_in_quotes_beside_an_error_is_still_a_number():
    (line,) = problems(medusa_num_heads="3", medusa_lm_head="tied")
    assert line.startswith("medusa_lm_head is 'tied'")


@pytest.mark.parametrize("keys", [{"sequence_len": "long"}, {"datasets": "data.jsonl"}])
def test_config_problems_malformed_key_of_axolotl_is_left_to_axolotl(keys):
    cfg = {**AXOLOTL_YAML, "medusa_num_heads": 3, **keys}
    assert [line for line in config_problems(cfg) if "medusa_num_heads" in line] == []
    assert renamed_key_hints(cfg) == []


@pytest.mark.parametrize(
    "key", ["base_model", "lora_model_dir", "deepspeed", "medusa_init_from", "medusa_hidden_cache"]
)
@pytest.mark.parametrize("name", ["x" * 5000, "/" + "x" * 5000, "~nobody-at-all/x"], ids=["long", "long-path", "home"])
def test_config_problems_name_that_no_file_can_have_is_no_traceback(key, name):
    lines = config_problems({"medusa_num_heads": 2, "medusa_only_heads": True, key: name})
    assert all(len(line) <= 1005 and "\n" not in line for line in lines)
