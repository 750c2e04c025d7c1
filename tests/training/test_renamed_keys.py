"""Hints for keys of old YAMLs: one line each, and never an error."""

from __future__ import annotations

import pytest
from conftest import AXOLOTL_YAML

from axolotl_medusa.training.renamed_keys import RENAMED_BY_AXOLOTL, renamed_key_hints
from axolotl_medusa.training.yaml_problems import config_problems


def problems(**keys) -> list[str]:
    return config_problems({**AXOLOTL_YAML, "medusa_num_heads": 3, **keys})


@pytest.mark.parametrize("key", RENAMED_BY_AXOLOTL)
def test_renamed_key_is_a_hint_and_no_error(key):
    (hint,) = renamed_key_hints({**AXOLOTL_YAML, key: "anything"})
    assert hint == f"{key}: {RENAMED_BY_AXOLOTL[key]}"
    assert problems(**{key: "anything"}) == []


def test_renamed_sharegpt_dataset_is_a_hint_that_names_its_file():
    hints = renamed_key_hints(
        {"datasets": [{"path": "a.json", "type": "sharegpt"}, {"path": "b.json", "type": "chat_template"}]}
    )
    assert len(hints) == 1 and "a.json" in hints[0] and "chat_template" in hints[0]
    assert renamed_key_hints({"datasets": None}) == renamed_key_hints({}) == []
