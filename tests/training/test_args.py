"""The YAML keys: defaults, bounds, and one line for every contradiction, all of them in one go."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from conftest import AXOLOTL_YAML, LORA
from pydantic import ValidationError

from axolotl_medusa.training.args import (
    RENAMED_BY_AXOLOTL,
    MedusaArgs,
    config_problems,
    heads_directory,
    renamed_key_hints,
    unknown_key_problems,
)
from axolotl_medusa.training.schedule import parse_schedule

REQUIRED = object()
DEFAULTS = {
    "medusa_num_heads": REQUIRED,
    "medusa_num_layers": 1,
    "medusa_only_heads": False,
    "medusa_heads_coefficient": 0.2,
    "medusa_decay_coefficient": 0.8,
    "medusa_scheduler": "constant",
    "medusa_lr_multiplier": 1.0,
    "medusa_num_unfreeze_layers": 0,
    "medusa_checkpoint_layers": 0,
    "medusa_self_distillation": False,
    "medusa_lm_coefficient": 1.0,
    "medusa_kl_coefficient": 0.0,
    "medusa_distillation_regularization": 0.0,
    "medusa_logging": True,
    "medusa_logging_topk": 5,
    "medusa_lm_head": "separate",
    "medusa_init_from": None,
    "medusa_head_loss": "ce",
    "medusa_hidden_cache": None,
    "medusa_hidden_cache_limit_gb": 100.0,
}


def problems(**keys) -> list[str]:
    return config_problems({**AXOLOTL_YAML, "medusa_num_heads": 3, **keys})


def test_medusa_args_have_exactly_the_designed_keys_and_defaults():
    assert list(MedusaArgs.model_fields) == list(DEFAULTS)
    args = MedusaArgs(medusa_num_heads=2)
    assert {key: getattr(args, key) for key in DEFAULTS} == {**DEFAULTS, "medusa_num_heads": 2}
    assert [key for key, field in MedusaArgs.model_fields.items() if field.is_required()] == ["medusa_num_heads"]
    assert all(field.description for field in MedusaArgs.model_fields.values())


@pytest.mark.parametrize(
    ("given", "lm", "kl"),
    [
        ({}, 1.0, 0.0),
        ({"medusa_self_distillation": True}, 0.0, 1.0),
        ({"medusa_self_distillation": True, "medusa_lm_coefficient": 0.5}, 0.5, 1.0),
        ({"medusa_self_distillation": True, "medusa_kl_coefficient": 0.7}, 0.0, 0.7),
        ({"medusa_lm_coefficient": 0.3}, 0.3, 0.0),
        ({"medusa_lm_coefficient": None, "medusa_kl_coefficient": None}, 1.0, 0.0),
    ],
)
def test_medusa_args_coefficients_default_to_what_distillation_needs(given, lm, kl):
    args = MedusaArgs(medusa_num_heads=1, **given)
    assert (args.medusa_lm_coefficient, args.medusa_kl_coefficient) == (lm, kl)


BOUNDS = [
    ("medusa_num_heads", [1, 16], [0, -1, 17, 2.5, "many"]),
    ("medusa_num_layers", [1, 8], [0, 9]),
    ("medusa_only_heads", [True, False], ["sometimes"]),
    ("medusa_heads_coefficient", [1e-6, 3.0], [0, -0.1]),
    ("medusa_decay_coefficient", [0.01, 1.0], [0, 1.01]),
    ("medusa_lr_multiplier", [0.1, 10], [0, -1]),
    ("medusa_num_unfreeze_layers", [0, 3], [-1, 0.5]),
    ("medusa_checkpoint_layers", [0, 12], [-1, 0.5]),
    ("medusa_lm_coefficient", [0.0, 2.0], [-0.1]),
    ("medusa_kl_coefficient", [0.0, 2.0], [-0.1]),
    ("medusa_distillation_regularization", [0.0, 0.99], [-0.1, 1.0]),
    ("medusa_logging_topk", [1, 100], [0, 101]),
    ("medusa_lm_head", ["separate", "shared"], ["tied"]),
    ("medusa_head_loss", ["ce", "kl"], ["mse"]),
    ("medusa_init_from", ["some/path"], [3]),
    ("medusa_hidden_cache", ["some/path"], [3]),
    ("medusa_hidden_cache_limit_gb", [0.5, 1e5], [0, -1]),
    ("medusa_scheduler", ["constant"], [7]),
]


@pytest.mark.parametrize(("key", "good", "bad"), BOUNDS, ids=[key for key, _, _ in BOUNDS])
def test_medusa_args_bounds_are_kept_and_the_error_names_key_and_value(key, good, bad):
    for value in good:
        assert getattr(MedusaArgs(**{"medusa_num_heads": 3, key: value}), key) == value
    for value in bad:
        with pytest.raises(ValidationError, match=key):
            MedusaArgs(**{"medusa_num_heads": 3, key: value})
        lines = problems(**{key: value})
        assert any(line.startswith(f"{key} is {value!r}: ") for line in lines), lines


@pytest.mark.parametrize(("key", "value"), [("medusa_num_heads", True), ("medusa_lr_multiplier", math.inf)])
def test_config_problems_value_of_the_wrong_kind_is_an_error(key, value):
    assert any(key in line for line in problems(**{key: value}))


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


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("medusa_heads", "medusa_num_heads"),
        ("medusa_num_head", "medusa_num_heads"),
        ("medusa_sheduler", "medusa_scheduler"),
        ("medusa_only_head", "medusa_only_heads"),
        ("medusa_lr", "medusa_lr_multiplier"),
        ("medusa_decay", "medusa_decay_coefficient"),
        ("medusa_lr_multiplyer", "medusa_lr_multiplier"),
        ("medusa_decay_coef", "medusa_decay_coefficient"),
    ],
)
def test_unknown_key_is_an_error_that_names_the_nearest(key, nearest):
    assert unknown_key_problems({key: 1}) == [f"{key} is not a key of axolotl-medusa: did you mean {nearest}?"]
    assert problems(**{key: 1}) == unknown_key_problems({key: 1})
    with pytest.raises(ValidationError, match=f"{key} is not a key .* did you mean {nearest}"):
        MedusaArgs(**{"medusa_num_heads": 1, key: 1})


def test_unknown_key_near_to_nothing_lists_the_known_ones():
    (line,) = unknown_key_problems({"medusaXYZQW": 1, "lora_r": 3})
    assert all(key in line for key in DEFAULTS)


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


def test_config_problems_one_bad_value_causes_no_line_about_values_that_nobody_wrote(tmp_path):
    write_stage_1(tmp_path)
    init_from = problems(medusa_num_heads=0, medusa_init_from=str(tmp_path))
    assert [line for line in init_from if "medusa_num_heads is 1" in line] == []
    distillation = problems(medusa_logging_topk=0, medusa_self_distillation=True, adapter="lora")
    assert len(distillation) == 1 and distillation[0].startswith("medusa_logging_topk is 0"), distillation


def test_config_problems_number_in_quotes_beside_an_error_is_still_a_number():
    (line,) = problems(medusa_num_heads="3", medusa_lm_head="tied")
    assert line.startswith("medusa_lm_head is 'tied'")


@pytest.mark.parametrize("keys", [{"sequence_len": "long"}, {"datasets": "data.jsonl"}])
def test_config_problems_malformed_key_of_axolotl_is_left_to_axolotl(keys):
    cfg = {**AXOLOTL_YAML, "medusa_num_heads": 3, **keys}
    assert [line for line in config_problems(cfg) if "medusa_num_heads" in line] == []
    assert renamed_key_hints(cfg) == []


def test_config_problems_missing_base_model_is_not_taken_for_the_working_directory():
    cfg = {key: value for key, value in AXOLOTL_YAML.items() if key != "base_model"} | {"medusa_num_heads": 3}
    assert [line for line in config_problems(cfg) if "config.json" in line] == []


def test_config_problems_base_model_directory_is_looked_into(tmp_path):
    assert problems(base_model="./absent") == [
        "base_model ./absent does not exist: expected a model directory or a hub name"
    ]
    (no_config,) = problems(base_model=str(tmp_path))
    assert str(tmp_path) in no_config and "has no config.json" in no_config
    (tmp_path / "config.json").write_text("{}")
    (no_weights,) = problems(base_model=str(tmp_path))
    assert str(tmp_path) in no_weights and "has no weights" in no_weights
    for name in ("model.safetensors", "pytorch_model.bin", "model.gguf"):
        (tmp_path / name).touch()
        assert problems(base_model=str(tmp_path)) == []
        (tmp_path / name).unlink()


def write_stage_1(directory, **changes):
    config = {"medusa_num_heads": 3, "medusa_num_layers": 1, "original_lm_head": False, **changes}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "medusa_lm_head.safetensors").touch()
    return directory


def test_config_problems_init_from_fits_as_a_directory_and_as_an_output_dir(tmp_path):
    heads = write_stage_1(tmp_path / "medusa_heads")
    assert problems(medusa_init_from=str(heads)) == problems(medusa_init_from=str(tmp_path)) == []
    assert heads_directory(str(tmp_path)) == heads_directory(str(heads)) == heads


@pytest.mark.parametrize("removed", ["config.json", "medusa_lm_head.safetensors", None])
def test_config_problems_init_from_without_heads_is_an_error(removed, tmp_path):
    path = tmp_path / "absent"
    if removed:
        path = write_stage_1(tmp_path / "medusa_heads")
        (path / removed).unlink()
    (line,) = problems(medusa_init_from=str(path))
    assert line.startswith(
        f"medusa_init_from {path} holds no heads: expected config.json and medusa_lm_head.safetensors"
    )


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"medusa_num_heads": 4}, "medusa_num_heads is 3 but the heads in medusa_init_from {} have 4"),
        ({"medusa_num_layers": 2}, "medusa_num_layers is 1 but the heads in medusa_init_from {} have 2"),
        ({"original_lm_head": True}, "medusa_lm_head is 'separate' but the heads in medusa_init_from {} have 'shared'"),
    ],
)
def test_config_problems_init_from_other_heads_is_an_error(saved, message, tmp_path):
    (line,) = problems(medusa_init_from=str(write_stage_1(tmp_path, **saved)))
    assert line.startswith(message.format(tmp_path))


@pytest.mark.parametrize("key", RENAMED_BY_AXOLOTL)
def test_renamed_key_is_a_hint_and_no_error(key):
    (hint,) = renamed_key_hints({**AXOLOTL_YAML, key: "anything"})
    assert hint == f"{key}: {RENAMED_BY_AXOLOTL[key]}"
    assert problems(**{key: "anything"}) == []


def test_renamed_sharegpt_dataset_is_a_hint_that_names_its_file():
    hints = renamed_key_hints(
        {"datasets": [{"path": "a.json", "type": "sharegpt"}, {"path": "b.json", "type": "chat_template"}]}
    )
    assert len(hints) == 1 and "a.json" in hints[0] and "chat_template" in hints[0]
    assert renamed_key_hints({"datasets": None}) == renamed_key_hints({}) == []


def test_importing_args_loads_neither_axolotl_nor_torch_nor_our_other_modules():
    code = "import sys, axolotl_medusa.training.args; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {name.partition(".")[0] for name in modules} & {
        "axolotl",
        "torch",
        "transformers",
        "peft",
        "safetensors",
        "numpy",
    }
    assert {name for name in modules if name.startswith("axolotl_medusa")} == {
        "axolotl_medusa",
        "axolotl_medusa.model",
        "axolotl_medusa.model.file_names",
        "axolotl_medusa.training",
        "axolotl_medusa.training.args",
        "axolotl_medusa.training.schedule",
    }
