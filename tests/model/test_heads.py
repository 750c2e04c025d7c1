"""Residual blocks, the names of the heads' tensors, and attaching to every family of models."""

from __future__ import annotations

import pytest
import torch
from conftest import COMMON, FAMILIES, HIDDEN, VOCAB, add_lora, make_model, randomize
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from axolotl_medusa.model.anatomy import (
    backbone,
    causal_lm,
    embedding_shape,
    frozen_output_embedding,
    logit_transform,
    output_embedding,
)
from axolotl_medusa.model.heads import HEADS_NAME, MedusaHeads, ResidualBlock, attach_heads, attached_heads
from axolotl_medusa.model.heads_directory import acting_output_layer

RTOL, ATOL = 1e-4, 1e-5  # fp32 rounding between the fused and the plain order of the same operations
UNTIED = [name for name, options in FAMILIES.items() if not options.get("tie_word_embeddings") and name != "gpt2"]
ATTACH_CASES = [(name, {}) for name in FAMILIES] + [(name, {"tie_word_embeddings": True}) for name in UNTIED]


def token_ids(seq: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, seq), generator=torch.Generator().manual_seed(4))


def test_residual_block_is_x_plus_silu_of_a_linear_layer():
    torch.manual_seed(0)
    block, hidden = ResidualBlock(HIDDEN), torch.randn(3, 5, HIDDEN)
    randomize(block)
    linear = hidden @ block.linear.weight.T + block.linear.bias
    torch.testing.assert_close(block(hidden), hidden + linear * torch.sigmoid(linear), rtol=RTOL, atol=ATOL)


def test_residual_block_starts_as_the_identity():
    hidden = torch.randn(3, 5, HIDDEN)
    assert torch.equal(ResidualBlock(HIDDEN)(hidden), hidden)
    assert torch.equal(MedusaHeads(HIDDEN, VOCAB, 2, 3).hidden(1, hidden), hidden)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("form", ["separate", "shared", "trained"])
def test_heads_state_dict_has_exactly_the_canonical_names_and_shapes(form, num_layers):
    num_heads = 3
    expected = {}
    for i in range(num_heads):
        for j in range(num_layers):
            expected[f"{i}.{j}.linear.weight"] = (HIDDEN, HIDDEN)
            expected[f"{i}.{j}.linear.bias"] = (HIDDEN,)
        if form == "separate" or (form == "trained" and i == 0):
            expected[f"{i}.{num_layers}.weight"] = (VOCAB, HIDDEN)
    heads = MedusaHeads(HIDDEN, VOCAB, num_heads, num_layers, form)
    assert {name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()} == expected
    assert set(dict(heads.named_parameters())) == set(expected)


@pytest.mark.parametrize("form", ["separate", "shared"])
def test_heads_every_block_has_parameters_of_its_own(form):
    heads = MedusaHeads(HIDDEN, VOCAB, 3, 4, form)
    blocks = [block for i in range(3) for block in heads.blocks(i)]
    assert len(blocks) == 12 and all(isinstance(block, ResidualBlock) for block in blocks)
    assert len({block.linear.weight.data_ptr() for block in blocks}) == 12
    with torch.no_grad():
        blocks[1].linear.bias.fill_(1.0)
    hidden = torch.zeros(1, HIDDEN)
    silu_of_one = F.silu(torch.ones(1, HIDDEN))
    assert torch.equal(heads.hidden(0, hidden), silu_of_one)  # once, not once for each of the four blocks
    assert torch.equal(heads.hidden(1, hidden), hidden)


@pytest.mark.parametrize("form", ["separate", "shared"])
def test_heads_hidden_runs_all_blocks_in_order_and_no_output_layer(form):
    heads = randomize(MedusaHeads(HIDDEN, VOCAB, 2, 3, form))
    hidden = torch.randn(4, HIDDEN)
    for i in range(2):
        expected = hidden
        for j in range(3):
            tensors = heads.state_dict()
            linear = F.linear(expected, tensors[f"{i}.{j}.linear.weight"], tensors[f"{i}.{j}.linear.bias"])
            expected = expected + F.silu(linear)
        torch.testing.assert_close(heads.hidden(i, hidden), expected, rtol=RTOL, atol=ATOL)
        layer = heads.output_layer(i)
        assert (layer is None) == (form == "shared")
        if layer is not None:
            assert layer.weight is heads.get_parameter(f"{i}.3.weight") and layer.bias is None


def test_heads_hidden_casts_to_the_heads_type():
    heads = MedusaHeads(HIDDEN, VOCAB, 1, dtype=torch.float64)
    assert heads.dtype == torch.float64
    assert heads.hidden(0, torch.randn(2, HIDDEN, dtype=torch.bfloat16)).dtype == torch.float64


