"""A recipe for a CPU trains as it is written: what `axolotl-medusa recipe` leaves to axolotl works with few conversations too.

Four steps of it are run, with the evaluations and checkpoints between them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from axolotl_medusa.cli import main
from axolotl_medusa.model.heads_directory import read_heads

pytestmark = [pytest.mark.e2e, pytest.mark.long]


@pytest.mark.parametrize("method", ["medusa-1", "self-distillation"])
def test_recipe_for_a_cpu_trains(method, tmp_path, tiny_base, chats, axolotl):
    file = tmp_path / "my.yml"
    arguments = [str(tiny_base), "--method", method, "--gpus", "0", "--data", str(chats), "--out", str(file)]
    assert main(["recipe", *arguments]) == 0
    cfg = yaml.safe_load(file.read_text())
    here = {key: str(tmp_path / cfg[key]) for key in ("output_dir", "dataset_prepared_path")}
    axolotl("train", file, "--max_steps=4", *(f"--{key}={path}" for key, path in here.items()))
    heads = read_heads(Path(here["output_dir"]) / "medusa_heads")
    assert heads.config["medusa_num_heads"] == 3 and heads.form == "shared"
    assert heads.meta["recipe"] == ("medusa-1" if method == "medusa-1" else "medusa-2")
    assert any(tensor.abs().max() > 0 for name, tensor in heads.head_tensors().items() if ".linear." in name)
