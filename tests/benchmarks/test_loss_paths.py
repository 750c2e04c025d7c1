"""benchmarks/train_step/loss_paths.py: what is compared computes the same, and the table has a line for each."""

from __future__ import annotations

import json
import sys

import torch
from benchmarks.train_step import loss_paths
from torch.nn import functional as F

SIZES = {"--rows": "40", "--vocab": "300", "--hidden": "16", "--rounds": "1"}


def test_every_path_has_the_same_loss_and_gradients():
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 16).requires_grad_(), torch.randn(300, 16).requires_grad_()
    targets = torch.randint(300, (40,))
    paths = loss_paths.losses("fp32", "cpu")
    assert {"ours", "ours, recomputed", "plain"} <= set(paths)
    expected = loss_paths.plain(hidden, weight, targets)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    for name, path in paths.items():
        loss = path(hidden, weight, targets)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6, msg=name)
        for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_divergence_is_the_mean_kl_from_the_teacher():
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 16).requires_grad_(), torch.randn(300, 16).requires_grad_()
    teacher_hidden, teacher_weight = loss_paths.teacher_of(hidden, weight)
    assert not teacher_weight.requires_grad and not torch.equal(teacher_hidden, hidden)
    log_q, p = (hidden @ weight.T).log_softmax(-1), (teacher_hidden @ teacher_weight.T).softmax(-1)
    expected = F.kl_div(log_q, p, reduction="batchmean")
    loss = loss_paths.divergence(hidden, weight, torch.randint(300, (40,)))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    found, gradients = (torch.autograd.grad(each, (hidden, weight)) for each in (loss, expected))
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_script_prints_and_writes_every_path(tmp_path, monkeypatch, capsys):
    out = tmp_path / "result.json"
    flags = [text for pair in SIZES.items() for text in pair]
    monkeypatch.setattr(sys, "argv", ["loss_paths.py", *flags, "--json", str(out)])
    loss_paths.main()
    result, shown = json.loads(out.read_text()), capsys.readouterr().out
    for precision in ("fp32", "bf16"):
        assert set(result[precision]) == set(loss_paths.losses(precision, "cpu"))
        for name, found in result[precision].items():
            assert found["seconds"] > 0 and f"{precision}  {name}" in shown
