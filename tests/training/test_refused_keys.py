"""Keys and plugins that would take away the loss, the trainer or the parameters: each is one line with a reason."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from conftest import AXOLOTL_YAML, PLUGIN

from axolotl_medusa import training
from axolotl_medusa.training.refused_keys import REFUSED_KEYS, REFUSED_PLUGINS, REFUSED_WITH_A_FROZEN_BACKBONE
from axolotl_medusa.training.yaml_problems import config_problems


def problems(**keys) -> list[str]:
    return config_problems({**AXOLOTL_YAML, "medusa_num_heads": 3, **keys})


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_refused_key_is_one_line_with_its_reason_and_off_is_none(key):
    assert problems(**{key: True}) == [f"{key}: True cannot be used with Medusa heads: {REFUSED_KEYS[key]}; remove it"]
    for off in (None, False, 0, ""):
        assert problems(**{key: off}) == []


@pytest.mark.parametrize("module", REFUSED_PLUGINS)
def test_refused_plugin_is_one_line_with_its_reason_wherever_it_stands(module):
    name = f"{module}.SomePlugin"
    for plugins in ([PLUGIN, name], [name, PLUGIN]):
        assert problems(plugins=plugins) == [
            f"plugin {name} cannot be used with Medusa heads: {REFUSED_PLUGINS[module]}; remove it"
        ]


def test_plugins_that_are_not_refused_are_no_problem():
    others = ["axolotl.integrations.liger.LigerPlugin", "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]
    assert problems(plugins=[PLUGIN, *others]) == problems(plugins=None) == []


@pytest.mark.parametrize("key", REFUSED_WITH_A_FROZEN_BACKBONE)
def test_refused_with_a_frozen_backbone_is_one_line_and_fine_without(key):
    (line,) = problems(**{key: 5}, medusa_only_heads=True)
    assert line == f"{key} with medusa_only_heads: true: {REFUSED_WITH_A_FROZEN_BACKBONE[key]}; remove one"
    assert problems(**{key: 5}) == []


def test_refused_key_several_are_all_reported():
    lines = problems(use_eaft=True, kd_trainer=1.0, plugins=[PLUGIN, "axolotl.integrations.kd.KDPlugin"])
    assert [line.split(" cannot be used")[0] for line in lines] == [
        "use_eaft: True",
        "kd_trainer: 1.0",
        "plugin axolotl.integrations.kd.KDPlugin",
    ]


def test_refused_optimizer_of_loras_matrices_alone():
    (line,) = problems(optimizer="polora", adapter="lora")
    assert line.startswith("optimizer: polora trains LoRA's matrices only")


def test_another_plugins_trainer_is_one_line():
    from axolotl_medusa.training.plugin import MedusaPlugin

    class OtherTrainer:
        pass

    with pytest.raises(
        SystemExit,
        match=r"another plugin brought the trainer OtherTrainer, .* list axolotl_medusa\.MedusaPlugin before",
    ):
        MedusaPlugin().add_callbacks_post_trainer({}, OtherTrainer())


def test_training_never_sets_whether_foreign_code_runs():
    """`trust_remote_code` is axolotl's key and the user's to set: no module of this room mentions it."""
    room = Path(inspect.getfile(training)).parent
    assert [path.name for path in room.glob("*.py") if "trust_remote_code" in path.read_text(encoding="utf-8")] == []
