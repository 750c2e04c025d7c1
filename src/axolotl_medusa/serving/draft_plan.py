"""What a drafter knows about heads and a machine before it serves: two JSON files beside the heads.

Contract: formats alone; measures nothing, decides nothing, and imports neither torch nor transformers. `draft_calibration.json`
says how often a draft of a given probability is accepted, `plan.json` how long steps take on the machine that it was
measured on. A key of `plan.json` that is not named here belongs to whoever wrote it and is kept as it is.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axolotl_medusa.model.json_files import read_json

CALIBRATION_FILE = "draft_calibration.json"
PLAN_FILE = "plan.json"
FORMAT = 1
"""Of both files; another number is another format."""

EDGES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Bins of a probability: narrow where most drafts of weak heads are."""

_PRIOR_DRAFTS = 5.0
"""A bin begins as if that many drafts had been accepted as often as their probability says."""
_OWN_KEYS = ("format", "step_s", "heads_s")


@dataclass(frozen=True)
class HeadCalibration:
    """How often drafts of one head are accepted, given that those before them are.

    Attributes:
        edges: Edges of the bins of the head's probability, ascending from 0 to 1; a bin has its lower edge.
        acceptance: Share accepted in each bin, one less than there are edges.
        drafts: Drafts that each share was counted on; 0 where it is only what the probability says.
    """

    edges: tuple[float, ...]
    acceptance: tuple[float, ...]
    drafts: tuple[int, ...]

    def __post_init__(self) -> None:
        ascending = all(low < high for low, high in itertools.pairwise(self.edges))
        if len(self.edges) < 2 or not ascending or (self.edges[0], self.edges[-1]) != (0.0, 1.0):
            raise ValueError(f"edges are {list(self.edges)}, expected ascending numbers from 0 to 1")
        if len(self.acceptance) != len(self.edges) - 1 or len(self.drafts) != len(self.acceptance):
            raise ValueError(
                f"{len(self.edges)} edges come with {len(self.acceptance)} shares and {len(self.drafts)} counts, expected one "
                "less of both"
            )
        if not all(0.0 <= share <= 1.0 for share in self.acceptance):
            raise ValueError(f"acceptance is {list(self.acceptance)}, expected shares from 0 to 1")

    def accepted(self, probability: float) -> float:
        """Probability that a draft of that probability is accepted."""
        return self.acceptance[min(bisect_right(self.edges, probability), len(self.acceptance)) - 1]


@dataclass(frozen=True)
class Calibration:
    """The calibration of every head.

    Attributes:
        heads: Head by head, from 0.
        facts: What it was measured on: prompts, tokens, temperature.
    """

    heads: tuple[HeadCalibration, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepTimes:
    """Seconds by a number of tokens.

    Attributes:
        seconds: By tokens, ascending: of a whole step by the tokens in its batch, or of the heads by the rows that they guess at.
    """

    seconds: Mapping[int, float]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError("found no times, expected seconds by a number of tokens")
        for tokens, seconds in self.seconds.items():
            if tokens < 1 or not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"{tokens} tokens take {seconds} s, expected at least 1 token and more than 0 s")


@dataclass(frozen=True)
class DraftPlan:
    """What both files say; all of it may be missing.

    Attributes:
        calibration: From `draft_calibration.json`.
        step_times: Steps by tokens in the batch.
        heads_times: The heads by rows: requests times heads.
        rest: The other keys of `plan.json`.
    """

    calibration: Calibration | None = None
    step_times: StepTimes | None = None
    heads_times: StepTimes | None = None
    rest: Mapping[str, Any] = field(default_factory=dict)


def calibrate(outcomes: Iterable[Sequence[tuple[float, bool]]], **facts: Any) -> Calibration:
    """Counts outcomes into a calibration.

    Args:
        outcomes: Of each head in turn, probability and acceptance of drafts whose predecessors were accepted.
        **facts: What they were measured on.
    """
    return Calibration(tuple(_counted(head) for head in outcomes), facts)


