"""The training benchmark: its reference computes our loss, its FLOPs are those that torch counts, its script runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.train_step import __main__ as train_step
from benchmarks.train_step import measure as train_step_measure
from benchmarks.train_step import roofline
from benchmarks.train_step.bounds import bounds_of_step, bounds_of_vocabulary
from benchmarks.train_step.cases import Case, heads_loss_cases, step_cases
from benchmarks.train_step.gpu_kernels import summary
from benchmarks.train_step.measured_step import measured_step
from benchmarks.train_step.models import (
    COEFFICIENT,
    counted_rows,
    lora_config,
    make_batch,
    our_model,
    reference_model,
    with_shared_weights,
)
from benchmarks.train_step.plain_trainer import PlainTrainer, column_targets
from conftest import HIDDEN, VOCAB, make_model, randomize
from peft import get_peft_model
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from axolotl_medusa.losses.targets import medusa_targets
from axolotl_medusa.model.heads import MedusaHeads

ROOT = Path(__file__).parents[2]
SEQ = 40
RTOL, ATOL = 2e-4, 2e-6  # fp32 rounding of sums over a vocabulary in another order
CASES = {
    "medusa-1 separate": Case("tiny", "medusa-1", "separate", "fp32", heads=3),
    "medusa-1 shared": Case("tiny", "medusa-1", "shared", "fp32", heads=3),
    "medusa-2 separate": Case("tiny", "medusa-2", "separate", "fp32", heads=3, lora_dropout=0.0),
    "medusa-2 shared": Case("tiny", "medusa-2", "shared", "fp32", heads=3, lora_dropout=0.0),
}


def masked_batch(seq: int = SEQ):
    batch = make_batch(Case("tiny", "medusa-1", "separate", "fp32", seq=seq), VOCAB)
    batch["labels"][0, 9:13] = batch["labels"][1, 20:23] = batch["labels"][1, 30:31] = -100
    return batch


def neutral(name: str) -> str:
    """A parameter's name without what each side puts around it."""
    name = name.replace("modules_to_save.default.heads.", "")
    return re.search(r"(layers|lm_head|heads)\..+", name)[0]


