"""What `benchmarks.train_step` finds out about a training step, whatever takes the single measurements.

Contract: without torch, see cases.py.
"""

from __future__ import annotations

from typing import Any, Protocol

from benchmarks.train_step.cases import Case, Side

Result = dict[str, Any]
SIDES: tuple[Side, ...] = ("ours", "reference")
SPARE_MIB = 1024.0
"""Left free when both sides are in memory."""
DOES_NOT_FIT = "does_not_fit"


class Measure(Protocol):
    """Takes one measurement of some sides of a case; `{DOES_NOT_FIT: True}` where memory is too little."""

    def __call__(self, what: str, case: Case, sides: tuple[Side, ...] = ..., rounds: int = ...) -> Result:
        """Takes it: `memory` of one side, or `time` of all of them in alternation."""


def measured_step(case: Case, rounds: int, measure: Measure) -> Result:
    """Peak memory of both sides, then their times; the reference's only where it fits beside our side."""
    peaks = {side: measure("memory", case, (side,)) for side in SIDES}
    result: Result = {"batch": case.batch, "seq": case.seq, "heads": case.heads, "memory_mib": peaks}
    ours, reference = peaks["ours"], peaks["reference"]
    if DOES_NOT_FIT in ours:
        return result | ours
    if DOES_NOT_FIT not in reference:
        above = [side["peak"] - side["runtime"] for side in (ours, reference)]
        result["memory_ratio"] = round(above[0] / above[1], 3)
        result["memory_ratio_with_runtime"] = round(ours["peak"] / reference["peak"], 3)
        beside = ours["after_steps"] - ours["model"]  # the backbone's weights and the runtime are there once
        if beside + reference["peak"] + SPARE_MIB <= ours["available"]:
            times = measure("time", case, SIDES, rounds)
            if DOES_NOT_FIT not in times:
                return result | times
    return result | measure("time", case, ("ours",), rounds)
