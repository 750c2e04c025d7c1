"""Seconds by tokens: what is measured replaces a plan, never falls with more tokens, and goes on as it rose."""

from __future__ import annotations

import pytest
import torch

from axolotl_medusa.serving import draft_prices
from axolotl_medusa.serving.draft_plan import StepTimes
from axolotl_medusa.serving.draft_prices import TimeTable, seconds_up_to


def table(measured, start=None):
    times = TimeTable(start)
    for tokens, seconds in measured:
        times.add(tokens, seconds)
    return times


def test_nothing_measured_is_no_times():
    assert TimeTable().times() is None
    assert TimeTable().measured_from() is None


def test_median_counts_so_that_a_hiccup_does_not():
    assert table([(4, 1.0), (4, 1.0), (4, 60.0)]).times().seconds == {4: 1.0}


def test_number_of_tokens_is_known_after_two_measurements():
    times = table([(4, 1.0)])
    assert times.measured_from() is None
    times.add(4, 1.0)
    times.add(9, 1.0)
    assert times.measured_from() == 4


def test_old_measurements_give_way_to_new_ones():
    times = table([(4, 1.0)] * 16)
    for _ in range(16):
        times.add(4, 2.0)
    assert times.times().seconds == {4: 2.0}


def test_number_that_was_not_measured_for_long_is_forgotten(monkeypatch):
    monkeypatch.setattr(draft_prices, "_FRESH", 10)
    times = table([(8, 5.0), (8, 5.0), *[(2, 1.0)] * 10])
    assert times.times().seconds == {2: 1.0}


def test_seconds_never_fall_with_more_tokens():
    seconds = table([(1, 1.0), (2, 3.0), (3, 1.0), (4, 4.0)]).times().seconds
    assert seconds == {1: 1.0, 2: 2.0, 3: 2.0, 4: 4.0}


def test_plan_is_the_start_where_nothing_is_measured_and_scaled_to_the_machine():
    times = TimeTable(StepTimes({1: 1.0, 4: 2.0}))
    assert (times.times().seconds, times.measured_from()) == ({1: 1.0, 4: 2.0}, 1)
    times.add(1, 3.0)
    assert times.times().seconds == {1: 3.0, 4: 6.0}


def test_large_numbers_near_each_other_are_one():
    times = table([(1000, 1.0), (1010, 2.0), (1020, 3.0)])
    assert times.times().seconds == {1010: 2.0}


def test_seconds_between_and_beyond_what_is_known():
    found = seconds_up_to(StepTimes({2: 1.0, 4: 2.0, 8: 6.0}), 10)
    expected = torch.tensor([1.0, 1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_single_known_number_holds_for_all():
    assert seconds_up_to(StepTimes({3: 0.5}), 4).tolist() == [0.5] * 5


def test_slope_beyond_is_not_that_of_two_neighbours():
    """Neighbours differ by noise; here the last two would say that tokens are free."""
    found = seconds_up_to(StepTimes({8: 1.0, 15: 2.0, 16: 2.0}), 24)
    assert float(found[24]) == pytest.approx(3.0)
