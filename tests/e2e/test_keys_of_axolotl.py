"""Keys of axolotl that replace a loss or the order of the data, and are not refused: heads train on the same losses."""

from __future__ import annotations

import pytest
from axolotl_process import log_history

pytestmark = pytest.mark.e2e

OURS = "axolotl_medusa.MedusaPlugin"
LIGER = "axolotl.integrations.liger.LigerPlugin"
HARMLESS = {
    "loss-of-the-class": {
        "plugins": ["labels_stay.LabelsStayPlugin", OURS],
        "chunked_cross_entropy": True,
        "group_by_length": True,
        "remove_unused_columns": False,
        "loss_watchdog_threshold": 1000.0,
    },
    "packed": {
        "plugins": [OURS, LIGER],
        "liger_fused_linear_cross_entropy": True,
        "sample_packing": True,
        "curriculum_sampling": True,
        "sample_packing_sequentially": True,
        "sample_packing_bin_size": 4,
        "shuffle_merged_datasets": False,
        "gradient_accumulation_steps": 50,
    },
}


def epoch_means(make_yaml, axolotl, out, **changes) -> dict[str, float]:
    """Means over all targets of an epoch in which nothing is learned: the order and the batches of the data do not matter."""
    options = {
        "medusa_only_heads": False,
        "sample_packing": False,
        "sequence_len": 96,
        "learning_rate": 0.0,
        "max_steps": None,
        "save_strategy": "epoch",
        "save_steps": None,
        "logging_steps": 1,
        "gradient_accumulation_steps": 50,
    }
    axolotl("train", make_yaml(**{**options, **changes}, output_dir=str(out)))
    (entry,) = (entry for entry in log_history(out) if "loss" in entry)
    return {key: value for key, value in entry.items() if key.endswith("loss") or "top" in key}


def test_keys_that_replace_losses_and_samplers_leave_the_heads_losses_as_they_are(make_yaml, axolotl, tmp_path):
    expected = epoch_means(make_yaml, axolotl, tmp_path / "plain")
    assert {"loss", "base_loss", "medusa0_loss", "medusa2_loss", "medusa2_top1"} <= expected.keys()
    for name, changes in HARMLESS.items():
        found = epoch_means(make_yaml, axolotl, tmp_path / name, **changes)
        assert found == pytest.approx(expected, rel=1e-5), name
