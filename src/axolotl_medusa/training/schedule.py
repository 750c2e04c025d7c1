"""How the weight of the heads' losses changes over training (`medusa_scheduler`).

Contract: pure functions; imports nothing.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple


class Schedule(NamedTuple):
    """A `medusa_scheduler` taken apart.

    Attributes:
        shape: `constant`, `linear` or `sine`.
        ramp: Fraction R of the training after which a sine has reached 1, in (0, 1].
    """

    shape: str
    ramp: float


def parse_schedule(text: str) -> Schedule:
    """Takes a `medusa_scheduler` apart: the one place that knows how it is written.

    Raises:
        ValueError: It is none; the message says what was expected.
    """
    match = re.fullmatch(r"(constant|linear|sine)|sine_(\d*\.?\d+)", text)
    if match and match.group(1):
        return Schedule(match.group(1), 1.0)
    if match and 0.0 < float(match.group(2)) <= 1.0:
        return Schedule("sine", float(match.group(2)))
    raise ValueError(
        f"medusa_scheduler is {text!r}: expected constant, linear, sine, or sine_R with 0 < R <= 1 "
        "(sine_0.5 reaches the full coefficient after half of the training)"
    )


def scheduler_factor(shape: str, ramp: float, progress: float) -> float:
    """Factor on the heads' coefficient at a fraction of the training.

    `constant`: 1. `linear`: progress. `sine`: sin(π/2 · progress / ramp) up to the fraction `ramp`, then 1 (schedules of
    the first public Medusa trainer).

    Args:
        shape: Shape of the schedule.
        ramp: Fraction of the optimizer steps over which a sine rises, in (0, 1].
        progress: Fraction of the optimizer steps done, in [0, 1].

    Raises:
        ValueError: The shape is not known.
    """
    if shape == "constant":
        return 1.0
    if shape == "linear":
        return progress
    if shape == "sine":
        return math.sin(math.pi / 2 * min(1.0, progress / ramp))
    raise ValueError(f"the schedule's shape is {shape!r}: expected constant, linear or sine")
