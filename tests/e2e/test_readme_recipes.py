"""README's recipes train with nothing set but what README shows: no key of axolotl is switched off for them here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl_process import log_history
from example_files import ROOT

from axolotl_medusa.model.heads_directory import read_heads

pytestmark = pytest.mark.e2e

README = (ROOT / "README.md").read_text(encoding="utf-8")
TWO_LINES = yaml.safe_load(re.search(r"(?s)```yaml\n(.*?)```", README)[1])
"""What makes an axolotl YAML a Medusa run."""

LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
"""As docs/training.md shows it: `adapter: lora` needs a rank and targets."""


def recipes() -> dict[str, dict[str, Any]]:
    """Keys of each row of README's table, with an adapter where the row offers or needs one."""
    rows = re.findall(r"(?m)^\| (Medusa-[12][^|]*)\| ([^|]*)\|$", README)
    shown = [(name, re.findall(r"`(medusa_\w+): (\w+)`", keys)) for name, keys in rows]
    one, two, distilled = ({key: yaml.safe_load(value) for key, value in keys} for _, keys in shown)
    return {
        "medusa-1": one,
        "medusa-1 over an adapter": {**one, **LORA},
        "medusa-2": two,
        "medusa-2 with lora": {**two, **LORA},
        "self-distillation": {**two, **distilled, **LORA},
    }


def plain_yaml(base: Path, chats: Path, folder: Path) -> dict[str, Any]:
    """What axolotl itself asks for: a model, data, a place, and how long."""
    return {
        "base_model": str(base),
        "datasets": [{"path": str(chats), "type": "chat_template"}],
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "sequence_len": 256,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "num_epochs": 1,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
    }


@pytest.mark.parametrize("name", recipes())
def test_recipe_of_readme_trains_with_axolotls_defaults(name, tiny_base, chats, axolotl, tmp_path):
    keys = {**TWO_LINES, **recipes()[name]}
    assert not [key for key in keys if key.endswith("_kernel")]
    file = tmp_path / "readme.yml"
    file.write_text(yaml.safe_dump({**plain_yaml(tiny_base, chats, tmp_path), **keys}), encoding="utf-8")
    axolotl("train", file)
    heads = read_heads(tmp_path / "out" / "medusa_heads").head_tensors()
    moved = {key for key, tensor in heads.items() if ".linear." in key and tensor.abs().max() > 0}
    assert len(moved) == 2 * keys["medusa_num_heads"], "every head's weight and bias left zero"
    assert "medusa4_loss" in [entry for entry in log_history(tmp_path / "out") if "loss" in entry][-1]
    trains_adapter = "adapter" in keys and not keys["medusa_only_heads"]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file() is trains_adapter


def test_lora_kernels_that_the_machine_can_run_train_on_the_same_losses(make_yaml, axolotl, tmp_path):
    """Attention's kernels are torch's own operations. axolotl binds them to the layers after it calls post_lora_load."""
    recipe = {**LORA, "medusa_only_heads": False, "medusa_self_distillation": True, "medusa_lm_coefficient": 1.0}
    losses = {}
    for on in (False, True):
        out = tmp_path / f"kernels-{on}"
        kernels = {"lora_qkv_kernel": on, "lora_o_kernel": on, "lora_mlp_kernel": False}
        result = axolotl("train", make_yaml(**recipe, **kernels, output_dir=str(out)))
        assert ("Patched attention class with LoRA optims: LlamaAttention" in result.output) is on
        logs = [entry for entry in log_history(out) if "loss" in entry]
        losses[on] = [entry[name] for entry in logs for name in ("base_ce", "base_kl", "medusa0_loss", "medusa2_loss")]
    assert losses[True] == pytest.approx(losses[False], rel=2e-5, abs=2e-6), "fp32, summed in another order"
