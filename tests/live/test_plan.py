"""The order in which settings are measured, what is made of the figures, and what is advised."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from axolotl_medusa.live import plan
from axolotl_medusa.live.advice import advice, draw_speed_ups, speed_ups
from axolotl_medusa.live.counters import Counters
from axolotl_medusa.live.load import Answer, Load
from axolotl_medusa.live.plan import Figures, Setting, measure
from axolotl_medusa.measuring.plots import save_plot

QUESTIONS = ["a", "b", "c"]


class World:
    """Servers whose speed is told, and everything that happened to them, in order."""

    def __init__(self, monkeypatch, speed, text=lambda name, question: question):
        self.events, self.running, self.round_of = [], None, dict[str, int]()
        self.speed, self.text = speed, text
        monkeypatch.setattr(plan, "run_load", self.load)
        monkeypatch.setattr(plan, "Server", lambda url: self)
        self.url, self.model, self.drafts = "http://fake", "fake", 0.0

    def setting(self, name):
        @contextmanager
        def start():
            assert self.running is None, "one server at a time"
            self.running = name
            self.round_of[name] = self.round_of.get(name, -1) + 1
            self.events.append(f"start {name}")
            yield f"http://{name}"
            self.running = None

        return Setting(name, start)

    def counters(self):
        self.drafts += 10.0 if self.running != "plain" else 0.0
        return Counters(True, self.drafts, 2 * self.drafts, (0.4 * self.drafts, 0.1 * self.drafts), 0.0, 0.0)

    def load(self, url, model, questions, concurrency, max_tokens):
        self.events.append((self.running, concurrency, len(questions), max_tokens))
        rate = self.speed(self.running, concurrency, self.round_of[self.running])
        texts = [Answer(self.text(self.running, question), 10, 0.5, 1.4) for question in questions]
        return Load(concurrency, tuple(texts), 10 * len(questions) / rate)


@pytest.fixture
def world(monkeypatch):
    def make(speed=lambda name, requests, round_: 100.0, **options):
        return World(monkeypatch, speed, **options)

    return make


def measured(world, names=("plain", "k = 1", "adaptive"), levels=(1, 8), repeats=3, **options):
    settings = [world.setting(name) for name in names]
    return measure(settings, QUESTIONS, levels, 16, repeats, lambda line: None, **options)


def test_settings_take_turns_and_every_round_begins_with_the_next(world):
    here, after = world(), []
    measured(here, after_first_round_of=lambda name: after.append((name, here.running)))
    started = [event.removeprefix("start ") for event in here.events if isinstance(event, str)]
    assert started == ["plain", "k = 1", "adaptive", "k = 1", "adaptive", "plain", "adaptive", "plain", "k = 1"]
    assert after == [("plain", None), ("k = 1", None), ("adaptive", None)]


def test_every_server_is_warmed_up_before_it_counts(world):
    here = world()
    found = measured(here, names=("plain",), repeats=1)
    assert here.events == [
        "start plain",
        ("plain", 1, 1, 8),
        ("plain", 8, 8, 8),
        ("plain", 1, 8, 16),
        ("plain", 8, 16, 16),
    ]
    assert len(found["plain"][1].tokens_per_s) == 1


def test_figures_are_medians_with_their_spread(world):
    speeds = {"plain": [100.0, 90.0, 120.0], "k = 1": [50.0, 50.0, 50.0]}
    found = measured(world(lambda name, requests, round_: speeds[name][round_]), names=("plain", "k = 1"))
    row = found["plain"][8].to_json()
    assert (row["tokens_per_s"], row["spread"]) == (100.0, 0.3)
    assert (
        row["rounds_tokens_per_s"] == [100.0, 90.0, 120.0] and row["first_token_s"] == 0.5 and row["per_token_s"] == 0.1
    )
    assert row["acceptance_length"] is None and found["k = 1"][1].to_json()["acceptance_length"] == 1.5


def test_texts_are_compared_with_plain_serving(world):
    here = world(text=lambda name, question: "other" if (name, question) == ("k = 1", "b") else question)
    found = measured(here)
    assert found["adaptive"][1].same_texts == 1.0
    assert found["k = 1"][1].same_texts == pytest.approx(5 / 8)
    assert any(
        "k = 1 wrote another text than plain in 38% of the answers at 1 at a time" in line for line in advice(found)
    )


def figures(**by_setting):
    """Measured figures of one round, by setting the tokens/s at 1, 4 and 16 requests."""
    names = {"plain": "plain", "k1": "k = 1", "adaptive": "adaptive"}
    return {
        names[name]: {requests: Figures([speed]) for requests, speed in zip((1, 4, 16), speeds, strict=True)}
        for name, speeds in by_setting.items()
    }


def test_adaptive_that_is_never_slower_is_advised():
    lines = advice(figures(plain=(10, 30, 90), k1=(14, 28, 50), adaptive=(13, 30, 89.5)))
    assert lines[:3] == [
        "1 at a time: k = 1 is fastest, 1.40 x plain",
        "4 at a time: plain is as fast as anything (adaptive 1.00 x)",
        "16 at a time: plain is as fast as anything (adaptive 0.99 x)",
    ]
    assert lines[3:] == [
        "adaptive drafts are never slower than plain serving, and faster under some loads: axolotl-medusa serve OUTPUT_DIR"
    ]


def test_adaptive_that_is_slower_is_said_with_the_loads():
    lines = advice(figures(plain=(10, 30, 90), adaptive=(13, 28, 90)))
    assert lines[3] == (
        "adaptive drafts cost speed under some loads (0.93 x at 4): serve without heads where those loads are usual"
    )


def test_heads_that_make_nothing_faster_are_said_to_be_useless():
    lines = advice(figures(plain=(10, 30, 90), k1=(8, 20, 40), adaptive=(10.1, 30, 90)))
    assert lines[-1] == "these heads make nothing faster here: serve without them (axolotl-medusa serve --method none)"
    assert not any("never slower" in line for line in lines)


def test_nothing_is_advised_without_plain_serving(tmp_path):
    only = figures(k1=(8, 20, 40))
    assert speed_ups(only) == {} and advice(only) == ["nothing was compared: measure plain serving in the same run"]
    assert save_plot(tmp_path / "plan.png", draw_speed_ups, only).stat().st_size > 1000


def test_picture_has_a_line_for_every_setting(tmp_path):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    draw_speed_ups(axes, figures(plain=(10, 30, 90), k1=(14, 28, 50), adaptive=(13, 30, 90)))
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["k = 1"] == pytest.approx([1.4, 28 / 30, 50 / 90]) and lines["adaptive"] == pytest.approx(
        [1.3, 1.0, 1.0]
    )
    assert "plain" in lines
