"""Sizes from a config alone are those of the model that is built from it."""

from __future__ import annotations

import json

import pytest
from conftest import FAMILIES, HIDDEN, VOCAB, add_lora, make_model

from axolotl_medusa.estimating.sizes import find_config, read_sizes, sizes_of


def sizes_like(model):
    return sizes_of("model", model.config.to_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model(family):
    model = make_model(family)
    found = sizes_like(model)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (found.hidden, found.vocab, found.layers) == (HIDDEN, VOCAB, 2)
    layers = model.get_submodule("transformer.h" if family == "gpt2" else "model.layers")
    assert found.decoder == sum(parameter.numel() for parameter in layers.parameters())


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        *((family, "all-linear") for family in ("llama", "llama-tied", "qwen3", "gemma", "phi3")),
        ("llama", ["q_proj", "down_proj"]),
        ("llama-tied", ["q_proj", "lm_head"]),
        ("qwen3", ["q_proj", "lm_head"]),
    ],
    ids=str,
)
def test_adapter_has_the_parameters_of_pefts(family, targets):
    model = make_model(family)
    found = sizes_like(model)
    peft = add_lora(model, targets)
    every = targets == "all-linear"
    adapter = sum(parameter.numel() for name, parameter in peft.named_parameters() if "lora_" in name)
    assert found.adapter(4, () if every else targets, every=every) == adapter


def test_qwen3s_norms_of_queries_and_keys_count_at_their_full_width():
    llama, qwen3 = sizes_like(make_model("llama")), sizes_like(make_model("qwen3"))
    assert llama.normed == 2 * HIDDEN
    assert qwen3.normed == 2 * HIDDEN + qwen3.queries + qwen3.keys == 2 * HIDDEN + 32 + 16


def test_inner_size_is_that_of_all_experts_of_a_token():
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "hidden_size": 32}
    small = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB,
    }
    assert (
        sizes_of("model", {"model_type": "qwen3_moe", "intermediate_size": 64, **small, **experts}).intermediate == 48
    )
    assert sizes_like(make_model("llama")).intermediate == 64


def test_config_of_a_directory_and_of_the_hubs_cache(tmp_path, monkeypatch):
    make_model("llama").config.save_pretrained(tmp_path / "model")
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    (tmp_path / "hub" / "models--org--model" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert read_sizes(str(tmp_path / "model")).parameters == read_sizes("org/model").parameters
    with pytest.raises(ValueError, match=r"hf download org/model config.json --revision v2`"):
        find_config("org/model", "v2")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("org/never-downloaded", "get that one small file with `hf download org/never-downloaded config.json`"),
        ("./missing", "does not exist: expected a model directory or a hub name"),
        ("a/b/c", "does not exist: expected a model directory or a hub name"),
        ("{empty}", "has no config.json: expected a Hugging Face model directory"),
    ],
)
def test_model_that_is_not_here_is_one_line(name, reason, tmp_path):
    with pytest.raises(ValueError) as error:
        read_sizes(name.format(empty=tmp_path))
    assert reason in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "names no model_type"),
        ({"model_type": "no-such-model"}, "describes no causal language model"),
        ({"model_type": "vit"}, "describes no causal language model"),
        ({"model_type": "llama", "hidden_size": "wide"}, "describes no causal language model"),
    ],
)
def test_config_of_something_else_is_one_line(content, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=reason) as error:
        read_sizes(str(tmp_path))
    assert "\n" not in str(error.value)
