"""The README's figures are those of the committed results, and its commands and files exist."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from benchmarks.train_step.roofline import PEAK_BF16

from axolotl_medusa.training.args import MedusaArgs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
TRAIN_STEPS = sorted(file.stem for file in RESULTS.glob("train_step*.json"))


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


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_readme_decoding_figures_are_those_of_the_committed_json():
    one, half = results("evaluate"), results("evaluate_bf16")
    for report in (one, half):
        decoders, ratios = report["overall"]["decoders"], report["steps"]["ratios"]
        said = [f"{ratios['4']:.2f}", f"{ratios['64']:.2f}", f"{decoders['chain']['speed_up']:.2f}"]
        said += [f"{report['overall']['prompts']} ", f"{report['max_new_tokens']} tokens"]
        assert all(figure in README for figure in said), said
    assert f"{one['overall']['decoders']['tree']['acceptance_length']:.3f}" in README
    assert f"{1 - half['overall']['decoders']['chain']['agreement']:.0%} of the texts" in README


def test_a_decoding_step_costs_no_more_than_it_may():
    """At most 1.15 plain forwards of as many tokens plus the heads, in every measured type and size."""
    runs = results("decoding_step")
    assert [run["model"]["dtype"] for run in runs] == ["float32", "bfloat16"]
    for run in runs:
        assert [size["nodes"] for size in run["sizes"]] == [1, 4, 8, 16, 32, 64]
        assert all(size["step_to_allowed"] <= 1 for size in run["sizes"])
        worst = max(size["step_without_heads_to_plain"] for size in run["sizes"])
        kind = {"float32": "fp32", "bfloat16": "bf16"}[run["model"]["dtype"]]
        assert f"{worst:.2f} ({kind})" in README


def ratio_of_memory(found: dict[str, Any]) -> float:
    ours, reference = (found["memory_mib"][side] for side in ("ours", "reference"))
    return (ours["peak"] - ours["runtime"]) / (reference["peak"] - reference["runtime"])


@pytest.mark.parametrize("file", TRAIN_STEPS)
def test_training_step_table_is_that_of_the_committed_json(file):
    on_gpu = "gpu" in results(file)
    digits = 3 if on_gpu else 2
    for name, found in results(file)["steps"].items():
        if "does_not_fit" in found:
            continue
        seconds, memory = found["seconds"], found["memory_mib"]
        peaks = [f"{memory[side]['peak'] - memory[side]['runtime']:.0f}" for side in ("ours", "reference")]
        rows = [line for line in BENCHMARKS.splitlines() if f"| {peaks[0]} | {peaks[1]} |" in line]
        assert len(rows) == 1, name
        assert f"| {seconds['ours']:.{digits}f} |" in rows[0] and f"| {ratio_of_memory(found):.2f} |" in rows[0]
        if "speed" in found:
            assert f"| {seconds['reference']:.{digits}f} | {found['speed']:.2f} × |" in rows[0]
        if on_gpu:
            assert (
                f"| {found['tokens_per_s']:.0f} | {found['gflops'] * 1e9 / PEAK_BF16['NVIDIA H200']:.0%} |" in rows[0]
            )


def test_time_of_gpu_kernels_is_that_of_the_committed_json():
    kinds = ("matmul", "elementwise", "attention", "optimizer", "copy and fill", "reduction")
    for file, name in (
        ("train_step_gpu", "qwen3-8b medusa-1 separate bf16"),
        ("train_step_gpu", "qwen3-8b medusa-2 separate bf16 36 layers recomputed"),
        ("train_step_gpu_liger", "qwen3-8b medusa-1 separate bf16"),
    ):
        found = results(file)["steps"][name]
        kernels = found["kernels"]
        shown = [1000 * found["seconds"]["ours"], kernels["total_ms"], *(kernels["kinds_ms"][kind] for kind in kinds)]
        assert "".join(f"| {milliseconds:.0f} " for milliseconds in shown) in BENCHMARKS, name


def test_gpu_rates_of_the_heads_loss_are_those_of_the_committed_json():
    text = " ".join(BENCHMARKS.split())
    separate, shared = results("train_step_gpu")["heads_loss"].values()
    ms = [1000 * statistics.median(found["rounds_s"]["ours"]) for found in (separate, shared)]
    tera = [found["gflops"] / 1000 for found in (separate, shared)]
    share = [found["share"] for found in (separate, shared)]
    assert f"takes {ms[0]:.0f} ms with separate heads, {tera[0]:.0f} TFLOP/s or {share[0]:.0%} of what" in text
    assert f"and {ms[1]:.0f} with shared ones, {tera[1]:.0f} or {share[1]:.0%}." in text


def test_gpu_rates_of_the_loss_paths_are_those_of_the_committed_json():
    rates = results("loss_paths_gpu")
    for name in rates["bf16"]:
        cells = (
            f"{rates[kind][name]['gflops'] / 1000:.0f} | {rates[kind][name]['mib']:.0f}" for kind in ("bf16", "fp32")
        )
        assert f"| {' | '.join(cells)} |" in BENCHMARKS, name


def test_training_step_bounds_hold_but_for_medusa2s_memory_with_nothing_recomputed():
    """The README says so of that one; with recomputed layers it holds too."""
    bounds = [bound for file in TRAIN_STEPS for bound in results(file)["bounds"]]
    assert len(bounds) == 31
    for bound in bounds:
        name, _, what = bound["what"].partition(": ")
        keeps_all = name in ("smollm2 medusa-2 separate fp32", "smollm2 medusa-2 separate bf16")
        assert bound["holds"] is not (keeps_all and what.startswith("peak memory")), bound


def test_readme_sentence_about_training_steps_is_that_of_the_committed_json():
    steps, text = results("train_step")["steps"], " ".join(README.split())
    for form in ("separate", "shared"):
        found = steps[f"smollm2 medusa-1 {form} bf16"]
        for figure in (f"{found['seconds']['ours']:.2f}", f"{found['speed']:.2f}", f"{found['memory_ratio']:.2f}"):
            assert figure in README
        assert f"{results('train_step_avx2')['steps'][f'smollm2 medusa-1 {form} fp32']['speed']:.2f}" in README
        found = results("train_step_gpu")["steps"][f"qwen3-8b medusa-1 {form} bf16"]
        assert f"{found['seconds']['ours']:.3f} s with {form}" in text
        assert f"({found['memory_mib']['ours']['peak']:.0f} MiB)" in README
    (found,) = results("train_step_gpu_8bit")["steps"].values()
    assert f"takes {found['seconds']['ours']:.3f} s and {found['memory_mib']['ours']['peak']:.0f} MiB" in text
    assert (
        f"{found['speed']:.2f} times as fast as a plain step that recomputes nothing, in {ratio_of_memory(found):.2f}"
        in text
    )


def test_rates_of_the_loss_paths_are_those_of_the_committed_json():
    rates = results("loss_paths")
    for name in (
        "ours",
        "ours, recomputed",
        "plain",
        *(f"linear_cross_entropy, accurate, {rows} rows" for rows in (256, 1024)),
    ):
        assert f"| {rates['fp32'][name]['gflops']:.0f} | {rates['bf16'][name]['gflops']:.0f} |" in BENCHMARKS, name
    assert f"| {rates['fp32']['linear_cross_entropy']['gflops']:.0f} | not run |" in BENCHMARKS


def test_head_study_table_is_that_of_the_committed_json():
    runs = results("head_study")["runs"]
    assert len(runs) == 8
    for run in runs:
        row = f"| {run['form']} | {run['head_loss']} | {run['num_heads']} | {run['step_s']:.2f} | {run['steps']} |"
        assert f"{row} {run['acceptance_length']:.3f} |" in BENCHMARKS


def test_results_of_the_quality_check_are_those_the_results_readme_names():
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    gentle, strong = (run["quality"] for run in results("quality"))
    for value in (gentle["original_perplexity"], gentle["perplexity"], strong["perplexity"]):
        assert f"{value:.3f}" in text
    assert gentle["kl"] < 0.01 < strong["kl"]


def test_readme_lists_every_key_of_the_yaml():
    assert set(re.findall(r"^\| `(medusa_\w+)` \|", README, re.MULTILINE)) == set(MedusaArgs.model_fields)


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_readme_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make (\w[\w-]*)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
