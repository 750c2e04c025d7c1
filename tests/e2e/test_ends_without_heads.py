"""A run that leaves no heads ends with an error, however the model was saved."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.e2e


def test_run_that_left_no_heads_ends_with_one_line_and_an_error(make_yaml, axolotl, tmp_path):
    plugins = ["axolotl_medusa.MedusaPlugin", "saves_by_itself.SavesByItselfPlugin"]
    result = axolotl("train", make_yaml(plugins=plugins, max_steps=1, save_steps=1), ok=False)
    line = f"axolotl-medusa: training ended, and no heads were written to {tmp_path / 'out' / 'medusa_heads'}"
    assert line in result.output
    assert "Traceback" not in result.output
    assert (tmp_path / "out" / "checkpoint-1" / "medusa_heads").is_dir()
