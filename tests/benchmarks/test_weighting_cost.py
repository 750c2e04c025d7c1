"""What was measured of `medusa_head_weighting: chain`: its bound, and the table in benchmarks/README.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CASES = json.loads((BENCHMARKS / "results" / "weighting_cost.json").read_text(encoding="utf-8"))["cases"]
BOUND = 1.35
"""Of a chain-weighted step's time over a decay-weighted one's."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['form']}-{case['head_loss']}-{case['hidden_rows']}")
def test_chain_keeps_to_its_bound_and_the_table_says_what_was_measured(case):
    assert case["chain_to_decay"] <= BOUND
    backbone, seconds = "cached" if case["hidden_rows"] else "run", case["seconds"]
    row = f"| {case['form']} | {case['head_loss']} | {backbone} | {seconds['decay']:.2f} | {seconds['chain']:.2f} | "
    row += f"{case['chain_to_decay']:.2f} × | {case['with_a_pass_to_decay']:.2f} × |"
    assert row in (BENCHMARKS / "README.md").read_text(encoding="utf-8")