def gradients(model, loss):
    loss.backward()
    return {neutral(name): p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_plain_trainer_loss_and_gradients_equal_the_objectives(case):
    lm = make_model("llama-tied").requires_grad_(False)
    heads = randomize(MedusaHeads(HIDDEN, VOCAB, 3, form=case.form))
    sides = []
    for build in (our_model, reference_model):
        own = MedusaHeads(HIDDEN, VOCAB, 3, form=case.form)
        own.load_state_dict(heads.state_dict())
        model = build(case, with_shared_weights(lm), own).train()
        adapters = [p for name, p in model.named_parameters() if "lora_" in name]
        generator = torch.Generator().manual_seed(4)
        for parameter in adapters:  # at their start adapters do nothing
            parameter.data.normal_(std=0.2, generator=generator)
        assert bool(adapters) == (case.stage == "medusa-2")
        sides.append(model)
    batch = masked_batch()
    ours = sides[0](**batch, medusa_coefficient=COEFFICIENT).loss
    reference = sides[1](**batch)
    torch.testing.assert_close(reference, ours, rtol=RTOL, atol=ATOL)
    found, expected = gradients(sides[1], reference), gradients(sides[0], ours)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = 1e-4 * gradient.abs().max().item() + 1e-7
        torch.testing.assert_close(found[name], gradient, rtol=RTOL, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_plain_trainer_holds_stacked_logits_of_all_positions_and_the_heads_twice():
    trainer = PlainTrainer(make_model(), MedusaHeads(HIDDEN, VOCAB, 3))
    batch = masked_batch()
    logits = trainer.stacked_logits(batch["input_ids"])
    assert logits.shape == (4, 2, SEQ, VOCAB)
    trained = sum(p.numel() for p in trainer.parameters() if p.requires_grad)
    held = sum(p.numel() for name, p in trainer.named_parameters() if "plain_heads" in name)
    assert held == 2 * trained == 2 * sum(p.numel() for p in trainer.heads.parameters())
    trainer(**batch)
    assert len(trainer.metrics) == 4 * (1 + 9)
    top = [trainer.metrics[f"top{k}_2"] for k in range(1, 10)]
    assert top == sorted(top)


def test_column_targets_are_the_objectives_targets():
    labels = masked_batch()["labels"]
    expected = medusa_targets(labels, 3)
    for column in range(4):
        torch.testing.assert_close(column_targets(labels, column), expected[:, : SEQ - 1 - column, column])
    assert counted_rows(labels, 3) == (expected != -100).sum(dim=(0, 1)).tolist()


def test_make_batch_masks_about_two_fifths_in_spans():
    labels = make_batch(Case("tiny", "medusa-1", "separate", "fp32", batch=8, seq=1024), VOCAB)["labels"]
    masked = labels == -100
    assert masked.float().mean().item() == pytest.approx(0.4, abs=0.05)
    assert (masked[:, 1:] != masked[:, :-1]).float().mean() < 0.05


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("rank", [0, 32], ids=["medusa-1", "medusa-2"])
def test_roofline_step_flops_are_those_that_torch_counts(shared, rank):
    lm = make_model(attn_implementation="eager").requires_grad_(False)
    lm.set_attn_implementation("eager")
    shape = roofline.Shape.of(lm.config)
    case = Case("tiny", "medusa-1", "separate", "fp32", lora_dropout=0.0)
    model = get_peft_model(lm, lora_config(case)) if rank else lm
    heads = MedusaHeads(HIDDEN, VOCAB, 2, form="shared" if shared else "separate")
    batch = masked_batch()
    ids, targets = batch["input_ids"], medusa_targets(batch["labels"], 2).flatten(0, 1)
    rows = [targets[:, column] != -100 for column in range(3)]
    rope = 2 * SEQ * lm.config.head_dim // 2  # positions times frequencies, once a forward
    with FlopCounterMode(display=False) as counter:
        with torch.set_grad_enabled(rank > 0):
            hidden = lm.model(input_ids=ids)[0].flatten(0, 1)
        losses = []
        if rank:
            with torch.no_grad(), model.disable_adapter():
                teacher = lm.lm_head(lm.model(input_ids=ids)[0].flatten(0, 1)[rows[0]])
            losses.append(F.cross_entropy(lm.lm_head(hidden[rows[0]]), teacher.softmax(-1)))
        for head in range(2):
            layer = heads.output_layer(head) or lm.lm_head
            chosen = rows[head + 1]
            losses.append(F.cross_entropy(layer(heads.hidden(head, hidden[chosen])), targets[chosen, head + 1]))
        sum(losses).backward()
    counts = [int(row.sum()) for row in rows]
    parts = roofline.step(shape, 2, SEQ, counts, shared=shared, rank=rank)
    assert all(parts.values())
    whole_square = SEQ * SEQ - roofline.causal_pairs(SEQ)  # eager attention computes what is masked as well
    attention = 4 * 2 * whole_square * shape.queries * shape.layers
    passes = 4 if rank else 1  # student and teacher forward, and twice a forward for the backward
    forwards = 2 if rank else 1
    assert sum(parts.values()) + passes * attention + forwards * rope == counter.get_total_flops()


def test_vocabulary_matmuls_cover_every_row_in_every_chunk_size():
    shape = roofline.Shape.of(make_model().config)
    matmuls = roofline.VocabularyMatmuls(23, shape, torch.float32, frozen=False)
    for chunk in (23, 8):
        matmuls.allocate(chunk)
        matmuls.weight_gradient.zero_()
        matmuls()
        dl = matmuls.logits_gradient[torch.arange(23) % chunk]
        torch.testing.assert_close(matmuls.hidden_gradient, dl @ matmuls.weight)
        torch.testing.assert_close(matmuls.weight_gradient, dl.T @ matmuls.hidden)
    assert matmuls.flops == 3 * 2 * 23 * HIDDEN * VOCAB


def step_result(**changes):
    return {"speed": 3.6, "memory_ratio": 0.39, **changes}


@pytest.mark.parametrize(
    ("result", "holds"),
    [
        (step_result(), [True, True]),
        (step_result(speed=3.49, memory_ratio=0.41), [False, False]),
        ({"does_not_fit": ["reference"]}, [None, None]),
    ],
)
def test_bounds_of_step_judge_what_was_measured(result, holds):
    case = Case("smollm2", "medusa-1", "separate", "bf16")
    assert [bound["holds"] for bound in bounds_of_step(case, result)] == holds
    assert bounds_of_step(replace(case, model="qwen3-8b"), result) == []


def test_bounds_of_vocabulary_allow_the_larger_matrices_and_one_chunk():
    case = Case("wide", "medusa-1", "separate", "fp32", heads=2)
    matrix = 1024 * 576 * 4 / 2**20
    for growth, holds in ((10 * matrix + 127, True), (10 * matrix + 129, False)):
        peaks = [{"peak": 1000.0}, {"peak": 1000.0 + growth}]
        found = bounds_of_vocabulary(case, {"vocab": [1024, 2048], "memory_mib": peaks})
        assert [bound["holds"] for bound in found] == [holds]
    shared = bounds_of_vocabulary(replace(case, form="shared"), {"vocab": [1024, 2048], "memory_mib": peaks})
    assert shared[0]["bound"] == pytest.approx(2 * matrix + 128, abs=0.1)


def test_train_step_script_on_a_tiny_model_writes_its_figures(tmp_path):
    make_model("llama-tied").save_pretrained(tmp_path / "model")
    out = tmp_path / "result.json"
    step = "smollm2 medusa-2 separate bf16"
    steps, heads_loss = [step, f"{step} 18 layers recomputed"], "heads-loss smollm2 separate bf16"
    command = [sys.executable, "-m", "benchmarks.train_step", "--model", tmp_path / "model", "--json", out]
    sizes = ["--batch", "1", "--seq", "64", "--heads", "2", "--rounds", "1"]
    done = subprocess.run(
        [*command, *sizes, "--cases", step, heads_loss], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode in (0, 1), done.stderr  # a tiny model says nothing about the bounds
    result = json.loads(out.read_text())
    assert list(result["steps"]) == steps and list(result["heads_loss"]) == [heads_loss]
    for found in result["steps"].values():
        assert found["first_loss"]["ours"] == pytest.approx(found["first_loss"]["reference"], rel=0.02)
        assert all(found["seconds"][name] > 0 for name in ("ours", "reference", "backbone"))
        seconds = found["seconds"]
        assert found["speed"] == pytest.approx(seconds["reference"] / seconds["ours"], rel=0.05)
        assert found["gflops"] == pytest.approx(sum(found["flops"].values()) / seconds["ours"] / 1e9, rel=0.5, abs=0.1)
        for side in ("ours", "reference"):
            memory = found["memory_mib"][side]
            assert 0 < memory["runtime"] <= memory["model"] <= memory["before_step"] <= memory["peak"] + 1
        assert found["rows"][0] >= found["rows"][1] >= found["rows"][2] > 0
    assert result["heads_loss"][heads_loss]["share"] > 0
    assert len(result["bounds"]) == 5
    for bound in result["bounds"]:
        assert bound["what"] in done.stdout
    for name in (*steps, heads_loss):
        assert name in done.stdout


def peaks(model, after_steps, peak):
    return {"available": 0.0, "runtime": 100.0, "model": model, "after_steps": after_steps, "peak": peak}


@pytest.mark.parametrize(
    ("reference", "available_mib", "timed"),
    [
        (peaks(500.0, 900.0, 4000.0), 5300, ["ours", "reference"]),
        (peaks(500.0, 900.0, 4000.0), 5100, ["ours"]),  # the two sides do not fit beside each other
        ({"does_not_fit": True}, 6000, ["ours"]),
    ],
)
def test_measured_step_times_the_reference_only_where_it_fits(reference, available_mib, timed):
    seen = []

    def measure(what, case, sides=("ours",), rounds=1):
        if what == "memory":
            ours = peaks(500.0, 700.0, 1000.0) | {"available": available_mib}
            return ours if sides == ("ours",) else reference
        seen.append(list(sides))
        return {"seconds": {}}

    result = measured_step(Case("smollm2", "medusa-1", "separate", "fp32"), 1, measure)
    assert seen == [timed]
    expected = {} if "does_not_fit" in reference else {"memory_ratio": 0.231, "memory_ratio_with_runtime": 0.25}
    assert {name: value for name, value in result.items() if "ratio" in name} == expected


def test_gpu_cases_are_whole_steps_of_qwen3_8b_and_one_layer_for_the_heads_loss():
    cases = step_cases("", "cuda")
    assert {(case.model, case.layers, case.seq, case.heads, case.precision) for case in cases} == {
        ("qwen3-8b", 36, 4096, 5, "bf16")
    }
    assert len({case.name for case in cases}) == 6
    assert {(case.stage, case.form, case.recompute_layers) for case in cases} == {
        (stage, form, layers)
        for form in ("separate", "shared")
        for stage, layers in (("medusa-1", 0), ("medusa-2", 0), ("medusa-2", 36))
    }
    alone = heads_loss_cases("", "cuda")
    assert [(case.form, case.layers, case.device) for case in alone] == [("separate", 1, "cuda"), ("shared", 1, "cuda")]


def test_gpu_kernels_sum_up_by_kind_and_name_the_largest():
    kernels = [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", 70.0, 252),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", 9.9, 36),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>",
            16.0,
            153,
        ),
        ("void at::native::elementwise_kernel<128, 4, BinaryFunctor<c10::BFloat16>>", 13.0, 30),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", 6.0, 157),
        ("liger_cross_entropy_kernel", 3.7, 10),
        ("something new", 0.5, 1),
    ]
    found = summary(kernels * 2)
    assert found["total_ms"] == pytest.approx(2 * sum(milliseconds for _, milliseconds, _ in kernels))
    assert list(found["kinds_ms"]) == [
        "matmul", "optimizer", "elementwise", "attention", "copy and fill", "liger cross-entropy", "other"
    ]  # fmt: skip
    assert found["kinds_ms"]["matmul"] == 140.0 and len(found["largest"]) == 12
    assert [each["ms"] for each in found["largest"]][:3] == [70.0, 70.0, 16.0]


def test_train_step_measure_takes_a_whole_step_in_one_process():
    case = Case("wide", "medusa-1", "shared", "fp32", vocab=300, seq=32, heads=2)
    sides = ["--side", "ours", "--side", "reference", "--rounds", "1"]
    command = [sys.executable, "-m", "benchmarks.train_step.measure", "step", case.to_json(), *sides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["memory_mib"]) == set(result["rounds_s"]) - {"backbone"} == {"ours", "reference"}
    assert result["speed"] > 0 and "kernels" not in result and "mfu" not in result


def test_measured_step_times_ours_where_both_sides_turn_out_too_large():
    seen = []

    def measure(what, case, sides=("ours",), rounds=1):
        if what == "memory":
            return peaks(500.0, 700.0, 1000.0) | {"available": 10000.0}
        seen.append(sides)
        return {"does_not_fit": True} if len(sides) == 2 else {"seconds": {"ours": 1.0}}

    result = measured_step(Case("smollm2", "medusa-1", "separate", "fp32"), 1, measure)
    assert seen == [("ours", "reference"), ("ours",)]
    assert result["seconds"] == {"ours": 1.0} and "does_not_fit" not in result


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("shape")])
def test_train_step_measure_says_what_does_not_fit_and_nothing_else(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(train_step_measure, "step_times", fail)
    case = Case("wide", "medusa-1", "shared", "fp32")
    if str(error) == "shape":
        with pytest.raises(RuntimeError, match="shape"):
            train_step_measure.measure("time", case)
    else:
        assert train_step_measure.measure("time", case) == {"does_not_fit": True}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--liger"], "--liger needs --device cuda"),
        (["--device", "cuda", "--cases", "medusa-1 shared"], "expected one NVIDIA GPU"),
    ],
)
def test_train_step_script_says_what_needs_a_gpu(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train_step.py", *flags, "--json", str(tmp_path / "x.json")])
    assert train_step.main() == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "x.json").exists()


def test_train_step_script_names_what_can_be_selected(tmp_path):
    command = [sys.executable, "-m", "benchmarks.train_step", "--cases", "medusa-3", "--json", tmp_path / "x.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "smollm2 medusa-1 separate fp32" in done.stderr
    assert not (tmp_path / "x.json").exists()


def test_train_step_measure_says_that_a_model_does_not_fit():
    case = Case("wide", "medusa-1", "shared", "fp32", vocab=2**36)
    command = [sys.executable, "-m", "benchmarks.train_step.measure", "memory", case.to_json(), "--side", "ours"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout) == {"does_not_fit": True}, done.stderr
