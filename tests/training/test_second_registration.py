"""Ray's workers register the plugin and validate again, what the driver has validated and handed over as a dictionary."""

from __future__ import annotations

import pickle

import pytest
from axolotl.utils.dict import DictDefault
from conftest import AXOLOTL_YAML, H100, LORA, TORCH

RAY = {"use_ray": True, "ray_num_workers": 2, "resources_per_worker": {"GPU": 1}}
RECIPES = {
    "medusa-1": {"medusa_only_heads": True, "medusa_hidden_cache_dir": "cache"},
    "medusa-1 on 4 bits in fp32": {"medusa_only_heads": True, "load_in_4bit": True, "bf16": False},
    "medusa-1 on 4 bits": {"medusa_only_heads": True, "load_in_4bit": True},
    "medusa-1 on 4 bits, precision open": {"medusa_only_heads": True, "load_in_4bit": True, "bf16": "auto"},
    "medusa-2, lora": LORA,
    "medusa-2, self-distillation": {**LORA, "medusa_self_distillation": True},
}


def validated_by_a_process(cfg: DictDefault, capabilities, env_capabilities) -> DictDefault:
    """What one process of axolotl does; each has a plugin manager of its own."""
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import validate_config

    PluginManager._instance = None
    prepare_plugins(cfg)
    return validate_config(cfg, capabilities=capabilities, env_capabilities=env_capabilities)


@pytest.fixture
def own_manager(monkeypatch):
    from axolotl.integrations.base import PluginManager

    monkeypatch.setattr(PluginManager, "_instance", PluginManager._instance)


@pytest.mark.usefixtures("own_manager")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("has_gpu", [True, False], ids=["gpu", "cpu"])
def test_worker_validates_what_the_driver_has_validated(recipe, has_gpu, monkeypatch):
    """The driver has no GPU; what depends on one is settled where the worker registers."""
    import torch

    cfg = DictDefault({**AXOLOTL_YAML, "medusa_num_heads": 3, **RAY, **recipe})
    driver = validated_by_a_process(cfg, None, None)
    handed_over = pickle.loads(pickle.dumps(driver.to_dict()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: has_gpu)
    capabilities = H100 if has_gpu else {**H100, "bf16": False}
    worker = validated_by_a_process(DictDefault(handed_over), capabilities, TORCH)
    ours = {key: value for key, value in driver.items() if key.startswith("medusa_")}
    assert {key: value for key, value in worker.items() if key.startswith("medusa_")} == ours
    assert ours["medusa_num_heads"] == 3
    if recipe.get("load_in_4bit"):
        quantization = worker.overrides_of_model_kwargs or worker.model_kwargs
        assert quantization["quantization_config"]["load_in_4bit"] is True
        kind = quantization["quantization_config"].get("bnb_4bit_compute_dtype")
        settled_by_worker = "bfloat16" if has_gpu else None
        assert kind == ("float32" if recipe.get("bf16") is False else settled_by_worker)
