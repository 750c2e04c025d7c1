"""The table of docs/serving.md is what the benchmark wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOADS = json.loads((ROOT / "benchmarks/results/drafter_serving.json").read_text(encoding="utf-8"))["loads"]
COLUMNS = ("plain sync", "door", "adaptive", "fixed")


@pytest.mark.parametrize("load", LOADS)
def test_docs_have_the_speeds_of_every_load(load):
    row = " | ".join([load, *(f"{LOADS[load][name]['to_plain']:.2f}" for name in COLUMNS)])
    assert f"| {row} |" in (ROOT / "docs/serving.md").read_text(encoding="utf-8")
