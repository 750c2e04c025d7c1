"""The figures of docs/training.md about interrupted runs are those of the file that the benchmark wrote."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
INTERRUPTIONS = json.loads((ROOT / "benchmarks/results/kill_and_resume.json").read_text(encoding="utf-8"))[
    "interruptions"
]


def test_docs_say_how_many_runs_were_interrupted():
    assert Counter(each["signal"] for each in INTERRUPTIONS) == {"SIGKILL": 20, "SIGTERM": 5}
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    assert "at 25 random times, 20 by SIGKILL and 5 by SIGTERM" in text


def test_every_interrupted_run_ended_with_the_heads_of_one_left_alone():
    assert not [each for each in INTERRUPTIONS if each["problem"]]
    assert any(each["passed_over"] for each in INTERRUPTIONS), "none was interrupted while it saved"
