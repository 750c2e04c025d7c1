"""What vLLM counts about drafts, read from its `/metrics`.

Contract: text in, numbers out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

_LINE = re.compile(r"(?m)^vllm:([\w:]+?)(?:\{([^}]*)\})? ([-+.\deE]+|NaN|\+Inf)$")
_PLACE = re.compile(r'position="(\d+)"')


@dataclass(frozen=True)
class Counters:
    """What a server has counted since it started, all of its engines together.

    Attributes:
        speculates: Whether it counts drafts at all.
        drafts: Drafts that were verified, one per request and step that had any.
        draft_tokens: Tokens in them.
        accepted: Accepted tokens by place, from 0.
        generated: Tokens that were generated for anybody.
        steps: Steps of the engine.
    """

    speculates: bool
    drafts: float
    draft_tokens: float
    accepted: tuple[float, ...]
    generated: float
    steps: float

    def since(self, earlier: Counters) -> Counters:
        """What was counted after `earlier`."""
        accepted = tuple(now - before for now, before in zip(self.accepted, earlier.accepted, strict=False))
        return Counters(
            self.speculates,
            self.drafts - earlier.drafts,
            self.draft_tokens - earlier.draft_tokens,
            accepted,
            self.generated - earlier.generated,
            self.steps - earlier.steps,
        )

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per draft that was verified, None without any."""
        return 1 + sum(self.accepted) / self.drafts if self.drafts else None


def read_counters(metrics: str) -> Counters:
    """Reads the text of `/metrics`."""
    totals: defaultdict[str, float] = defaultdict(float)
    accepted: defaultdict[int, float] = defaultdict(float)
    for name, labels, value in _LINE.findall(metrics):
        totals[name] += float(value)
        place = _PLACE.search(labels)
        if name == "spec_decode_num_accepted_tokens_per_pos_total" and place:
            accepted[int(place[1])] += float(value)
    return Counters(
        speculates="spec_decode_num_drafts_total" in totals,
        drafts=totals["spec_decode_num_drafts_total"],
        draft_tokens=totals["spec_decode_num_draft_tokens_total"],
        accepted=tuple(accepted[place] for place in range(max(accepted, default=-1) + 1)),
        generated=totals["generation_tokens_total"],
        steps=totals["iteration_tokens_total_count"],
    )
