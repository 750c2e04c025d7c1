"""The files beside the heads that say how often drafts are accepted and how long steps take."""

from __future__ import annotations

import json

import pytest

from axolotl_medusa.serving.draft_plan import (
    CALIBRATION_FILE,
    EDGES,
    PLAN_FILE,
    HeadCalibration,
    StepTimes,
    calibrate,
    read_plan,
    uncalibrated,
    write_plan,
)


def test_what_is_written_is_read_again(tmp_path):
    calibration = calibrate([[(0.95, True), (0.01, False)], [(0.5, True)]], prompts=3)
    steps, heads = StepTimes({1: 0.05, 2: 0.06, 16: 0.2}), StepTimes({5: 0.01})
    written = write_plan(tmp_path, calibration=calibration, step_times=steps, heads_times=heads, best={"1": "adaptive"})
    assert [file.name for file in written] == [CALIBRATION_FILE, PLAN_FILE]
    plan = read_plan(tmp_path)
    assert (plan.calibration, plan.step_times, plan.heads_times) == (calibration, steps, heads)
    assert plan.rest == {"best": {"1": "adaptive"}}


def test_directory_without_the_files_has_no_plan(tmp_path):
    plan = read_plan(tmp_path)
    assert (plan.calibration, plan.step_times, plan.heads_times, plan.rest) == (None, None, None, {})


def test_writing_a_part_keeps_the_rest(tmp_path):
    write_plan(tmp_path, step_times=StepTimes({1: 0.1}), note="of the user's")
    write_plan(tmp_path, heads_times=StepTimes({3: 0.2}))
    plan = read_plan(tmp_path)
    assert plan.step_times == StepTimes({1: 0.1})
    assert plan.heads_times == StepTimes({3: 0.2})
    assert plan.rest == {"note": "of the user's"}
    assert not (tmp_path / CALIBRATION_FILE).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [PLAN_FILE]


def test_calibration_counts_what_was_accepted_in_each_bin():
    (head,) = calibrate([[(0.65, True)] * 150 + [(0.65, False)] * 50 + [(1.0, True)] * 10]).heads
    assert head.accepted(0.65) == pytest.approx(0.75, abs=0.01)
    assert head.accepted(1.0) == 1.0
    assert head.drafts[EDGES.index(0.6)] == 200
    assert head.accepted(0.15) == pytest.approx(0.15)  # nothing counted: what the probability says


def test_uncalibrated_heads_are_taken_at_their_word():
    calibration = uncalibrated(2)
    assert len(calibration.heads) == 2
    for probability in (0.0, 0.33, 0.97, 1.0):
        assert calibration.heads[1].accepted(probability) == pytest.approx(probability, abs=0.06)


@pytest.mark.parametrize(
    ("edges", "acceptance", "found"),
    [
        ((0.0, 0.5), (0.1,), "expected ascending numbers from 0 to 1"),
        ((0.0, 0.5, 0.5, 1.0), (0.1, 0.2, 0.3), "expected ascending"),
        ((0.0, 1.0), (0.1, 0.2), "expected one less"),
        ((0.0, 1.0), (1.5,), "expected shares"),
    ],
)
def test_damaged_bins_are_refused(edges, acceptance, found):
    with pytest.raises(ValueError, match=found):
        HeadCalibration(edges, acceptance, (0,) * len(acceptance))


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        (CALIBRATION_FILE, {"format": 2, "heads": []}, "has format 2, expected 1"),
        (CALIBRATION_FILE, {"format": 1, "heads": [{"edges": [0, 1]}]}, "is damaged .*calibrate"),
        (CALIBRATION_FILE, {"format": 1, "heads": 3}, "is damaged"),
        (PLAN_FILE, {"format": 1, "step_s": {"1": -1}}, "step_s is damaged .*plan"),
        (PLAN_FILE, {"format": 1, "heads_s": {"a": 1}}, "heads_s is damaged"),
        (PLAN_FILE, {"format": 1, "heads_s": [1]}, "heads_s is damaged"),
        (PLAN_FILE, {}, "has format None"),
    ],
)
def test_damaged_files_end_in_one_line(tmp_path, file, content, found):
    (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=found) as error:
        read_plan(tmp_path)
    assert "\n" not in str(error.value)
