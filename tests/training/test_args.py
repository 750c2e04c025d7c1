"""The YAML keys: defaults, bounds, and what is said of each."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import AXOLOTL_YAML
from pydantic import ValidationError

from axolotl_medusa.training.args import MedusaArgs, unknown_key_problems
from axolotl_medusa.training.yaml_problems import config_problems

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
    "medusa_plots": False,
    "medusa_lm_head": "separate",
    "medusa_draft_vocab": None,
    "medusa_heads_dtype": "auto",
    "medusa_init_from": None,
    "medusa_head_loss": "ce",
    "medusa_head_weighting": "decay",
    "medusa_chain_smoothing": 0.5,
    "medusa_hidden_cache": None,
    "medusa_hidden_cache_limit_gb": 100.0,
    "medusa_skip_bad_rows": False,
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
    ("medusa_lm_head", ["separate", "shared", "trained"], ["tied"]),
    ("medusa_head_loss", ["ce", "kl", "tv", "lk"], ["mse"]),
    ("medusa_head_weighting", ["decay", "chain"], ["even"]),
    ("medusa_chain_smoothing", [0.0, 1.0], [-0.1, 1.1]),
    ("medusa_draft_vocab", [128, 32000], [127, 0, 2.5]),
    ("medusa_heads_dtype", ["auto", "float32", "bfloat16"], ["float16"]),
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
        "axolotl_medusa.training",
        "axolotl_medusa.training.args",
    }


@pytest.mark.parametrize("key", DEFAULTS)
def test_description_says_the_default_and_the_bounds(key):
    field = MedusaArgs.model_fields[key]
    text = field.description
    assert text.endswith(".") and "efault" in text
    if isinstance(field.default, bool) or field.default is None or isinstance(field.default, str):
        assert DEFAULTS[key] in (REQUIRED, None) or str(DEFAULTS[key]).lower() in text.lower()
    elif DEFAULTS[key] is not REQUIRED:
        assert f"efault {field.default:g}" in text or f"efault {field.default}" in text
    bounds = {
        name: value
        for m in field.metadata
        for name in ("gt", "ge", "lt", "le")
        if (value := getattr(m, name, None)) is not None
    }
    says = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}
    for name, value in bounds.items():
        assert says[name].format(f"{value:g}") in text or "from " in text or " to " in text, (name, value)
