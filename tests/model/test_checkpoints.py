"""The order of checkpoints is that of their steps, whatever was copied or touched since."""

from __future__ import annotations

import os

from axolotl_medusa.model.checkpoints import checkpoint_step, checkpoints


def test_checkpoints_are_ordered_by_step_and_others_left_out(tmp_path):
    for age, name in enumerate(["checkpoint-9", "checkpoint-100", "checkpoint-20", "checkpoint-x", "checkpoint-5-old"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").touch()
        os.utime(tmp_path / name / "state.json", (age, age))
    (tmp_path / "checkpoint-300").mkdir()
    found = [path.name for path in checkpoints(tmp_path, "state.json")]
    assert found == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    assert [checkpoint_step(name) for name in ("a/checkpoint-7", "checkpoint-", "7")] == [7, None, None]
