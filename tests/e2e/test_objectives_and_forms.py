"""Objectives and forms of heads through axolotl's own command: trained, read back, decoded with."""

from __future__ import annotations

import json

import pytest
import torch
from axolotl_process import log_history
from safetensors.torch import load_file

from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.model.heads_directory import read_heads

pytestmark = pytest.mark.e2e


def test_train_chain_weighted_lk_heads_of_one_trained_layer_and_a_draft_vocabulary(
    make_yaml, axolotl, tmp_path, tiny_base, chats
):
    """Twice over the data, from the cache the second time; then stage 2 from what it left, with an adapter on lm_head."""
    keys = {
        "medusa_head_loss": "lk",
        "medusa_head_weighting": "chain",
        "medusa_lm_head": "trained",
        "medusa_draft_vocab": 128,
    }
    config = make_yaml(
        **keys, medusa_hidden_cache=str(tmp_path / "cache"), num_epochs=2, max_steps=None, save_steps=100
    )
    result = axolotl("train", config)
    out = tmp_path / "out"
    assert "heads choose among 128 of 49,152 tokens, which are 100.00% of the" in result.output
    heads = read_heads(out / "medusa_heads").build()
    assert heads.form == "trained" and tuple(heads.output_layer(0).weight.shape) == (128, 64)
    start = load_file(tiny_base / "model.safetensors")["lm_head.weight"][heads.token_map]
    assert 0 < (heads.output_layer(0).weight - start).abs().max() < 0.1, "it starts from lm_head's rows and is trained"
    losses = [entry["medusa0_loss"] for entry in log_history(out) if "loss" in entry]
    assert losses[-1] < losses[0] and all(0 < loss < 1.5 for loss in losses)
    medusa = MedusaModel.from_pretrained(out)
    logits = medusa.draft_logits(torch.randn(1, 64), 3)
    assert int(logits.isfinite().sum()) == 3 * 128
    stage_2 = {"medusa_only_heads": False, "adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
    second = make_yaml(
        **keys,
        **stage_2,
        lora_target_modules=["lm_head"],
        medusa_init_from=str(out),
        output_dir=str(tmp_path / "second"),
    )
    assert "heads choose among 128 of 49,152 tokens" in axolotl("train", second).output
    later = read_heads(tmp_path / "second" / "medusa_heads")
    assert torch.equal(later.tensors["token_map"], heads.token_map)
    assert not torch.equal(later.tensors["0.1.weight"], heads.output_layer(0).weight)
    assert json.loads((tmp_path / "second" / "medusa_heads" / "config.json").read_text())["medusa_lm_head"] == "trained"


@pytest.mark.long
def test_train_chain_accumulation_of_single_samples_equals_one_batch(make_yaml, axolotl, tmp_path):
    """A row's weight depends on its own position alone: micro-batch 1 x accumulation 4 = 4 x 1."""
    for name, micro, accumulation in (("a", 1, 4), ("b", 4, 1)):
        config = make_yaml(
            output_dir=str(tmp_path / name),
            micro_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            sample_packing=False,
            medusa_head_weighting="chain",
            medusa_head_loss="kl",
            max_steps=2,
            save_steps=2,
        )
        axolotl("train", config)
    one, four = ([entry for entry in log_history(tmp_path / name) if "loss" in entry] for name in ("a", "b"))
    for first, second in zip(one, four, strict=True):
        for key in ("loss", "grad_norm", "medusa0_loss", "medusa2_loss"):
            assert first[key] == pytest.approx(second[key], rel=2e-4), key  # logs are rounded to four digits
    for name, tensor in read_heads(tmp_path / "a" / "medusa_heads").head_tensors().items():
        other = read_heads(tmp_path / "b" / "medusa_heads").tensors[name]
        torch.testing.assert_close(tensor, other, rtol=1e-2, atol=2e-5)
