"""The figures of README.md, docs/results.md and benchmarks/README.md are those of the committed results."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from benchmarks.auto_tree import AGAIN, ALLOWED
from benchmarks.train_step.roofline import PEAK_BF16

from axolotl_medusa.decoding.tree_chooser import AUTO

ROOT = Path(__file__).parents[1]
README, RESULTS_PAGE, BENCHMARKS = (
    (ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/results.md", "benchmarks/README.md")
)
RESULTS = ROOT / "benchmarks" / "results"
TRAIN_STEPS = sorted(file.stem for file in RESULTS.glob("train_step*.json"))


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def cells(label: str, page: str = RESULTS_PAGE) -> list[str]:
    """The cells behind `label` in the one table row of a page that begins with it."""
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_demo_figures_are_those_of_the_committed_json():
    demo, distilled = results("demo"), results("self_distillation")["after"]
    columns = (demo["before"], demo["after"], distilled)
    for head in range(3):
        expected = [f"{column[f'eval_medusa{head}_top1']:.3f}" for column in columns]
        assert cells(f"top-1 of head {head}") == expected
    expected = [f"{column['eval_medusa_acceptance_length']:.3f}" for column in columns]
    assert cells("acceptance length, simulated") == expected
    counted = demo["served"]["acceptance_length"]
    assert cells("acceptance length, counted by vLLM")[1] == f"{counted:.3f}"
    assert cells("KL to the original model")[2] == f"{distilled['eval_base_kl']:.4f}"
    assert f"Medusa-1, {demo['steps']} steps" in RESULTS_PAGE
    assert f"{demo['train_conversations']}\nconversations ({demo['train_tokens']:,} tokens)" in RESULTS_PAGE
    minutes = sum(seconds for stage, seconds in demo["seconds"].items() if stage != "server") / 60
    assert f"{minutes:.1f} minutes" in RESULTS_PAGE
    shares = [f"{share:.3f}" for share in demo["served"]["acceptance_per_position"]]
    assert "head 0 in {}\nof the drafts, heads 0 and 1 in {}, and all three in {}.".format(*shares) in RESULTS_PAGE
    speeds = [f"{demo['tokens_per_s'][name]:.0f}" for name in ("plain", "with_heads")]
    assert cells("tokens/s") == speeds
    assert cells("tokens/s of vLLM 0.32, 64 requests at once, two CPU cores", README) == speeds
    assert cells("tokens per pass, counted by vLLM") == ["1", f"{counted:.3f}"]
    assert cells("tokens per pass, counted by vLLM 0.32", README) == ["1", f"{counted:.2f}"]


def test_decoding_figures_are_those_of_the_committed_json():
    reports = [results("evaluate"), results("evaluate_bf16")]
    assert [report["model"]["dtype"] for report in reports] == ["float32", "bfloat16"]
    assert cells("held-out prompts, new tokens each") == [
        f"{report['overall']['prompts']} prompts, {report['max_new_tokens']} tokens" for report in reports
    ]
    assert [cell.split(",")[0] for cell in cells("threads")] == [
        str(report["hardware"]["torch_threads"]) for report in reports
    ]
    decoders = [report["overall"]["decoders"] for report in reports]
    for decoder, name in (("chain", "chain of 3"), ("tree", "64-node tree")):
        assert cells(f"tokens a pass, {name}") == [f"{each[decoder]['acceptance_length']:.3f}" for each in decoders]
        speeds = [f"{each[decoder]['speed_up']:.2f}" for each in decoders]
        assert cells(f"speed of the {name}, plain decoding is 1") == speeds
    for nodes in ("4", "64"):
        ratios = [f"{report['steps']['ratios'][nodes]:.2f}" for report in reports]
        assert cells(f"a step of {nodes} nodes, in plain steps") == ratios
    differ = [f"{1 - each['chain']['agreement']:.0%}" for each in decoders]
    assert cells("texts of the chain that differ from plain greedy text") == differ
    assert decoders[0]["tree"]["agreement"] == 1.0, "the page says that in fp32 no text differs"
    speed = decoders[0]["chain"]["speed_up"]
    assert cells("speed of our decoder where each of three heads proposes a token, two CPU cores, fp32", README) == [
        "1",
        f"{speed:.2f}",
    ]


def test_no_measured_heads_make_text_faster_as_the_pages_say():
    demo = results("demo")["tokens_per_s"]
    assert demo["with_heads"] < demo["plain"]
    for report in (results("evaluate"), results("evaluate_bf16")):
        assert all(report["overall"]["decoders"][name]["speed_up"] < 1 for name in ("chain", "tree"))
        assert report["hardware"]["device_type"] == "cpu"


def test_a_decoding_step_costs_no_more_than_it_may():
    """At most 1.15 plain forwards of as many tokens plus the heads, in every measured type and size."""
    runs = results("decoding_step")
    assert [run["model"]["dtype"] for run in runs] == ["float32", "bfloat16"]
    for run in runs:
        assert [size["nodes"] for size in run["sizes"]] == [1, 4, 8, 16, 32, 64]
        assert all(size["step_to_allowed"] <= 1 for size in run["sizes"])
    worst = [f"{max(size['step_without_heads_to_plain'] for size in run['sizes']):.2f}" for run in runs]
    assert cells("a step without its heads, in such forwards, at most") == worst


def test_chosen_trees_are_never_slower_than_allowed_and_their_figures_are_those_of_the_page():
    untrained, overfitted = results("auto_tree")
    labels = {
        "`auto`, each prompt anew": AUTO,
        "`auto`, one prompt after the other": AGAIN,
        "`none`": "none",
        "`chain`": "chain",
        "`default`, 64 nodes": "default",
    }
    for label, tree in labels.items():
        assert cells(label) == [f"{run['trees'][tree]['to_plain']:.3f}" for run in (untrained, overfitted)], label
    for run in (untrained, overfitted):
        assert run["model"]["dtype"] == "float32" and "8 prompts × 128 tokens" in RESULTS_PAGE
        assert (run["prompts"], run["max_new_tokens"]) == (8, 128)
        assert all(row["same_texts"] == run["prompts"] for row in run["trees"].values())
        assert all(run["trees"][tree]["to_plain"] >= ALLOWED for tree in (AUTO, AGAIN))


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
    """benchmarks/README.md says so of that one; with recomputed layers it holds too."""
    bounds = [bound for file in TRAIN_STEPS for bound in results(file)["bounds"]]
    assert len(bounds) == 31
    for bound in bounds:
        name, _, what = bound["what"].partition(": ")
        keeps_all = name in ("smollm2 medusa-2 separate fp32", "smollm2 medusa-2 separate bf16")
        assert bound["holds"] is not (keeps_all and what.startswith("peak memory")), bound


def test_training_step_figures_are_those_of_the_committed_json():
    for file, dtype, machine in (("train_step", "bf16", "AMX"), ("train_step_avx2", "fp32", "no AMX")):
        for form in ("separate", "shared"):
            found = results(file)["steps"][f"smollm2 medusa-1 {form} {dtype}"]
            seconds, speed = found["seconds"], f"{found['speed']:.2f}"
            row = [f"{seconds['ours']:.2f}", speed, f"{found['memory_ratio']:.2f}"]
            assert cells(f"{form} heads, {dtype}, {machine}") == row
            if dtype == "bf16":
                row = [f"{seconds['reference']:.2f} s", f"{seconds['ours']:.2f} s", speed]
                assert cells(f"SmolLM2-135M, {form} heads, two CPU cores", README) == row
    for form in ("separate", "shared"):
        found = results("train_step_gpu")["steps"][f"qwen3-8b medusa-1 {form} bf16"]
        assert cells(f"Medusa-1, {form} heads") == on_a_gpu(found)
        row = [f"{found['seconds'][side]:.3f} s" for side in ("reference", "ours")]
        assert cells(f"Qwen3-8B, {form} heads, one H200", README) == [*row, f"{found['speed']:.2f}"]
    (found,) = results("train_step_gpu_8bit")["steps"].values()
    assert cells("Medusa-2, shared heads, as in `qwen3.yml`") == on_a_gpu(found)


def on_a_gpu(found: dict[str, Any]) -> list[str]:
    """Seconds, MiB, speed and memory as docs/results.md has them."""
    seconds, peak = found["seconds"]["ours"], found["memory_mib"]["ours"]["peak"]
    return [f"{seconds:.3f}", f"{peak:.0f}", f"{found['speed']:.2f}", f"{ratio_of_memory(found):.2f}"]


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
