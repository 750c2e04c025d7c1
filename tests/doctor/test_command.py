"""What `axolotl-medusa doctor` prints, and the status that it ends with."""

from __future__ import annotations

import json

import pytest
from conftest import make_model
from training_outputs import save_base, write_run

from axolotl_medusa.cli import main
from axolotl_medusa.doctor.command import text_of

pytestmark = pytest.mark.usefixtures("no_network")

REPORT = {
    "axolotl-medusa": "0.1.0",
    "versions": [
        {"name": "torch", "version": "2.13.0+cpu", "tested": ["2.13.0"], "is_tested": True},
        {"name": "peft", "version": "9.0", "tested": ["0.20", "0.21"], "is_tested": False},
        {"name": "vllm", "version": None, "tested": ["0.32"], "is_tested": False},
    ],
    "devices": [
        {"kind": "cpu", "name": "a CPU", "cores": 2, "memory_gib": None, "fast_bf16": False},
        {"kind": "gpu", "name": "a GPU", "memory_gib": 79.1, "compute_capability": "9.0", "fast_bf16": True},
    ],
    "features": [
        {"extra": "train", "purpose": "train heads", "missing": []},
        {"extra": "plots", "purpose": "draw pictures", "missing": ["matplotlib"]},
    ],
    "heads": [{"kind": "problem", "text": "another model"}],
}


def test_report_in_words():
    assert text_of(REPORT).splitlines() == [
        "axolotl-medusa 0.1.0",
        "",
        "versions",
        "  torch         2.13.0+cpu, tested",
        "  peft          9.0, not tested (tested: 0.20 and 0.21)",
        "  vllm          not installed (tested: 0.32)",
        "",
        "devices",
        "  a CPU, 2 cores, slow in bf16: use fp32",
        "  a GPU, compute capability 9.0, 79.1 GiB, fast in bf16",
        "",
        "features",
        "  train         train heads: all here",
        '  plots         draw pictures: missing matplotlib; pip install "axolotl-medusa[plots]"',
        "",
        "heads",
        "  problem       another model",
    ]


def test_this_machine_is_described(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["devices"][0]["cores"] >= 1 and report["devices"][0]["memory_gib"] > 0
    assert {each["name"] for each in report["versions"]} >= {"python", "torch", "axolotl"}
    assert report["heads"] == []


def test_heads_that_do_not_fit_end_with_status_1(tmp_path, capsys):
    base = save_base(tmp_path / "base", make_model())
    run = write_run(tmp_path / "run", make_model(), "medusa-1", base)
    assert main(["doctor", str(run)]) == 0
    assert "  ok            tokens and chat template" in capsys.readouterr().out
    other = save_base(tmp_path / "other", make_model(seed=3))
    assert main(["doctor", str(run), "--base-model", str(other)]) == 1
    captured = capsys.readouterr()
    assert "  problem       the output embedding of" in captured.out
    assert captured.err.endswith(f"doctor: error: 1 problem with {run}, see above\n")


def test_model_without_heads_is_refused(capsys):
    assert main(["doctor", "--base-model", "org/model"]) == 1
    assert "name the heads that shall fit it" in capsys.readouterr().err
