"""The type in which an output layer is multiplied."""

from __future__ import annotations

import pytest
import torch

from axolotl_medusa.losses import prediction
from axolotl_medusa.losses.prediction import matmul_dtype


@pytest.mark.parametrize("is_fast", [True, False])
def test_matmul_dtype_is_fp32_for_bf16_on_cpus_without_fast_matmuls_for_it_alone(is_fast, monkeypatch):
    monkeypatch.setattr(prediction, "multiplies_bf16", lambda: is_fast)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert matmul_dtype(torch.bfloat16, cpu) == (torch.bfloat16 if is_fast else torch.float32)
    assert matmul_dtype(torch.bfloat16, cuda) == torch.bfloat16
    for dtype in (torch.float32, torch.float16):
        assert matmul_dtype(dtype, cpu) == matmul_dtype(dtype, cuda) == dtype
