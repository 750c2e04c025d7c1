"""`axolotl evaluate` measures the model that a run left in output_dir: its heads, and the backbone trained with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from axolotl_process import log_history
from test_train import LORA

pytestmark = pytest.mark.e2e

EVALUATED = {
    "val_set_size": 0.2,
    "eval_sample_packing": True,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "learning_rate": 2e-2,
}
QLORA = {**LORA, "adapter": "qlora", "load_in_4bit": True}


def in_training(output_dir: Path) -> dict[str, float]:
    """The last evaluation during training."""
    return [entry for entry in log_history(output_dir) if "eval_loss" in entry][-1]


def by_command(output_dir: Path) -> dict[str, float]:
    """What `axolotl evaluate` wrote for the validation rows."""
    rows = [line.split(",") for line in (output_dir / "eval_summary.csv").read_text().splitlines()[1:]]
    return {name: float(value) for name, _, value in rows if value}


FOUR_BIT_RTOL = 5e-3
"""bitsandbytes multiplies 4-bit weights on CPUs in several ways; relative differences of 5e-4 were seen. Another model, such as
the untrained one, has several times this loss."""


def assert_same_model(output_dir: Path, rtol: float = 1e-4) -> None:
    expected, found = in_training(output_dir), by_command(output_dir)
    for name in ("loss", "base_loss", "medusa0_loss", "medusa2_loss", "medusa_acceptance_length"):
        assert found[name] == pytest.approx(expected[f"eval_{name}"], rel=rtol), name


@pytest.fixture
def stage1(make_yaml, axolotl, tmp_path) -> Path:
    out = tmp_path / "stage1"
    axolotl("train", make_yaml(output_dir=str(out), learning_rate=5e-2))
    return out


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {**LORA, "medusa_self_distillation": True},
        {**QLORA, "medusa_self_distillation": True},
        {"medusa_only_heads": False, "medusa_lm_head": "separate"},
    ],
    ids=["medusa-1", "lora", "qlora", "full"],
)
def test_evaluate_measures_the_model_of_the_last_evaluation_in_training(make_yaml, axolotl, tmp_path, recipe):
    config = make_yaml(**EVALUATED, **recipe)
    axolotl("train", config)
    result = axolotl("evaluate", config)
    assert_same_model(tmp_path / "out", FOUR_BIT_RTOL if "load_in_4bit" in recipe else 1e-4)
    assert f"Medusa heads loaded from {tmp_path / 'out'}; evaluating all that it holds: heads" in result.output


def test_evaluate_with_init_from_measures_the_heads_of_output_dir(make_yaml, axolotl, stage1, tmp_path):
    config = make_yaml(**EVALUATED, medusa_init_from=str(stage1))
    axolotl("train", config)
    axolotl("evaluate", config)
    assert_same_model(tmp_path / "out")
