"""Our attention is the plain formula, with every key repeated for the heads of its group; a head names the model's tokens."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from conftest import randomize
from torch import nn

from axolotl_medusa.model.heads import MedusaHeads
from axolotl_medusa.onnx_decoding.graph_names import HIDDEN, HIDDEN_STATES, LOG_PROBABILITIES, TOKENS, TOP_K
from axolotl_medusa.onnx_export.export import rows_of
from axolotl_medusa.onnx_export.graphs import write_head_graph
from axolotl_medusa.onnx_export.step_graph import grouped_attention


def plain_attention(query, key, value, bias, scaling, softcap):
    """One head and one row after the other."""
    batch, heads, new, _ = query.shape
    found = torch.zeros(batch, new, heads, value.shape[-1])
    for row in range(batch):
        for head in range(heads):
            group = head // (heads // key.shape[1])
            scores = query[row, head] @ key[row, group].T * scaling
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            found[row, :, head] = torch.softmax(scores + bias[row, 0], -1) @ value[row, group]
    return found


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("new", [1, 3])
def test_attention_is_the_plain_formula(kv_heads, softcap, new):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, new, 8), torch.randn(2, kv_heads, 5, 8), torch.randn(2, kv_heads, 5, 8)
    bias = torch.where(torch.rand(2, 1, new, 5) < 0.3, HIDDEN, 0.0)
    found, weights = grouped_attention(nn.Identity(), query, key, value, bias, scaling=0.4, softcap=softcap)
    assert weights is None
    torch.testing.assert_close(found, plain_attention(query, key, value, bias, 0.4, softcap))


def test_attention_sinks_are_refused():
    states = torch.zeros(1, 1, 1, 2)
    with pytest.raises(ValueError, match="Identity has attention sinks"):
        grouped_attention(nn.Identity(), states, states, states, torch.zeros(1, 1, 1, 1), s_aux=torch.zeros(1))


@pytest.mark.parametrize("form", ["trained", "shared"])
def test_head_of_a_draft_vocabulary_names_the_models_tokens(form, tmp_path):
    torch.manual_seed(0)
    heads, lm_head = randomize(MedusaHeads(12, 300, 1, form=form, draft_vocab=128)), nn.Linear(12, 300)
    heads.choose_tokens(torch.randperm(300)[:128].sort().values)
    layer = heads.output_layer(0) or rows_of(lm_head, heads.token_map)
    write_head_graph(heads.blocks(0), layer, tmp_path / "head.onnx", heads.token_map)
    states = torch.randn(4, 12)
    with torch.no_grad():
        logits = layer(heads.hidden(0, states))
        if form == "shared":
            assert torch.equal(logits, lm_head(heads.hidden(0, states))[:, heads.token_map])
    best, places = logits.log_softmax(-1).topk(5, -1)
    session = onnxruntime.InferenceSession(tmp_path / "head.onnx")
    feed = {HIDDEN_STATES: states.numpy(), TOP_K: torch.tensor([5]).numpy()}
    tokens, probabilities = session.run([TOKENS, LOG_PROBABILITIES], feed)
    assert torch.equal(torch.from_numpy(tokens), heads.token_map[places])
    torch.testing.assert_close(torch.from_numpy(probabilities), best)
