"""Plots of a run's log; what is drawn is checked with a stand-in for matplotlib."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from axolotl_medusa.cli import main
from axolotl_medusa.measuring import training_plots
from axolotl_medusa.measuring.training_plots import TRAINING_PLOTS, trainer_state, write_training_plots

HISTORY = [
    {"step": 0, "eval_medusa0_top1": 0.1, "eval_medusa0_loss": 9.0, "eval_medusa0_top2": 0.2, "eval_loss": 8.0},
    {"step": 5, "medusa0_top1": 0.2, "medusa0_loss": 7, "base_loss": 2.0, "medusa1_loss": 8.0, "loss": 3.0},
    {"step": 10, "medusa0_top1": 0.3, "medusa0_loss": 6.0, "base_loss": 1.5, "medusa_acceptance_length": 1.25},
    {"step": 10, "eval_medusa0_top1": 0.4, "medusa_scheduler_coefficient": 1.0},
    {"train_loss": 5.0},
]


def write_state(directory: Path, history=HISTORY) -> Path:
    directory.mkdir(parents=True)
    (directory / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return directory


@pytest.fixture
def drawn(monkeypatch):
    """Lines by file and metric, as they would be drawn."""
    lines = {}

    class Axes:
        def __init__(self, name):
            self.lines = lines.setdefault(name, {})

        def plot(self, steps, values, style, label):
            self.lines[label] = (steps, values, style)

        def set(self, **labels):
            self.lines["ylabel"] = labels["ylabel"]

    def save_plot(file, draw, what):
        draw(Axes(file.name), what)
        return file

    monkeypatch.setattr(training_plots, "save_plot", save_plot)
    monkeypatch.setattr(training_plots, "check_matplotlib", lambda: None)
    return lines


def test_losses_accuracies_and_acceptance_length_are_drawn_over_steps(drawn, tmp_path):
    run = write_state(tmp_path / "out" / "checkpoint-10").parent
    files = write_training_plots(run, tmp_path / "new" / "plots")
    assert [file.name for file in files] == list(TRAINING_PLOTS)
    assert (tmp_path / "new" / "plots").is_dir()
    assert drawn["training_loss.png"] == {
        "base_loss": ((5, 10), (2.0, 1.5), "-"),
        "eval_medusa0_loss": ((0,), (9.0,), "o--"),
        "medusa0_loss": ((5, 10), (7, 6.0), "-"),
        "medusa1_loss": ((5,), (8.0,), "-"),
        "ylabel": "loss",
    }
    assert drawn["training_accuracy.png"]["eval_medusa0_top1"] == ((0, 10), (0.1, 0.4), "o--")
    assert drawn["training_accuracy.png"].keys() == {"eval_medusa0_top1", "medusa0_top1", "ylabel"}
    assert drawn["training_acceptance_length.png"]["medusa_acceptance_length"] == ((10,), (1.25,), "-")


def test_what_was_not_logged_is_not_drawn(drawn, tmp_path):
    write_state(tmp_path / "checkpoint-1", [{"step": 1, "medusa0_loss": 2.0}])
    assert [file.name for file in write_training_plots(tmp_path, tmp_path)] == ["training_loss.png"]


def test_last_checkpoint_is_read_and_a_named_one_too(tmp_path):
    for step in (9, 100, 20):
        write_state(tmp_path / f"checkpoint-{step}")
    assert trainer_state(tmp_path).parent.name == "checkpoint-100"
    assert trainer_state(tmp_path / "checkpoint-20").parent.name == "checkpoint-20"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no checkpoint-*/trainer_state.json: expected what training wrote"),
        ("[]", "trainer_state.json is not what a Trainer writes (TypeError"),
        ("{", "trainer_state.json is not what a Trainer writes (JSONDecodeError"),
        ('{"log_history": [{"step": 1, "loss": 2.0, "base_loss": 1.0}]}', "trainer_state.json has no losses of heads"),
    ],
)
def test_command_says_in_one_line_what_it_cannot_draw(content, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training_plots, "check_matplotlib", lambda: None)
    if content is not None:
        (tmp_path / "checkpoint-1").mkdir()
        (tmp_path / "checkpoint-1" / "trainer_state.json").write_text(content)
    assert main(["plot", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("axolotl-medusa plot: error: ") and error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("out", [False, True])
def test_command_prints_the_files(out, drawn, tmp_path, capsys):
    run = write_state(tmp_path / "out" / "checkpoint-10").parent
    target = tmp_path / "plots" if out else run
    assert main(["plot", str(run), *(["--out", str(target)] if out else [])]) == 0
    assert capsys.readouterr().out.splitlines() == [f"plot: {target / name}" for name in TRAINING_PLOTS]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_training_plots_are_png_files(tmp_path):
    for file in write_training_plots(write_state(tmp_path / "checkpoint-10"), tmp_path / "plots"):
        assert file.read_bytes().startswith(b"\x89PNG\r\n")