def _counted(outcomes: Sequence[tuple[float, bool]]) -> HeadCalibration:
    bins = len(EDGES) - 1
    drafts, accepted, probabilities = [0] * bins, [0] * bins, [0.0] * bins
    for probability, good in outcomes:
        place = min(bisect_right(EDGES, probability), bins) - 1
        drafts[place] += 1
        accepted[place] += good
        probabilities[place] += probability
    shares = []
    for place, count in enumerate(drafts):
        middle = probabilities[place] / count if count else (EDGES[place] + EDGES[place + 1]) / 2
        shares.append(min(1.0, (accepted[place] + _PRIOR_DRAFTS * middle) / (count + _PRIOR_DRAFTS)))
    return HeadCalibration(EDGES, tuple(shares), tuple(drafts))


def uncalibrated(num_heads: int) -> Calibration:
    """The calibration of heads that nobody has measured: drafts are accepted as often as their probability says."""
    return calibrate([()] * num_heads)


def read_plan(heads_dir: str | Path) -> DraftPlan:
    """Reads both files of a heads directory; what is not there is None.

    Raises:
        ValueError: A file is damaged or of another format.
    """
    calibration_file, plan_file = Path(heads_dir) / CALIBRATION_FILE, Path(heads_dir) / PLAN_FILE
    calibration = _calibration(calibration_file) if calibration_file.is_file() else None
    if not plan_file.is_file():
        return DraftPlan(calibration)
    content = _of_our_format(plan_file)
    steps, heads = (_times(content.get(key), plan_file, key) for key in ("step_s", "heads_s"))
    rest = {key: value for key, value in content.items() if key not in _OWN_KEYS}
    return DraftPlan(calibration, steps, heads, rest)


def write_plan(
    heads_dir: str | Path,
    *,
    calibration: Calibration | None = None,
    step_times: StepTimes | None = None,
    heads_times: StepTimes | None = None,
    **rest: Any,
) -> list[Path]:
    """Writes what is given, each file whole or not at all; what is not given stays as it is on disk.

    Args:
        heads_dir: The heads directory.
        calibration: For `draft_calibration.json`.
        step_times: For `plan.json`.
        heads_times: For `plan.json`.
        **rest: Other keys of `plan.json`.

    Returns:
        The files that were written.
    """
    directory, written = Path(heads_dir), []
    if calibration is not None:
        heads = [
            {"edges": list(head.edges), "acceptance": list(head.acceptance), "drafts": list(head.drafts)}
            for head in calibration.heads
        ]
        _write(directory / CALIBRATION_FILE, {"format": FORMAT, **calibration.facts, "heads": heads})
        written.append(directory / CALIBRATION_FILE)
    if step_times is not None or heads_times is not None or rest:
        file = directory / PLAN_FILE
        content = _of_our_format(file) if file.is_file() else {}
        times = {"step_s": step_times, "heads_s": heads_times}
        content |= {key: _by_tokens(value) for key, value in times.items() if value is not None}
        _write(file, {**content, **rest, "format": FORMAT})
        written.append(file)
    return written


def _by_tokens(times: StepTimes) -> dict[str, float]:
    return {str(tokens): times.seconds[tokens] for tokens in sorted(times.seconds)}


def _of_our_format(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if content.get("format") != FORMAT:
        raise ValueError(f"{file} has format {content.get('format')!r}, expected {FORMAT}: write it again")
    return content


def _calibration(file: Path) -> Calibration:
    content = _of_our_format(file)
    try:
        heads = tuple(
            HeadCalibration(tuple(head["edges"]), tuple(head["acceptance"]), tuple(head["drafts"]))
            for head in content["heads"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}): write it again with `axolotl-medusa calibrate`") from error
    return Calibration(heads, {key: value for key, value in content.items() if key not in ("format", "heads")})


def _times(content: Any, file: Path, key: str) -> StepTimes | None:
    if content is None:
        return None
    try:
        seconds = {int(tokens): float(value) for tokens, value in content.items()}
        return StepTimes(dict(sorted(seconds.items())))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: {key} is damaged ({error}): write it again with `axolotl-medusa plan`") from error


def _write(file: Path, content: Mapping[str, Any]) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(file)
