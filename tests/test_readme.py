"""The README's figures are those of the committed results, and its commands and files exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

from axolotl_medusa.args import MedusaArgs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def cells(label: str) -> list[str]:
    row = next(line for line in README.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_readme_results_are_those_of_the_committed_json():
    demo = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    distilled = json.loads((RESULTS / "self_distillation.json").read_text(encoding="utf-8"))["after"]
    columns = (demo["before"], demo["after"], distilled)
    for head in range(3):
        expected = [f"{column[f'eval_medusa{head}_top1']:.3f}" for column in columns]
        assert cells(f"top-1 of head {head}") == expected
    expected = [f"{column['eval_medusa_acceptance_length']:.3f}" for column in columns]
    assert cells("acceptance length, simulated") == expected
    assert cells("acceptance length, counted by vLLM")[1] == f"{demo['served']['acceptance_length']:.3f}"
    assert cells("KL to the original model")[2] == f"{distilled['eval_base_kl']:.4f}"
    minutes = sum(seconds for stage, seconds in demo["seconds"].items() if stage != "server") / 60
    assert f"{minutes:.1f} minutes" in README
    for name, speed in demo["tokens_per_s"].items():
        assert f"{speed:.0f}" in README, name


def test_readme_lists_every_key_of_the_yaml():
    assert set(re.findall(r"^\| `(medusa_\w+)` \|", README, re.MULTILINE)) == set(MedusaArgs.model_fields)


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_readme_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make (\w[\w-]*)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
