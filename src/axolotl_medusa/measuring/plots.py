"""PNG plots of an evaluation's report.

Contract: reads the report that `evaluate` makes and nothing else; matplotlib is imported when a plot is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

PLOTS = ("accuracy_per_head.png", "accepted_length.png", "speed_up.png")

_MARK = "axolotl-medusa"
"""Author of every picture, in the file's metadata: a picture of anybody else is not written over."""
_MARKED_BYTES = 4096
"""The metadata stand before the pixels."""


def write_plots(report: Mapping[str, Any], directory: str | Path) -> list[Path]:
    """Draws top-k accuracies per head, the histogram of accepted lengths, and speed-ups per category.

    Args:
        report: What `evaluate` returned.
        directory: Where to write `PLOTS`; made if it is not there.

    Returns:
        The files.

    Raises:
        ValueError: A picture of that name is there and is not ours.
        RuntimeError: matplotlib is missing.
    """
    check_matplotlib()
    check_plots(directory, PLOTS)
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    draw = (_accuracies, _accepted_lengths, _speed_ups)
    return [save_plot(directory / name, one, report) for name, one in zip(PLOTS, draw, strict=True)]


def check_matplotlib() -> None:
    """Checks that plots can be drawn, before anything is measured.

    Raises:
        RuntimeError: matplotlib is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise RuntimeError("plots need matplotlib, which is not installed: pip install matplotlib") from error


def check_plots(directory: str | Path, names: Iterable[str]) -> None:
    """Checks that pictures can be written, and that none is written over that this package did not draw.

    Raises:
        ValueError: There is such a file, or `directory` is a file.
    """
    directory = Path(directory).expanduser()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file, expected a directory to draw in: choose another one")
    for file in (directory / name for name in names):
        if not file.exists() or not file.stat().st_size:
            continue
        with file.open("rb") as stream:
            if _MARK.encode() not in stream.read(_MARKED_BYTES):
                raise ValueError(
                    f"{file} is there already and was not drawn by {_MARK}, expected a new file: draw in another directory"
                )


def save_plot(file: Path, draw: Callable[[Any, Any], None], what: Any) -> Path:
    """Draws one figure with `draw(axes, what)` and a legend, and returns its file."""
    from matplotlib.figure import Figure  # without pyplot no display and no global state is needed

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    draw(axes, what)
    axes.legend()
    figure.savefig(file, dpi=150, metadata={"Author": _MARK})
    return file


def _accuracies(axes: Any, report: Mapping[str, Any]) -> None:
    heads = report["overall"]["heads"]
    for top in heads[0]["top"]:
        values = [float("nan") if head["top"][top] is None else head["top"][top] for head in heads]
        axes.plot([head["head"] for head in heads], values, "o-", label=f"top {top}")
    axes.set(xlabel="head (from 0)", ylabel="accuracy on the model's own text", ylim=(0, 1), xticks=range(len(heads)))


def _accepted_lengths(axes: Any, report: Mapping[str, Any]) -> None:
    decoders = {name: row for name, row in report["overall"]["decoders"].items() if row["step_lengths"]}
    width = 0.8 / max(len(decoders), 1)
    for index, (name, row) in enumerate(decoders.items()):
        steps = sum(row["step_lengths"].values())
        lengths = [int(length) + (index - (len(decoders) - 1) / 2) * width for length in row["step_lengths"]]
        label = f"{name}, {row['acceptance_length']:.2f} per forward"
        axes.bar(lengths, [count / steps for count in row["step_lengths"].values()], width, label=label)
    axes.set(xlabel="tokens emitted by a step", ylabel="share of steps")


def _speed_ups(axes: Any, report: Mapping[str, Any]) -> None:
    groups = {"all": report["overall"], **report["categories"]}
    names = [name for name in report["overall"]["decoders"] if name != "plain"]
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(groups))]
        axes.bar(places, [group["decoders"][name]["speed_up"] for group in groups.values()], width, label=name)
    axes.axhline(1, color="black", linewidth=1, label="plain greedy decoding")
    axes.set(ylabel="tokens/s against plain decoding")
    axes.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right")
