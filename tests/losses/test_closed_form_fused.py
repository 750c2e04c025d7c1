"""Liger's cross-entropy kernel in place of ours, run by Triton's interpreter: no GPU is needed for values and gradients."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("liger_kernel")

CHECK = """
import torch
from axolotl_medusa.losses import closed_form
from axolotl_medusa.losses.closed_form import gradient_in_place
from axolotl_medusa.losses.prediction import Accuracies
from axolotl_medusa.losses.cross_entropy_and_kl import LossWeights

torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    targets = torch.randint(300, (21,))
    logits = (3 * torch.randn(21, 300)).to(dtype)
    logits[torch.arange(0, 21, 2), targets[::2]] += 8
    found = {}
    for fused in (False, True):
        closed_form.fused_kernels_for = lambda device, fused=fused: fused
        gradient = logits.clone()
        sums = gradient_in_place(gradient, targets, None, LossWeights(0.7), Accuracies(3, 2), lambda few: logits[few])
        found[fused] = (gradient, sums)
    (gradient, sums), (fused_gradient, fused_sums) = found[False], found[True]
    rounding = dict(rtol=2**-7, atol=2**-8) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused_gradient, gradient, **rounding)
    torch.testing.assert_close(fused_sums.loss, sums.loss, **rounding)
    assert torch.equal(fused_sums.correct, sums.correct) and 0 < sums.correct.sum() < 21
    assert torch.equal(fused_sums.topk_hits, sums.topk_hits)
    assert not torch.equal(gradient, logits)
print("equal")
"""


def test_cross_entropy_fused_equals_ours_in_value_gradient_and_accuracies():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "equal"
