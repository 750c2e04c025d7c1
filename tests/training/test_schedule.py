"""Schedules against formulas."""

from __future__ import annotations

import math

import pytest

from axolotl_medusa.training.schedule import scheduler_factor


@pytest.mark.parametrize(
    ("shape", "ramp", "values"),
    [
        ("constant", 1.0, {0.0: 1.0, 0.3: 1.0, 1.0: 1.0}),
        ("linear", 1.0, {0.0: 0.0, 0.25: 0.25, 1.0: 1.0}),
        ("sine", 1.0, {0.0: 0.0, 1 / 3: 0.5, 0.5: math.sqrt(0.5), 1.0: 1.0}),
        ("sine", 0.4, {0.0: 0.0, 0.2: math.sqrt(0.5), 0.4: 1.0, 0.7: 1.0, 1.0: 1.0}),
    ],
)
def test_scheduler_factor_at_ends_middle_and_plateau(shape, ramp, values):
    for progress, expected in values.items():
        assert scheduler_factor(shape, ramp, progress) == pytest.approx(expected)


@pytest.mark.parametrize("shape", ["cosine", "Sine", "sine_0.5", ""])
def test_scheduler_factor_unknown_shape_is_an_error(shape):
    with pytest.raises(ValueError, match=f"shape is '{shape}': expected constant, linear or sine"):
        scheduler_factor(shape, 1.0, 0.5)
