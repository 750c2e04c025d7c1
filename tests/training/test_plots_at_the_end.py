"""`medusa_plots`: what cannot be drawn is said before training, and drawing never costs the heads."""

from __future__ import annotations

import logging

import pytest
from axolotl.utils.dict import DictDefault
from transformers import TrainerControl, TrainerState

from axolotl_medusa.measuring.training_plots import TRAINING_PLOTS
from axolotl_medusa.training import plots_at_the_end
from axolotl_medusa.training.plots_at_the_end import LogKeeper, draw_log, plots_problems
from axolotl_medusa.training.plugin import MedusaPlugin

HISTORY = [
    {"step": 1, "medusa0_loss": 2.0, "medusa0_top1": 0.2, "base_loss": 1.0},
    {"step": 2, "medusa0_loss": 1.5, "medusa_acceptance_length": 1.2, "medusa_scheduler_coefficient": 1.0},
]


def test_log_is_drawn_into_the_runs_directory(tmp_path):
    pytest.importorskip("matplotlib")
    draw_log(HISTORY, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(TRAINING_PLOTS)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in TRAINING_PLOTS)


@pytest.mark.parametrize("is_first", [True, False])
def test_log_is_kept_by_the_process_that_writes(is_first):
    keeper = LogKeeper()
    state = TrainerState(log_history=HISTORY, is_world_process_zero=is_first)
    keeper.on_train_end(None, state, TrainerControl())
    assert list(keeper.history) == (HISTORY if is_first else [])


def test_missing_matplotlib_is_said_before_training_and_only_where_it_is_needed(monkeypatch):
    def missing():
        raise RuntimeError("plots need matplotlib, which is not installed")

    monkeypatch.setattr(plots_at_the_end, "check_matplotlib", missing)
    assert plots_problems({"output_dir": "out"}) == []
    assert plots_problems({"medusa_plots": True}) == [
        "medusa_plots is true, but plots need matplotlib, which is not installed"
    ]


def test_picture_of_somebody_else_is_said_before_training(tmp_path):
    (tmp_path / "training_loss.png").write_bytes(b"mine")
    (problem,) = plots_problems({"medusa_plots": True, "output_dir": str(tmp_path)})
    assert "training_loss.png is there already and was not drawn by axolotl-medusa" in problem


@pytest.mark.parametrize("history", [[{"step": 1, "loss": 2.0}], HISTORY])
def test_what_fails_at_the_end_is_a_warning(history, tmp_path, caplog):
    file = tmp_path / "out"
    file.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        draw_log(history, str(file))
    assert "the log was not drawn: " in caplog.text


@pytest.mark.parametrize("wanted", [True, False])
def test_plugin_draws_where_it_is_asked_to(wanted, monkeypatch, tmp_path):
    from axolotl_medusa.training import plugin as module

    plugin, drawn = MedusaPlugin(), []

    class Trainer:
        def setup_medusa(self, cfg):
            pass

    monkeypatch.setattr(module, "MedusaTrainer", Trainer)
    monkeypatch.setattr(module, "check_heads_were_left", lambda *args: None)
    monkeypatch.setattr(module, "draw_log", lambda history, directory: drawn.append((history, directory)))
    cfg = DictDefault(medusa_plots=wanted, output_dir=str(tmp_path))
    callbacks = plugin.add_callbacks_post_trainer(cfg, Trainer())
    assert len(callbacks) == wanted
    for callback in callbacks:
        callback.on_train_end(None, TrainerState(log_history=HISTORY), TrainerControl())
    plugin._written = []
    plugin.post_train_unload(cfg)
    assert drawn == ([(HISTORY, str(tmp_path))] if wanted else [])
