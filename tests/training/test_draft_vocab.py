"""Which tokens heads of a draft vocabulary choose among."""

from __future__ import annotations

import pytest
import torch
from conftest import AXOLOTL_YAML
from datasets import Dataset

from axolotl_medusa.training import draft_vocab
from axolotl_medusa.training.draft_vocab import coverage, label_counts, most_frequent
from axolotl_medusa.training.yaml_problems import config_problems

ROWS = [[-100, -100, 5, 7, 7], [-100, 7], [3, 5, 9, -100]]


@pytest.mark.parametrize("rows_at_once", [1, 2, 1000])
def test_label_counts_count_what_is_learnt(rows_at_once, monkeypatch):
    monkeypatch.setattr(draft_vocab, "_ROWS", rows_at_once)
    counts = label_counts(Dataset.from_dict({"labels": ROWS, "input_ids": ROWS}), 12)
    assert {token: int(count) for token, count in enumerate(counts) if count} == {3: 1, 5: 2, 7: 3, 9: 1}


def test_label_counts_of_streamed_data_are_refused():
    with pytest.raises(ValueError, match=r"medusa_draft_vocab counts the tokens of all samples.* do not stream it"):
        label_counts(iter(ROWS), 12)


def test_most_frequent_are_ascending_and_lower_numbers_win_ties():
    counts = torch.tensor([0, 4, 1, 9, 1, 0])
    chosen = most_frequent(counts, 3)
    assert chosen.tokens.tolist() == [1, 2, 3]
    assert (chosen.covered, chosen.total) == (14, 15)
    assert most_frequent(counts, 5).tokens.tolist() == [0, 1, 2, 3, 4], "filled up with tokens that never come"
    assert coverage(torch.tensor([3, 5]), counts)[1:] == (9, 15)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"streaming": True}, "which streaming does not tell; remove one"),
        (
            {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}},
            "ZeRO-3 and FSDP have divided it by then",
        ),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "ZeRO-3 and FSDP have divided it by then"),
    ],
)
def test_config_problems_what_a_draft_vocabulary_cannot_be_trained_with(keys, line):
    cfg = {**AXOLOTL_YAML, "medusa_num_heads": 3, "medusa_draft_vocab": 1000}
    assert config_problems(cfg) == []
    assert config_problems({**cfg, "deepspeed": {"zero_optimization": {"stage": 2}}}) == []
    assert any(line in problem for problem in config_problems({**cfg, **keys}))
