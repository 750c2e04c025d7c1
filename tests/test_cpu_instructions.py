"""What the processor is asked: its name, and whether bf16 is fast on it."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from axolotl_medusa import cpu_instructions

CPUINFO = Path("/proc/cpuinfo")


def test_cpu_name_is_the_first_that_linux_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_instructions, "_CPUINFO", tmp_path / "cpuinfo")
    assert cpu_instructions.cpu_name() is None
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU: 2\nmodel name\t: Other\n")
    assert cpu_instructions.cpu_name() == "Some CPU: 2"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n")
    assert cpu_instructions.cpu_name() is None


@pytest.mark.skipif(platform.machine() != "x86_64" or not CPUINFO.exists(), reason="reads the flags of an x86 CPU")
def test_multiplies_bf16_where_onednn_has_instructions_for_it():
    """Fails if torch drops the operator that is asked."""
    flags = set(CPUINFO.read_text().split("flags")[1].split("\n")[0].split())
    expected = {"avx512bw", "avx512vl", "avx512dq"} <= flags or "avx_ne_convert" in flags
    assert cpu_instructions.multiplies_bf16() == expected


def test_multiplies_bf16_not_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert cpu_instructions.multiplies_bf16.__wrapped__() is False
