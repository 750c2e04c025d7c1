"""FSDP's keys in a YAML: which are refused, and that the end is written whole."""

from __future__ import annotations

import pytest
from axolotl.utils.dict import DictDefault

from axolotl_medusa.training.divided_models import fsdp_problems, loads_no_weights, save_whole_at_the_end


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"fsdp_version": 2, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
        {"fsdp_version": 2, "fsdp_config": {"final_state_dict_type": "FULL_STATE_DICT"}},
        {"fsdp_config": {"version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}},
    ],
)
def test_keys_that_heads_train_with_are_no_problem(keys):
    assert fsdp_problems(keys) == []


@pytest.mark.parametrize("key", ["final_state_dict_type", "fsdp_final_state_dict_type"])
def test_shards_at_the_end_are_refused(key):
    (line,) = fsdp_problems({"fsdp_version": 2, "fsdp_config": {key: "SHARDED_STATE_DICT"}})
    assert "final_state_dict_type is SHARDED_STATE_DICT" in line and "FULL_STATE_DICT is used" in line


@pytest.mark.parametrize("config", [{"state_dict_type": "SHARDED_STATE_DICT"}, {"reshard_after_forward": True}])
def test_the_end_is_saved_whole(config):
    cfg = DictDefault({"fsdp_version": 2, "fsdp_config": config})
    assert save_whole_at_the_end(cfg)
    assert dict(cfg.fsdp_config) == {**config, "final_state_dict_type": "FULL_STATE_DICT"}
    assert not save_whole_at_the_end(cfg)


def test_without_fsdp_nothing_is_set():
    cfg = DictDefault({"deepspeed": "zero3.json"})
    assert not save_whole_at_the_end(cfg)
    assert dict(cfg) == {"deepspeed": "zero3.json"}


@pytest.mark.parametrize(
    ("rank", "efficient", "is_empty"), [("0", True, False), ("1", True, True), ("1", False, False)]
)
def test_only_ranks_that_wait_for_the_weights_load_none(rank, efficient, is_empty, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert loads_no_weights(DictDefault({"fsdp_config": {"cpu_ram_efficient_loading": efficient}})) is is_empty
    assert not loads_no_weights(DictDefault({"deepspeed": "zero3.json"}))
