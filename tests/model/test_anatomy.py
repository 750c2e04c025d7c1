"""The anatomy of a causal LM: its parts, its logits, and layers that are recomputed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import HIDDEN, VOCAB, add_lora, make_model
from transformers.modeling_layers import GradientCheckpointingLayer

from axolotl_medusa.model.anatomy import (
    decoder_layers,
    embedding_shape,
    logit_transform,
    output_embedding,
    probe_logits,
    recompute_layers,
)
from axolotl_medusa.model.heads import MedusaHeads, attach_heads, attached_heads


def test_embedding_shape_counts_the_rows_that_a_resize_added():
    model = make_model(tie_word_embeddings=True)
    model.resize_token_embeddings(VOCAB + 1, pad_to_multiple_of=16)
    rows = -(-(VOCAB + 1) // 16) * 16
    assert (
        embedding_shape(output_embedding(model)) == embedding_shape(output_embedding(add_lora(model))) == (rows, HIDDEN)
    )


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("gemma2-softcap", "final_logit_softcapping"),
        ("cohere-logit-scale", "logit_scale"),
        ("granite-logits-scaling", "logits_scaling"),
    ],
)
def test_probe_logits_sees_a_transform_that_its_config_does_not_tell(family, key, monkeypatch):
    model = make_model(family)
    probe_logits(model)
    monkeypatch.setattr("axolotl_medusa.model.anatomy.logit_transform", lambda config: lambda logits: logits)
    with pytest.raises(ValueError, match="are not lm_head"):
        probe_logits(model)
    assert getattr(model.config, key)


@pytest.mark.parametrize("dtypes", ["bf16", "fp16", "bf16-layers-fp32-embeddings"])
def test_probe_logits_in_half_precision_accepts_rounding(dtypes):
    model = make_model("gemma2-softcap").to(torch.float16 if dtypes == "fp16" else torch.bfloat16)
    if dtypes == "bf16-layers-fp32-embeddings":
        model.get_input_embeddings().float()
    probe_logits(model)


@pytest.mark.parametrize("where", ["meta", "zero-3"])
def test_probe_logits_is_skipped_where_parameters_are_not_materialised(where, monkeypatch):
    model = make_model()
    if where == "meta":
        model.to("meta")
    else:
        model.model.norm.weight.ds_shape = torch.Size([HIDDEN])
    monkeypatch.setattr(model, "forward", lambda **_: pytest.fail("the model was run"))
    attach_heads(model, MedusaHeads(HIDDEN, VOCAB, 1))
    assert attached_heads(model).num_heads == 1


def test_logit_transform_of_a_config_caps_scales_or_keeps():
    logits = torch.tensor([-40.0, -1.0, 0.0, 3.0, 90.0])

    def of(**keys):
        text = SimpleNamespace(**keys)
        return logit_transform(SimpleNamespace(get_text_config=lambda: text))(logits)

    assert torch.equal(of(), logits)
    assert torch.equal(of(final_logit_softcapping=None, logit_scale=None, logits_scaling=None), logits)
    torch.testing.assert_close(of(final_logit_softcapping=30.0), 30 * torch.tanh(logits / 30))
    torch.testing.assert_close(of(logit_scale=0.25), logits / 4)
    torch.testing.assert_close(of(logits_scaling=8.0), logits / 8)
    torch.testing.assert_close(of(logit_scale=0.5, final_logit_softcapping=5.0), 5 * torch.tanh(logits / 10))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("family", "layers", "norm"),
    [("llama", "layers", "norm"), ("gpt2", "h", "ln_f"), ("phi-lm-head-bias", "layers", "final_layernorm")],
)
def test_decoder_layers_are_those_beside_the_final_norm(family, layers, norm, lora):
    model = make_model(family)
    decoder = model.base_model
    found, parent = decoder_layers(add_lora(model) if lora else model)
    assert parent is decoder
    assert found is getattr(decoder, layers) and len(found) == 2
    assert isinstance(getattr(parent, norm), torch.nn.Module)


def test_decoder_layers_model_without_such_a_list_is_an_error():
    model = make_model()
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="no list of 7 decoder layers in LlamaForCausalLM: medusa_num_unfreeze_layers"):
        decoder_layers(model)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2-softcap"])
@pytest.mark.parametrize("lora", [False, True])
def test_recompute_layers_recomputes_the_first_ones_and_changes_no_gradient(family, lora):
    def gradients_and_calls(count):
        model = make_model(family).train()
        trained = add_lora(model) if lora else model
        if count:
            recompute_layers(trained, count)
        calls = []
        for number, layer in enumerate(decoder_layers(trained)[0]):
            layer.mlp.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
        trained(input_ids=torch.arange(3, 15)[None]).logits.square().mean().backward()
        return [each.grad for each in trained.parameters() if each.grad is not None], sorted(calls)

    expected, calls = gradients_and_calls(0)
    assert calls == [0, 1]
    for count, recomputed in ((1, [0, 0, 1]), (2, [0, 0, 1, 1])):
        found, calls = gradients_and_calls(count)
        assert calls == recomputed
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_recompute_layers_of_more_layers_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="medusa_checkpoint_layers is 3 but the model has 2 decoder layers"):
        recompute_layers(make_model(), 3)


def test_recompute_layers_of_layers_that_cannot_be_recomputed_alone_is_an_error(monkeypatch):
    model = make_model()
    monkeypatch.setattr(model, "gradient_checkpointing_enable", lambda **_: None)
    monkeypatch.delattr(GradientCheckpointingLayer, "gradient_checkpointing")
    with pytest.raises(
        ValueError, match="LlamaDecoderLayer cannot be recomputed by itself: set gradient_checkpointing: true"
    ):
        recompute_layers(model, 1)


def test_probe_logits_leaves_the_type_that_4_bit_layers_compute_in():
    """Their first forward decides it for good: a probe under autocast would leave a run in fp32 with layers in bf16."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = make_model(hidden_size=64, intermediate_size=128, head_dim=16).eval()
    for layer in model.model.layers:
        own = layer.self_attn.o_proj
        four_bits = bitsandbytes.nn.Linear4bit(own.in_features, own.out_features, bias=False)
        four_bits.weight = bitsandbytes.nn.Params4bit(own.weight.data, requires_grad=False)
        layer.self_attn.o_proj = four_bits.to("cpu")
    probe_logits(model)
    assert {layer.self_attn.o_proj.compute_dtype for layer in model.model.layers} == {torch.float32}
