"""Training through axolotl's own command: what comes out, and that it is the same however it is run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from axolotl.integrations.base import BasePlugin
from axolotl_process import log_history
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from axolotl_medusa.decoding.load_target import load_target
from axolotl_medusa.model.heads import MedusaHeads
from axolotl_medusa.model.heads_directory import read_heads
from axolotl_medusa.model.sources import find_source
from axolotl_medusa.serving.model_card import measured_in_training

pytestmark = pytest.mark.e2e

LORA = {
    "medusa_only_heads": False,
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_linear": True,
    "lora_target_modules": ["lm_head"],
}
NUMBERS = ("loss", "grad_norm", "base_loss", "medusa0_loss", "medusa2_loss", "medusa_acceptance_length")


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def trained_heads(directory: Path) -> dict[str, torch.Tensor]:
    tensors = read_heads(directory / "medusa_heads").head_tensors()
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if ".linear." in name), (
        "heads are still at zero"
    )
    return tensors


def test_train_medusa1_writes_heads_only_and_metrics(make_yaml, axolotl, tmp_path, tiny_base):
    before = file_hash(tiny_base / "model.safetensors")
    axolotl("train", make_yaml(medusa_logging_topk=2, medusa_plots=True))
    out = tmp_path / "out"
    trained_heads(out)
    drawn = ["training_acceptance_length.png", "training_accuracy.png", "training_loss.png", "training_schedule.png"]
    assert sorted(file.name for file in out.glob("*.png")) == drawn
    assert file_hash(tiny_base / "model.safetensors") == before
    backbone_files = [path for path in out.rglob("*.safetensors") if path.name != "medusa_lm_head.safetensors"]
    assert backbone_files == []
    shared = load_file(out / "medusa_heads" / "medusa_lm_head.safetensors")["lm_heads.0.weight"]
    assert torch.equal(shared, load_file(tiny_base / "model.safetensors")["lm_head.weight"])
    meta = json.loads((out / "medusa_heads" / "medusa_meta.json").read_text())
    assert meta["recipe"] == "medusa-1" and meta["dtype"] == "float32" and meta["yaml"]["medusa_num_heads"] == 3
    assert (out / "medusa_heads" / "tokenizer.json").is_file()
    optimizer = torch.load(out / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == 6, "optimizer state for three heads' weights and biases, nothing else"
    logs = [entry for entry in log_history(out) if "loss" in entry]
    wanted = {f"medusa{i}_{name}" for i in range(3) for name in ("loss", "top1", "top2")}
    wanted |= {"base_loss", "medusa_acceptance_length", "medusa_scheduler_coefficient"}
    assert wanted <= logs[0].keys()
    assert "medusa0_top3" not in logs[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_epochs": 3, "max_steps": None, "sequence_len": 1024, "save_steps": 3}],
    ids=["mid-epoch", "second-epoch"],
)
def test_train_resumed_run_equals_an_uninterrupted_one(make_yaml, axolotl, tmp_path, options):
    axolotl("train", make_yaml())
    whole = trained_heads(tmp_path / "out")
    resumed = tmp_path / "resumed"
    axolotl("train", make_yaml(output_dir=str(resumed)))
    expected = [entry for entry in log_history(resumed) if "loss" in entry][-1]
    for path in (resumed / "medusa_heads", resumed / "checkpoint-4"):
        path.rename(tmp_path / f"away-{path.name}")
    axolotl("train", make_yaml(output_dir=str(resumed), resume_from_checkpoint=str(resumed / "checkpoint-2")))
    for name, tensor in trained_heads(resumed).items():
        assert torch.equal(tensor, whole[name]), name
    found = [entry for entry in log_history(resumed) if "loss" in entry][-1]
    assert {key: found[key] for key in NUMBERS} == {key: expected[key] for key in NUMBERS}


def test_train_accumulation_of_single_samples_equals_one_batch(make_yaml, axolotl, tmp_path):
    """Micro-batch 1 x accumulation 4 = 4 x 1, through the real command, samples of different lengths, not packed."""
    common = {"sample_packing": False, "medusa_only_heads": False, "max_steps": 2, "save_steps": 2, "seed": 3}
    for name, micro, accumulation in (("a", 1, 4), ("b", 4, 1)):
        axolotl(
            "train",
            make_yaml(
                output_dir=str(tmp_path / name),
                micro_batch_size=micro,
                gradient_accumulation_steps=accumulation,
                **common,
            ),
        )
    one, four = ([entry for entry in log_history(tmp_path / name) if "loss" in entry] for name in ("a", "b"))
    for first, second in zip(one, four, strict=True):
        for key in NUMBERS:
            assert first[key] == pytest.approx(second[key], rel=2e-4), key  # logs are rounded to four digits
    for name, tensor in trained_heads(tmp_path / "a").items():
        torch.testing.assert_close(tensor, trained_heads(tmp_path / "b")[name], rtol=1e-2, atol=2e-5)


def test_train_medusa2_lora_result_loads_in_plain_peft_and_merges(make_yaml, axolotl, tmp_path, tiny_base):
    config = make_yaml(
        **LORA,
        medusa_self_distillation=True,
        medusa_lr_multiplier=4.0,
        medusa_scheduler="sine_0.5",
    )
    axolotl("train", config)
    out = tmp_path / "out"
    trained_heads(out)
    adapter = load_file(out / "adapter_model.safetensors")
    assert any("lm_head.lora_A" in name for name in adapter)
    assert not [name for name in adapter if "medusa" in name]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), out)
    merged_by_peft = model.merge_and_unload()
    shared = load_file(out / "medusa_heads" / "medusa_lm_head.safetensors")["lm_heads.0.weight"]
    torch.testing.assert_close(shared, merged_by_peft.lm_head.weight, rtol=1e-5, atol=1e-6)
    axolotl("merge_lora", config, f"--lora_model_dir={out}")
    _, info = AutoModelForCausalLM.from_pretrained(out / "merged", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert_heads_belong_to(out / "merged")
    logs = [entry for entry in log_history(out) if "loss" in entry]
    assert logs[-1]["base_kl"] >= 0 and "base_ce" in logs[-1]
    assert [entry["medusa_scheduler_coefficient"] for entry in logs] == pytest.approx([0.0, 0.5**0.5, 1.0, 1.0])
    groups = torch.load(out / "checkpoint-4" / "optimizer.pt", weights_only=True)["param_groups"]
    assert sorted({group["lr"] for group in groups}) == [1e-3, 4e-3]
    assert sum(len(group["params"]) for group in groups if group["lr"] == 4e-3) == 6, (
        "weights and biases of three heads"
    )


def test_train_medusa2_lora_legacy_merge_has_no_heads_inside(make_yaml, axolotl, tmp_path):
    config = make_yaml(**LORA, merge_method="legacy")
    axolotl("train", config)
    axolotl("merge_lora", config, f"--lora_model_dir={tmp_path / 'out'}")
    merged = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    assert not [name for name in merged if "medusa" in name]
    assert_heads_belong_to(tmp_path / "out" / "merged")


def assert_heads_belong_to(merged: Path) -> None:
    """Where axolotl tells plugins of a merge, heads lie beside the merged model and decode with it."""
    if not hasattr(BasePlugin, "post_lora_merge"):
        assert not (merged / "medusa_heads").exists()
        return
    model, file = load_target(merged, dtype=torch.float32)
    assert torch.equal(file.tensors["lm_heads.0.weight"], model.lm_head.weight)
    assert file.config["base_model_name_or_path"] == str(merged)
    assert find_source(merged / "medusa_heads").model_dir() == merged


@pytest.mark.parametrize("form", ["separate", "shared"])
def test_train_medusa2_full_backbone_loads_in_plain_transformers(make_yaml, axolotl, tmp_path, form):
    axolotl("train", make_yaml(medusa_only_heads=False, medusa_lm_head=form, gradient_checkpointing=True))
    out = tmp_path / "out"
    trained_heads(out)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    if form == "shared":
        shared = load_file(out / "medusa_heads" / "medusa_lm_head.safetensors")["lm_heads.0.weight"]
        assert torch.equal(shared, model.lm_head.weight)
    _, info = AutoModelForCausalLM.from_pretrained(out / "checkpoint-2", output_loading_info=True)
    assert not info["unexpected_keys"]


def test_train_two_stages_start_from_the_first_ones_heads(make_yaml, axolotl, tmp_path):
    axolotl("train", make_yaml(output_dir=str(tmp_path / "stage1")))
    first = trained_heads(tmp_path / "stage1")
    axolotl(
        "train",
        make_yaml(
            **LORA,
            medusa_init_from=str(tmp_path / "stage1"),
            learning_rate=1e-9,
            max_steps=1,
            output_dir=str(tmp_path / "stage2"),
        ),
    )
    for name, tensor in trained_heads(tmp_path / "stage2").items():
        torch.testing.assert_close(tensor, first[name], rtol=0, atol=1e-7)


def test_train_last_layers_only_changes_only_them(make_yaml, axolotl, tmp_path, tiny_base):
    axolotl("train", make_yaml(medusa_only_heads=False, medusa_num_unfreeze_layers=1))
    before, after = load_file(tiny_base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("model.layers.1.") or name == "model.norm.weight" for name in changed)
    assert any(name == "model.norm.weight" for name in changed)


def test_train_qlora_loads_four_bit_and_trains_heads_and_adapter(make_yaml, axolotl, tmp_path):
    options = {**LORA, "adapter": "qlora", "load_in_4bit": True, "medusa_self_distillation": True}
    result = axolotl("train", make_yaml(**options))
    trained_heads(tmp_path / "out")
    assert not [name for name in load_file(tmp_path / "out" / "adapter_model.safetensors") if "medusa" in name]
    assert "adapter: " in result.output


def test_train_best_model_and_early_stopping_follow_the_acceptance_length(make_yaml, axolotl, tmp_path):
    config = make_yaml(
        val_set_size=0.2,
        eval_sample_packing=True,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="eval_medusa_acceptance_length",
        load_best_model_at_end=True,
        early_stopping_patience=1,
        learning_rate=0.0,
        max_steps=20,
    )
    axolotl("train", config)
    history = log_history(tmp_path / "out")
    lengths = [entry["eval_medusa_acceptance_length"] for entry in history if "eval_medusa_acceptance_length" in entry]
    assert 2 <= len(lengths) < 10, "with a learning rate of 0 nothing improves, so training stops early"
    assert "eval_medusa0_top1" in next(entry for entry in history if "eval_loss" in entry)


def test_train_leaves_the_best_heads_and_their_card_has_their_evaluation(make_yaml, axolotl, tmp_path):
    """The highest loss is called the best here, so that the first checkpoint is."""
    config = make_yaml(
        val_set_size=0.2,
        eval_sample_packing=True,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        metric_for_best_model="eval_medusa0_loss",
        greater_is_better=True,
        load_best_model_at_end=True,
        learning_rate=1e-2,
        max_steps=6,
    )
    axolotl("train", config)
    out = tmp_path / "out"
    losses = {entry["step"]: entry["eval_medusa0_loss"] for entry in log_history(out) if "eval_medusa0_loss" in entry}
    best = max((step for step in losses if step), key=losses.__getitem__)
    assert best < max(losses), losses
    measured = measured_in_training(out)
    assert (measured["step"], measured["medusa0_loss"]) == (best, losses[best])
    assert measured_in_training(out / f"checkpoint-{max(losses)}")["step"] == max(losses)


def test_evaluate_command_measures_the_trained_heads(make_yaml, axolotl, tmp_path):
    config = make_yaml(
        val_set_size=0.2, eval_sample_packing=True, eval_strategy="steps", eval_steps=4, learning_rate=1e-2
    )
    axolotl("train", config)
    expected = [entry for entry in log_history(tmp_path / "out") if "eval_medusa0_loss" in entry][-1]
    result = axolotl("evaluate", config)
    assert "Medusa heads loaded from" in result.output
    rows = (line.split(",") for line in (tmp_path / "out" / "eval_summary.csv").read_text().splitlines())
    values = {row[0]: row[2] for row in rows}
    assert float(values["medusa0_loss"]) == pytest.approx(expected["eval_medusa0_loss"], rel=1e-4)


def test_preprocess_command_then_train_reuses_the_prepared_data(make_yaml, axolotl, tmp_path):
    config = make_yaml()
    axolotl("preprocess", config)
    assert "Loading prepared dataset from disk" in axolotl("train", config).output
    trained_heads(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"medusa_num_haeds": 3, "medusa_lr_multiplier": 0.0, "medusa_self_distillation": True},
            [
                "4 problems",
                "medusa_num_heads?",
                "medusa_lr_multiplier",
                "medusa_only_heads and medusa_self_distillation",
                "adapter",
            ],
        ),
        ({"base_model": "./no/such/model"}, ["base_model ./no/such/model does not exist"]),
        (
            {"learning_rate": 1e30, "medusa_only_heads": False, "max_grad_norm": 1e30},
            ["the loss is ", " at step 2; ", "lower learning_rate"],
        ),
    ],
    ids=["yaml", "base-model", "nan"],
)
def test_train_bad_input_ends_in_one_line_and_no_heads(make_yaml, axolotl, tmp_path, changes, words):
    result = axolotl("train", make_yaml(**changes), ok=False)
    message = result.output[result.output.index("axolotl-medusa:") :]
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert not (tmp_path / "out" / "medusa_heads").exists()


def test_train_data_without_assistant_turns_is_named_and_counted(make_yaml, axolotl, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n' * 7)
    config = make_yaml(datasets=[{"path": str(file), "type": "chat_template", "field_messages": "messages"}])
    result = axolotl("train", config, ok=False)
    assert f"datasets path {file}: none of its 7 rows has an assistant turn" in result.output
    assert not (tmp_path / "out" / "medusa_heads").exists()


def test_saved_heads_reload_to_bitwise_the_same_logits(make_yaml, axolotl, tmp_path):
    axolotl("train", make_yaml(medusa_lm_head="separate"))
    file = read_heads(tmp_path / "out" / "medusa_heads")
    again = read_heads(tmp_path / "out" / "checkpoint-4" / "medusa_heads")
    hidden = torch.randn(5, 64)
    for one, two in zip(_logits(file.build(), hidden), _logits(again.build(), hidden), strict=True):
        assert torch.equal(one, two)


def _logits(heads: MedusaHeads, hidden: torch.Tensor) -> list[torch.Tensor]:
    return [heads.output_layer(i)(heads.hidden(i, hidden)) for i in range(heads.num_heads)]