def test_start_output_layers_copies_the_weight_into_each_head():
    heads = MedusaHeads(HIDDEN, VOCAB, 3)
    weight = torch.randn(VOCAB, HIDDEN, requires_grad=True)
    heads.start_output_layers_from(weight)
    layers = [heads.output_layer(i).weight for i in range(3)]
    assert all(torch.equal(layer, weight) and layer.is_leaf and layer.requires_grad for layer in layers)
    assert len({tensor.data_ptr() for tensor in (weight, *layers)}) == 4
    MedusaHeads(HIDDEN, VOCAB, 3, form="shared").start_output_layers_from(weight)  # nothing to start
    trained = MedusaHeads(HIDDEN, VOCAB, 3, form="trained")
    trained.start_output_layers_from(weight)
    (layer,) = trained.output_layers()
    assert torch.equal(layer.weight, weight) and all(trained.output_layer(i) is layer for i in range(3))
    assert (
        len(trained) == 3 and sum(p.numel() for p in trained.parameters()) == 3 * HIDDEN * (HIDDEN + 1) + VOCAB * HIDDEN
    )


@pytest.mark.parametrize("adapter", [None, "body", "lm_head"])
@pytest.mark.parametrize(
    ("family", "changes"), ATTACH_CASES, ids=[f"{name}{'-retied' if c else ''}" for name, c in ATTACH_CASES]
)
def test_fresh_attached_heads_have_the_models_own_logits(family, changes, adapter):
    model = make_model(family, **changes)
    if adapter:
        model = add_lora(model, targets=["lm_head"] if adapter == "lm_head" else "all-linear")
    model.eval()
    layer = output_embedding(model)
    assert embedding_shape(layer) == (VOCAB, HIDDEN)
    assert (causal_lm(model) is model) == (adapter is None)
    with torch.no_grad():
        expected = model(input_ids=token_ids(), use_cache=False).logits
        hidden = backbone(model)(input_ids=token_ids(), use_cache=False)[0]
    for form in ("separate", "shared"):
        heads = MedusaHeads(HIDDEN, VOCAB, 2, 2, form)
        with acting_output_layer(model) as weight:
            heads.start_output_layers_from(weight)
        attach_heads(model, heads)
        assert attached_heads(model) is heads
        for i in range(2):
            logits = (heads.output_layer(i) or layer)(heads.hidden(i, hidden))
            bias = getattr(frozen_output_embedding(layer), "bias", None)
            if form == "separate" and bias is not None:  # the format has no place for it: separate heads leave it out
                assert family == "phi-lm-head-bias" and bias.abs().max() > 0
                logits = logits + bias
            found = logit_transform(causal_lm(model).config)(logits)
            torch.testing.assert_close(found, expected, rtol=RTOL, atol=ATOL)


def test_attach_heads_names_their_tensors_under_medusa_heads_and_leaves_the_model_as_it_was():
    model = make_model()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach_heads(model, MedusaHeads(HIDDEN, VOCAB, 2))
    assert model.training
    after = model.state_dict()
    assert {name for name in after if name not in before} == {
        f"{HEADS_NAME}.{i}.{name}" for i in range(2) for name in ("0.linear.weight", "0.linear.bias", "1.weight")
    }
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def refused_models():
    llama = AutoConfig.for_model("llama", **COMMON)
    bert = AutoConfig.for_model(
        "bert", vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    t5 = AutoConfig.for_model("t5", vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    return {
        "backbone": (lambda: AutoModel.from_config(llama), "LlamaModel has no output embedding"),
        "sequence-classification": (
            lambda: AutoModelForSequenceClassification.from_config(llama),
            "LlamaForSequenceClassification has no output embedding",
        ),
        "token-classification": (
            lambda: AutoModelForTokenClassification.from_config(bert),
            "BertForTokenClassification has no output embedding",
        ),
        "encoder": (lambda: AutoModel.from_config(bert), "BertModel has no output embedding"),
        "masked-lm": (lambda: AutoModelForMaskedLM.from_config(bert), "logits of BertForMaskedLM are not lm_head"),
        "encoder-decoder": (
            lambda: AutoModelForSeq2SeqLM.from_config(t5),
            "T5ForConditionalGeneration has no separate backbone",
        ),
        "plain-module": (lambda: torch.nn.Linear(2, 2), "Linear has no output embedding"),
    }


@pytest.mark.parametrize("kind", refused_models())
def test_attach_heads_model_that_is_no_causal_lm_is_refused(kind):
    make, message = refused_models()[kind]
    model = make()
    with pytest.raises(ValueError, match=message):
        attach_heads(model, MedusaHeads(HIDDEN, VOCAB, 1))
    assert not hasattr(model, HEADS_NAME)


@pytest.mark.parametrize(
    "transform", [lambda x: x * 1.5, lambda x: x + 1.0, lambda x: x.tanh(), lambda x: x * float("nan")]
)
def test_attach_heads_unknown_transform_of_the_logits_is_refused(transform, monkeypatch):
    model = make_model()
    own_forward = model.forward

    def forward(**inputs):
        output = own_forward(**inputs)
        output.logits = transform(output.logits)
        return output

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ValueError, match="logits of LlamaForCausalLM are not lm_head of its last hidden state"):
        attach_heads(model, MedusaHeads(HIDDEN, VOCAB, 1))


@pytest.mark.parametrize("lora", [False, True])
def test_attached_heads_model_without_heads_is_an_error_that_names_the_plugin(lora):
    model = add_lora(make_model()) if lora else make_model()
    with pytest.raises(RuntimeError, match=r"no Medusa heads on LlamaForCausalLM.*axolotl_medusa.MedusaPlugin"):
        attached_heads(model)
