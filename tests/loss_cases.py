"""Losses that the fast forms are held to, and how closely."""

from __future__ import annotations

import torch
from conftest import DEVICE

from axolotl_medusa.losses.cross_entropy_and_kl import LossWeights
from axolotl_medusa.losses.prediction import OutputLayer

ROWS, HIDDEN, VOCAB = 23, 6, 37


RTOL, ATOL = 1e-5, 1e-6  # fp32 rounding of the same sums in another order


LOSSES = {
    "ce": LossWeights(),
    "weighted-ce": LossWeights(cross_entropy=0.3),
    "own-softmax": LossWeights(own_softmax=0.4),
    "kl": LossWeights(cross_entropy=0.0, kl=1.0),
    "all-terms": LossWeights(cross_entropy=0.7, kl=1.3, own_softmax=0.25),
    "tv": LossWeights(cross_entropy=0.0, tv=1.0),
    "lk": LossWeights(cross_entropy=0.0, lk=1.0),
    "every-term": LossWeights(cross_entropy=0.7, kl=0.4, own_softmax=0.25, tv=0.6, lk=0.8),
}


def output_layer(linear, project=None, dtype=torch.float32) -> OutputLayer:
    """A layer as the objective describes it: only one without bias is a mere matmul."""
    weight = linear.weight if linear.bias is None else None
    return OutputLayer(project or linear, linear.out_features, list(linear.parameters()), weight, dtype)


def peak_bytes(work) -> int:
    """The most memory that tensors made by `work` took at one time."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
