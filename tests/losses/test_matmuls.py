"""Gradients of an output layer's weight, added up chunk by chunk."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE
from loss_cases import HIDDEN, VOCAB

from axolotl_medusa.losses import host_memory
from axolotl_medusa.losses.matmuls import ChunkBuffers, add_weight_gradient


@pytest.mark.parametrize("chunks", [0, 1, 3])
@pytest.mark.parametrize(
    ("weight_dtype", "matmul_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
    ids=["fp32", "bf16", "bf16-to-fp32"],
)
def test_weight_gradient_is_the_sum_over_chunks_whatever_was_in_its_memory(
    weight_dtype, matmul_dtype, chunks, monkeypatch
):
    monkeypatch.setattr(
        host_memory, "empty", lambda _, shape, dtype, device: torch.full(shape, math.nan, dtype=dtype, device=device)
    )
    torch.manual_seed(0)
    weight = torch.zeros(VOCAB, HIDDEN, dtype=weight_dtype, requires_grad=True)
    parts = [(torch.randn(7, VOCAB, dtype=matmul_dtype), torch.randn(7, HIDDEN, dtype=matmul_dtype)) for _ in range(3)]
    parts = parts[:chunks] or [(parts[0][0][:0], parts[0][1][:0])]
    found, buffers = None, ChunkBuffers()
    for logits_gradient, rows in parts:
        found = add_weight_gradient(found, weight, logits_gradient, rows, buffers)
    expected = sum(logits_gradient.double().T @ rows.double() for logits_gradient, rows in parts)
    assert found.dtype == weight_dtype
    unrounded = torch.float32 in (matmul_dtype, weight_dtype if DEVICE == "cuda" else None)  # a GPU adds in fp32
    assert (found - expected).norm() <= (1e-5 if unrounded else 2**-7) * expected.norm()
