"""PNG plots of a training run: losses, accuracies per head, schedule and acceptance length over its steps.

Contract: reads the Trainer's log, or the trainer_state.json that training leaves in a checkpoint, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from axolotl_medusa.measuring.plots import check_matplotlib, check_plots, save_plot
from axolotl_medusa.model.checkpoints import checkpoints
from axolotl_medusa.model.file_names import STATE_FILE
from axolotl_medusa.model.json_files import read_value

TRAINING_PLOTS = {
    "training_loss.png": (r"base_loss|medusa\d+_loss", "loss"),
    "training_accuracy.png": (r"medusa\d+_top1", "top-1 accuracy"),
    "training_schedule.png": (r"medusa_scheduler_coefficient", "factor on λ0"),
    "training_acceptance_length.png": (r"medusa_acceptance_length", "acceptance length, simulated"),
}
"""Files, the metrics that each shows, and what its axis is called; `eval_` before a name is the evaluation's."""

Series = dict[str, list[tuple[int, float]]]
"""`(step, value)` by metric."""

_LARGEST = 1e30
"""Values beyond, infinity among them, cannot be drawn."""


def write_training_plots(output_dir: str | Path, directory: str | Path) -> list[Path]:
    """Draws what a run has logged so far, training as lines and evaluations as dots.

    Args:
        output_dir: What training writes to, or a checkpoint in it; of several checkpoints the last one is read.
        directory: Where to write `TRAINING_PLOTS`; made if it is not there.

    Returns:
        The files.

    Raises:
        ValueError: There is no checkpoint, its log has nothing about heads, or a picture that is there is not ours.
        RuntimeError: matplotlib is missing.
    """
    check_matplotlib()
    return draw_series(read_series(output_dir), directory)


def read_series(output_dir: str | Path) -> dict[str, Series]:
    """What a run has logged so far, by the picture that shows it.

    Raises:
        ValueError: There is no checkpoint, or its log has nothing about heads.
    """
    state = trainer_state(output_dir)
    return series_of(_log_history(state), str(state))


def series_of(history: Sequence[Mapping[str, Any]], where: str) -> dict[str, Series]:
    """The metrics of a Trainer's log, by the picture that shows them.

    Args:
        history: The `log_history`.
        where: Where it was found, for the message.

    Raises:
        ValueError: It has nothing about heads.
    """
    steps = [entry for entry in history if _is_number(entry.get("step"))]
    series = {name: _series(steps, pattern) for name, (pattern, _) in TRAINING_PLOTS.items()}
    if not any("medusa" in metric for metrics in series.values() for metric in metrics):
        raise ValueError(
            f"{where} has no losses of heads: train with logging_steps set and without medusa_logging: false"
        )
    return series


def draw_series(series: Mapping[str, Series], directory: str | Path) -> list[Path]:
    """Draws the pictures of a log that have something to show.

    Raises:
        ValueError: A picture that is there is not ours.
    """
    check_plots(directory, TRAINING_PLOTS)
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)

    def draw(axes: Any, name: str) -> None:
        for metric, points in series[name].items():
            style = "o--" if metric.startswith("eval_") else "-"
            axes.plot(*zip(*points, strict=True), style, label=metric)
        axes.set(xlabel="step", ylabel=TRAINING_PLOTS[name][1])

    return [save_plot(directory / name, draw, name) for name in TRAINING_PLOTS if series[name]]


def trainer_state(output_dir: str | Path) -> Path:
    """The trainer_state.json of a run's last checkpoint, or of the checkpoint that is named.

    Raises:
        ValueError: There is none.
    """
    directory = Path(output_dir).expanduser()
    if (directory / STATE_FILE).is_file():
        return directory / STATE_FILE
    found = checkpoints(directory, STATE_FILE)
    if not found:
        raise ValueError(
            f"{directory} has no checkpoint-*/{STATE_FILE}: expected what training wrote, an output_dir with a checkpoint"
        )
    return found[-1] / STATE_FILE


def _log_history(state: Path) -> Sequence[Mapping[str, Any]]:
    try:
        history = read_value(state)["log_history"]
        if not isinstance(history, list):
            raise TypeError(f"log_history is {shorten(history)}")
    except (ValueError, KeyError, TypeError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"{state} is not what a Trainer writes ({type(cause).__name__}: {cause})") from error
    return [entry for entry in history if isinstance(entry, dict)]


def _is_number(value: object) -> bool:
    """Whether a value can be drawn; NaN can, a picture leaves it out."""
    return isinstance(value, int | float) and not abs(value) > _LARGEST


def _series(history: Sequence[Mapping[str, Any]], pattern: str) -> Series:
    """`(step, value)` of every metric whose name matches, by name."""
    found: Series = {}
    for entry in history:
        for name, value in entry.items():
            if re.fullmatch(f"(eval_)?({pattern})", name) and _is_number(value):
                found.setdefault(name, []).append((entry["step"], value))
    return dict(sorted(found.items()))
