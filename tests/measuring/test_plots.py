"""Plots: real PNG files where matplotlib is installed; what is drawn is checked with a stand-in that records it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest

from axolotl_medusa.measuring.plots import PLOTS, check_plots, write_plots


def decoder(speed_up, lengths):
    return {"speed_up": speed_up, "step_lengths": lengths, "acceptance_length": 1.5}


GROUP = {
    "heads": [{"head": 0, "top": {"1": 0.5, "2": 0.75}}, {"head": 1, "top": {"1": 0.25, "2": None}}],
    "decoders": {
        "plain": decoder(1.0, {"1": 8}),
        "chain": decoder(1.2, {"1": 3, "2": 1}),
        "tree": decoder(0.9, {"1": 2, "3": 2}),
    },
}
REPORT = {"overall": GROUP, "categories": {"sums": GROUP}}


@pytest.fixture
def axes(monkeypatch):
    """The axes of every plot, drawn with a stand-in for matplotlib that writes empty files."""
    made = []

    class Figure:
        def __init__(self, **_):
            made.append(MagicMock())

        def add_subplot(self):
            return made[-1]

        def savefig(self, file, **_):
            Path(file).touch()

    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["matplotlib"].figure = sys.modules["matplotlib.figure"]
    sys.modules["matplotlib.figure"].Figure = Figure
    return made


def bars(axes):
    return {call.kwargs["label"]: list(call.args[1]) for call in axes.bar.call_args_list}


def test_plots_are_drawn_in_a_home_directory(axes, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert {file.parent for file in write_plots(REPORT, "~/plots")} == {tmp_path / "plots"}
    (tmp_path / "plots" / PLOTS[0]).write_text("mine")
    with pytest.raises(ValueError):
        check_plots("~/plots", PLOTS)


def test_three_plots_are_drawn_from_the_report(axes, tmp_path):
    files = write_plots(REPORT, tmp_path / "new" / "plots")
    assert [file.name for file in files] == list(PLOTS)
    assert all(file.is_file() for file in files)
    accuracies, lengths, speed_ups = axes
    lines = {call.kwargs["label"]: call.args[:2] for call in accuracies.plot.call_args_list}
    assert lines["top 1"] == ([0, 1], [0.5, 0.25])
    assert str(lines["top 2"]) == "([0, 1], [0.75, nan])"
    assert bars(lengths) == {
        "plain, 1.50 per forward": [1],
        "chain, 1.50 per forward": [0.75, 0.25],
        "tree, 1.50 per forward": [0.5, 0.5],
    }
    assert [round(x) for x in lengths.bar.call_args_list[2].args[0]] == [1, 3]
    assert bars(speed_ups) == {"chain": [1.2, 1.2], "tree": [0.9, 0.9]}
    assert speed_ups.set_xticks.call_args.args[1] == ["all", "sums"]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_plots_are_png_files(tmp_path):
    for file in write_plots(REPORT, tmp_path):
        assert file.read_bytes().startswith(b"\x89PNG\r\n")


def test_missing_matplotlib_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(RuntimeError, match=r"^plots need matplotlib, which is not installed: pip install matplotlib$"):
        write_plots(REPORT, tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_own_pictures_are_drawn_again_and_a_users_are_not(tmp_path):
    from matplotlib.figure import Figure

    write_plots(REPORT, tmp_path)
    write_plots(REPORT, tmp_path)
    Figure().savefig(tmp_path / PLOTS[1])
    before = (tmp_path / PLOTS[1]).read_bytes()
    with pytest.raises(ValueError, match=rf"{PLOTS[1]} is there already and was not drawn by axolotl-medusa"):
        write_plots(REPORT, tmp_path)
    assert (tmp_path / PLOTS[1]).read_bytes() == before
    with pytest.raises(ValueError, match=r"is a file, expected a directory to draw in"):
        check_plots(tmp_path / PLOTS[1], PLOTS)
