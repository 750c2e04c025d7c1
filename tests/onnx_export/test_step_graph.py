"""Our attention is the plain formula, with every key repeated for the heads of its group."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from axolotl_medusa.onnx_decoding.graph_names import HIDDEN
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
