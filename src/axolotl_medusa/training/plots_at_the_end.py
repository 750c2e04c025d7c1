"""`medusa_plots`: pictures of a run's own log, drawn when everything of it is saved.

Contract: what cannot be drawn is said before training; what fails while drawing never costs a run its heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_medusa.measuring.plots import check_matplotlib, check_plots
from axolotl_medusa.measuring.training_plots import TRAINING_PLOTS, draw_series, series_of

LOG = get_logger(__name__)


class LogKeeper(TrainerCallback):  # type: ignore[misc]
    """Keeps the Trainer's log beyond the Trainer, in the process that writes.

    Attributes:
        history: The `log_history` at the end of training; empty before, and in other processes.
    """

    def __init__(self) -> None:
        self.history: Sequence[Mapping[str, Any]] = ()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the log."""
        if state.is_world_process_zero:
            self.history = state.log_history


def plots_problems(cfg: Mapping[str, Any]) -> list[str]:
    """Why pictures could not be drawn, one line each; empty without `medusa_plots`."""
    if not cfg.get("medusa_plots"):
        return []
    try:
        check_matplotlib()
        if cfg.get("output_dir"):
            check_plots(cfg["output_dir"], TRAINING_PLOTS)
    except (RuntimeError, ValueError) as error:
        return [f"medusa_plots is true, but {error}"]
    return []


def draw_log(history: Sequence[Mapping[str, Any]], output_dir: str | Path) -> None:
    """Draws a log into the run's directory; what cannot be drawn is a warning, as all else of the run is there."""
    try:
        for file in draw_series(series_of(history, "the log"), output_dir):
            LOG.info(f"plot: {file}")
    except (ValueError, OSError) as error:
        LOG.warning(f"the log was not drawn: {error}")
