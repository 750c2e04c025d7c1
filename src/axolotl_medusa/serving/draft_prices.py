"""Seconds by a number of tokens, learnt while serving.

Contract: numbers alone. What a plan says is the start; what is measured takes its place. Between measured numbers seconds are
interpolated, they never fall with more tokens, and beyond the largest one they go on rising as they did before it.
"""

from __future__ import annotations

import statistics
from collections import deque

import torch
from torch import Tensor

from axolotl_medusa.serving.draft_plan import StepTimes

_KEPT = 16
"""Measurements kept of a number of tokens; their median counts, so that a hiccup of the machine does not."""
_ENOUGH = 2
"""Measurements after which a number of tokens is known."""
_FRESH = 4096
"""Measurements of any number of tokens, after which one that was not made again is forgotten."""
_PER_OCTAVE = 8
"""Numbers of tokens that are told apart between one and its double; below 16 all are."""
_SLOPE_FROM = 0.75
"""Beyond the largest number the slope is that from the largest one below this part of it."""


class TimeTable:
    """Learns how long something takes by its number of tokens.

    Args:
        start: What a plan says, None without one.
    """

    def __init__(self, start: StepTimes | None = None) -> None:
        self._planned = dict(start.seconds) if start else {}
        self._measured: dict[int, deque[tuple[int, float]]] = {}
        self._newest: dict[int, int] = {}
        self._count = 0

    def add(self, tokens: int, seconds: float) -> None:
        """Takes a measurement in."""
        place = _bucket(tokens)
        self._measured.setdefault(place, deque(maxlen=_KEPT)).append((tokens, seconds))
        self._count += 1
        self._newest[place] = self._count

    def measured_from(self) -> int | None:
        """The smallest number of tokens that was measured often enough and not too long ago, or that a plan names."""
        known = [place for place, values in self._fresh().items() if len(values) >= _ENOUGH]
        return min([*known, *self._planned], default=None)

    def times(self) -> StepTimes | None:
        """What is known, None where nothing is; seconds never fall with more tokens."""
        measured = {place: _middle(values) for place, values in self._fresh().items()}
        planned = self._planned_now(measured)
        points = sorted(measured.values()) + sorted(planned.items())
        return StepTimes(_rising(sorted(points))) if points else None

    def _fresh(self) -> dict[int, deque[tuple[int, float]]]:
        return {place: values for place, values in self._measured.items() if self._count - self._newest[place] < _FRESH}

    def _planned_now(self, measured: dict[int, tuple[float, float]]) -> dict[float, float]:
        """The plan's seconds where nothing is measured, slower or faster by as much as the machine is elsewhere."""
        planned: dict[int, tuple[int, float]] = {_bucket(tokens): (tokens, s) for tokens, s in self._planned.items()}
        shared = planned.keys() & measured.keys()
        ratio = statistics.median(measured[place][1] / planned[place][1] for place in shared) if shared else 1.0
        return {float(tokens): s * ratio for place, (tokens, s) in planned.items() if place not in measured}


def _bucket(tokens: int) -> int:
    step = 1 << max(0, tokens.bit_length() - 1 - (_PER_OCTAVE.bit_length() - 1))
    return tokens // step * step


def _middle(values: deque[tuple[int, float]]) -> tuple[float, float]:
    return statistics.mean(tokens for tokens, _ in values), statistics.median(seconds for _, seconds in values)


def _rising(points: list[tuple[float, float]]) -> dict[int, float]:
    """Joins neighbours that fall into their mean until none does."""
    groups: list[list[tuple[float, float]]] = []
    for point in points:
        groups.append([point])
        while len(groups) > 1 and _mean(groups[-2]) > _mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return {round(tokens): _mean(group) for group in groups for tokens, _ in group}


def _mean(group: list[tuple[float, float]]) -> float:
    return statistics.mean(seconds for _, seconds in group)


def seconds_up_to(times: StepTimes, largest: int) -> Tensor:
    """Seconds of 0 to `largest` tokens, fp64 `[largest + 1]`; those of 0 are those of the smallest number that is known."""
    tokens = torch.tensor([float(known) for known in times.seconds], dtype=torch.float64)
    seconds = torch.tensor(list(times.seconds.values()), dtype=torch.float64)
    wanted = torch.arange(largest + 1, dtype=torch.float64)
    if len(tokens) == 1:
        return seconds.expand(largest + 1).clone()
    right = torch.searchsorted(tokens, wanted).clamp(1, len(tokens) - 1)
    low, high = tokens[right - 1], tokens[right]
    share = ((wanted - low) / (high - low)).clamp(0.0, 1.0)
    between = seconds[right - 1] + share * (seconds[right] - seconds[right - 1])
    return between + (wanted - tokens[-1]).clamp_min(0.0) * _last_slope(tokens, seconds)


def _last_slope(tokens: Tensor, seconds: Tensor) -> float:
    before = int((tokens <= _SLOPE_FROM * tokens[-1]).sum()) - 1
    before = before if before >= 0 else 0
    return float((seconds[-1] - seconds[before]) / (tokens[-1] - tokens[before]))
