"""How often drafts are accepted, learnt while serving.

Contract: numbers alone. A calibration is the start; every verified draft counts into it, the older ones less and less.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from axolotl_medusa.serving.draft_plan import Calibration, HeadCalibration

_START_DRAFTS = 32.0
"""Verified drafts that the start of a bin weighs as much as, at most: what it was counted on, where that is less."""
_UNCOUNTED = 8.0
"""The same where the start was not counted on anything."""
_REMEMBERED = 1024.0
"""Verified drafts of a bin after which all of them count half."""


class Acceptance:
    """Learns the share of accepted drafts by head and probability.

    Args:
        start: What is known before the first draft.
        num_heads: Heads that draft.

    Raises:
        ValueError: The calibration knows fewer heads.
    """

    def __init__(self, start: Calibration, num_heads: int) -> None:
        if len(start.heads) < num_heads:
            raise ValueError(
                f"the calibration has {len(start.heads)} heads, expected {num_heads}: run `axolotl-medusa calibrate` again"
            )
        self._start = start.heads[:num_heads]
        self._edges = [torch.tensor(head.edges[1:-1], dtype=torch.float32) for head in self._start]
        self._tried = [[0.0] * len(head.acceptance) for head in self._start]
        self._good = [[0.0] * len(head.acceptance) for head in self._start]

    def bins(self, probabilities: Tensor) -> Tensor:
        """The bin of each probability, `[requests, heads]` of both."""
        by_head = probabilities.t().contiguous()
        return torch.stack(
            [torch.bucketize(own, edges, right=True) for own, edges in zip(by_head, self._edges, strict=False)], 1
        )

    def shares(self, *, hopeful: bool = False) -> list[Tensor]:
        """Of each head the share accepted by bin, fp64; `hopeful`: a standard deviation above what was counted."""
        return [torch.tensor(self._shares(head, hopeful), dtype=torch.float64) for head in range(len(self._start))]

    def _shares(self, head: int, hopeful: bool = False) -> list[float]:
        start, tried, good = self._start[head], self._tried[head], self._good[head]
        found = []
        for place, share in enumerate(start.acceptance):
            weight = min(_START_DRAFTS, max(_UNCOUNTED, start.drafts[place]))
            counted = weight + tried[place]
            mean = (weight * share + good[place]) / counted
            found.append(min(1.0, mean + math.sqrt(mean * (1.0 - mean) / counted)) if hopeful else mean)
        return found

    def learn(self, bins: list[int], verified: int, accepted: int) -> None:
        """Counts what became of a request's drafts.

        Args:
            bins: Of the drafts, place by place.
            verified: How many of them were verified.
            accepted: How many of these were accepted; the first that was not is the last that says anything.
        """
        for head in range(min(verified, accepted + 1, len(bins))):
            place = bins[head]
            self._tried[head][place] += 1.0
            self._good[head][place] += head < accepted
            if self._tried[head][place] >= _REMEMBERED:
                self._tried[head][place] /= 2.0
                self._good[head][place] /= 2.0

    def calibration(self) -> Calibration:
        """What is known now."""
        heads = []
        for head, start in enumerate(self._start):
            counted = tuple(before + int(tried) for before, tried in zip(start.drafts, self._tried[head], strict=True))
            heads.append(HeadCalibration(start.edges, tuple(self._shares(head)), counted))
        return Calibration(tuple(heads))
