"""Our keys merged into axolotl's own config, by axolotl's own code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from conftest import AXOLOTL_YAML, LORA, PLUGIN

from axolotl_medusa.training.args import MedusaArgs
from axolotl_medusa.training.yaml_problems import config_problems

RECIPES = {
    "medusa-1": {"medusa_num_heads": 5, "medusa_only_heads": True},
    "medusa-1-kl-shared": {
        "medusa_num_heads": 3,
        "medusa_only_heads": True,
        "medusa_head_loss": "kl",
        "medusa_lm_head": "shared",
    },
    "medusa-1-lk-chain": {
        "medusa_num_heads": 3,
        "medusa_only_heads": True,
        "medusa_head_loss": "lk",
        "medusa_head_weighting": "chain",
        "medusa_chain_smoothing": 0.2,
        "medusa_lm_head": "trained",
        "medusa_draft_vocab": 8192,
    },
    "medusa-1-hidden-cache": {
        "medusa_num_heads": 3,
        "medusa_only_heads": True,
        "medusa_hidden_cache": "cache",
        "medusa_hidden_cache_limit_gb": 500,
    },
    "medusa-2-full": {"medusa_num_heads": 3, "medusa_scheduler": "sine_0.5", "medusa_distillation_regularization": 0.3},
    "medusa-2-last-layers": {"medusa_num_heads": 1, "medusa_num_unfreeze_layers": 2, "medusa_lr_multiplier": 4},
    "medusa-2-lora": {"medusa_num_heads": 16, **LORA},
    "medusa-2-distillation": {
        "medusa_num_heads": 3,
        "medusa_self_distillation": True,
        "medusa_lm_coefficient": 0.1,
        "medusa_distillation_regularization": 0.5,
        **LORA,
    },
    "fsdp-2": {"medusa_num_heads": 3, "fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}},
}


@pytest.fixture
def validate(monkeypatch):
    """Axolotl's own validation, with this plugin registered as axolotl registers it."""
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    manager = PluginManager.get_instance()
    monkeypatch.setattr(manager, "plugins", type(manager.plugins)())

    def run(**keys):
        cfg = DictDefault({**AXOLOTL_YAML, **keys})
        for plugin in cfg.plugins or ():
            manager.register(plugin)
        return validate_config(cfg)

    return run


@pytest.mark.parametrize("recipe", RECIPES)
def test_valid_yaml_has_no_problems_before_and_after_axolotls_validation(recipe, validate):
    assert config_problems({**AXOLOTL_YAML, **RECIPES[recipe]}) == []
    cfg = validate(**RECIPES[recipe])
    assert config_problems(cfg) == []
    assert {key: cfg[key] for key in RECIPES[recipe] if key.startswith("medusa")} == {
        key: value for key, value in RECIPES[recipe].items() if key.startswith("medusa")
    }


def test_ligers_kernels_can_be_switched_on_beside_ours_as_the_docs_say(validate):
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"(?m)^    plugins:\n(?:    .+\n)*?    liger_glu_activation: true\n", text)
    keys = yaml.safe_load(block)
    assert keys["plugins"] == [PLUGIN, "axolotl.integrations.liger.LigerPlugin"]
    cfg = validate(medusa_num_heads=3, **keys)
    assert {key: cfg[key] for key in keys} == keys and config_problems(cfg) == []
    assert not cfg.liger_fused_linear_cross_entropy and cfg.medusa_num_heads == 3
    with pytest.raises(ValueError, match="liger_rms_norm"):
        validate(medusa_num_heads=3, **{**keys, "liger_rms_norm": "sometimes"})


def test_merged_config_has_our_defaults_and_keeps_axolotls_behaviour(validate):
    plain = validate(plugins=None, a_key_that_nobody_knows=1)
    ours = validate(medusa_num_heads=3, a_key_that_nobody_knows=1)
    assert {key: ours[key] for key in ours if key not in plain} == {
        **MedusaArgs(medusa_num_heads=3).model_dump(exclude_none=True),
        "plugins": [PLUGIN],
    }
    assert {key: ours[key] for key in plain} == plain


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "medusa_num_heads\n  Field required"),
        ({"medusa_num_heads": 17}, "less than or equal to 16"),
        ({"medusa_num_heads": 3, "medusa_num_layer": 1}, "did you mean medusa_num_layers?"),
        ({"medusa_num_heads": 3, "sequence_len": "long"}, "sequence_len\n  Input should be a valid integer"),
        ({"medusa_num_heads": 3, "load_in_8bit": True, "adapter": "qlora"}, "Can't load qlora in 8bit"),
    ],
)
def test_merged_config_refuses_what_we_and_what_axolotl_refuse(keys, message, validate):
    with pytest.raises(ValueError) as error:
        validate(**keys)
    assert message in str(error.value)


def test_merged_config_blank_key_takes_its_default(validate):
    assert config_problems({**AXOLOTL_YAML, "medusa_num_heads": 3, "medusa_num_layers": None}) == []
    assert validate(medusa_num_heads=3, medusa_num_layers=None).medusa_num_layers == 1
