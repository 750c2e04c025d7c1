"""What is learnt of acceptance: bins of probabilities, drafts after a rejected one say nothing, old ones fade."""

from __future__ import annotations

import random

import pytest
import torch

from axolotl_medusa.serving.draft_acceptance import Acceptance
from axolotl_medusa.serving.draft_plan import EDGES, calibrate, uncalibrated


def test_bins_are_those_of_the_calibration():
    acceptance = Acceptance(uncalibrated(1), 1)
    probabilities = torch.tensor([[0.0], [0.0199], [0.02], [0.55], [0.9], [1.0]])
    assert acceptance.bins(probabilities)[:, 0].tolist() == [
        0,
        0,
        1,
        EDGES.index(0.5),
        EDGES.index(0.9),
        EDGES.index(0.9),
    ]


def test_calibration_is_the_start():
    calibration = calibrate([[(0.95, True)] * 100, [(0.95, False)] * 100])
    first, second = Acceptance(calibration, 2).shares()
    place = EDGES.index(0.9)
    assert first[place] == pytest.approx(calibration.heads[0].accepted(0.95))
    assert second[place] == pytest.approx(calibration.heads[1].accepted(0.95))


def test_calibration_of_fewer_heads_is_refused():
    with pytest.raises(ValueError, match=r"has 2 heads, expected 3: run `axolotl-medusa calibrate` again"):
        Acceptance(uncalibrated(2), 3)


def test_drafts_after_a_rejected_one_say_nothing():
    acceptance = Acceptance(uncalibrated(3), 3)
    acceptance.learn([5, 5, 5], verified=3, accepted=1)
    assert [head.drafts[5] for head in acceptance.calibration().heads] == [1, 1, 0]


def test_drafts_that_were_not_verified_say_nothing():
    acceptance = Acceptance(uncalibrated(3), 3)
    acceptance.learn([5, 5, 5], verified=1, accepted=1)
    assert [head.drafts[5] for head in acceptance.calibration().heads] == [1, 0, 0]


def test_shares_come_to_what_is_accepted_and_follow_when_it_changes():
    generator, acceptance = random.Random(0), Acceptance(calibrate([[(0.95, True)] * 500]), 1)
    place = EDGES.index(0.9)
    for rate in (0.3, 0.8):
        for _ in range(4000):
            acceptance.learn([place], 1, int(generator.random() < rate))
        assert float(acceptance.shares()[0][place]) == pytest.approx(rate, abs=0.06)  # 3 sigma of 512 drafts
