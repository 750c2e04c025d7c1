"""Which kernels take a GPU's time in a piece of work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "attention": ("flash", "fmha", "attention"),
    "matmul": ("gemm", "nvjet", "cutlass", "cublas", "splitk"),
    "liger cross-entropy": ("liger",),
    "optimizer": ("adam", "multi_tensor_apply", "koptimizer", "blockwise"),
    "softmax": ("softmax",),
    "top-k": ("topk", "sort", "radix"),
    "dropout": ("dropout",),
    "reduction": ("reduce",),
    "copy and fill": ("memcpy", "memset", "copy", "fill", "catarray"),
    "elementwise": ("elementwise",),
}
"""Kinds of kernels by parts of their names in lower case; the first that fits counts."""

LARGEST = 12


def kind_of(kernel: str) -> str:
    """The kind of a kernel, `other` for unknown ones."""
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def gpu_kernels(work: Callable[[], object]) -> dict[str, Any]:
    """Milliseconds of GPU time by kind and of the kernels that take most, of one run after a first that warms up."""
    work()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
        torch.cuda.synchronize()
    return summary([(event.key, event.self_device_time_total / 1000, event.count) for event in profiled.key_averages()])


def summary(kernels: list[tuple[str, float, int]]) -> dict[str, Any]:
    """Sums by kind, and the largest; each kernel is a name, milliseconds and a count."""
    kinds: dict[str, float] = defaultdict(float)
    for name, milliseconds, _ in kernels:
        kinds[kind_of(name)] += milliseconds
    ordered = sorted(kernels, key=lambda kernel: -kernel[1])[:LARGEST]
    return {
        "total_ms": round(sum(kinds.values()), 2),
        "kinds_ms": {kind: round(value, 2) for kind, value in sorted(kinds.items(), key=lambda each: -each[1])},
        "largest": [{"kernel": name[:160], "ms": round(value, 2), "calls": count} for name, value, count in ordered],
    }
