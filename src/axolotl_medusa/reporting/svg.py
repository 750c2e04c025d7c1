"""Charts as SVG inside a page: lines, bars and candidate trees.

Contract: numbers and names in, markup out; every name is escaped. Colours are the page's CSS classes `c0` to `c9`; lines of
evaluations are dashed, so that no chart is read by colours alone.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 640, 300
COLOURS = 10
"""Classes of colours; a page names as many."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 10, 34
_TICKS = 5
_MOST_POINTS = 400
_NODE = 4

Points = Sequence[tuple[float, float]]


def line_chart(label: str, series: Mapping[str, Points], x_name: str, y_name: str) -> str:
    """Lines over a common axis with a legend below; empty where there is nothing to draw.

    Args:
        label: What the chart shows, for readers who do not see it.
        series: Points by name; a name that begins with `eval_` is drawn dashed, with dots.
        x_name: Of the horizontal axis.
        y_name: Of the vertical one.
    """
    drawn = {name: _finite(points) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    xs, ys = zip(*(point for points in drawn.values() for point in points), strict=True)
    x_axis, y_axis = _Axis(min(xs), max(xs), _LEFT, WIDTH - _RIGHT), _Axis(min(ys), max(ys), HEIGHT - _BOTTOM, _TOP)
    colours = _colours(drawn)
    parts = [_frame(x_axis, y_axis, x_name, y_name)]
    for name, points in drawn.items():
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashed = " dashed" if name.startswith("eval_") else ""
        parts.append(f'<polyline class="line c{colours[name]}{dashed}" points="{path}"/>')
        if dashed or len(places) == 1:
            parts += [f'<circle class="dot c{colours[name]}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
    return _svg(label, parts) + _legend(drawn, colours)


def bar_chart(label: str, groups: Mapping[str, Mapping[str, float]], y_name: str, line: float | None = None) -> str:
    """Bars beside each other in groups, each with its value; empty where there is nothing to draw.

    Args:
        label: What the chart shows.
        groups: Values by the group's name and by the bar's.
        y_name: Of the vertical axis.
        line: A value at which a line is drawn across.
    """
    groups = {
        name: {bar: value for bar, value in bars.items() if math.isfinite(value)} for name, bars in groups.items()
    }
    bars = list(dict.fromkeys(bar for values in groups.values() for bar in values))
    if not bars:
        return ""
    top = max(max(values.values(), default=0.0) for values in groups.values())
    y_axis = _Axis(0.0, max(top, line or 0.0) or 1.0, HEIGHT - _BOTTOM, _TOP)
    step = (WIDTH - _LEFT - _RIGHT) / len(groups)
    width = 0.8 * step / len(bars)
    colours = {bar: number % COLOURS for number, bar in enumerate(bars)}
    parts = [_vertical(y_axis, y_name)]
    for place, (group, values) in enumerate(groups.items()):
        left = _LEFT + (place + 0.1) * step
        for number, bar in enumerate(bars):
            if bar in values:
                x, y = left + number * width, y_axis.place(values[bar])
                height = y_axis.place(0) - y
                title = html.escape(f"{group}, {bar}: {values[bar]:.2f}")
                parts.append(
                    f'<rect class="bar c{colours[bar]}" x="{x:.1f}" y="{y:.1f}" width="{width * 0.94:.1f}" '
                    f'height="{height:.1f}"><title>{title}</title></rect>'
                )
        parts.append(_text(left + 0.4 * step, HEIGHT - _BOTTOM + 16, group, "middle"))
    if line is not None:
        y = y_axis.place(line)
        parts.append(f'<line class="across" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    return _svg(label, parts) + _legend(bars, colours)


def tree_chart(label: str, choices: Sequence[Sequence[int]]) -> str:
    """A candidate tree: the root on top, a row for each head, siblings by rank from the left.

    Args:
        label: What the chart shows.
        choices: Nodes as paths of ranks, without the root; a node whose parent is missing is left out.
    """
    nodes = sorted({(), *(tuple(choice) for choice in choices)}, key=lambda node: (len(node), node))
    nodes = [node for node in nodes if all(node[:length] in nodes for length in range(len(node)))]
    leaves = [node for node in nodes if not any(other[:-1] == node for other in nodes if other)]
    order = {leaf: number for number, leaf in enumerate(sorted(leaves))}
    depth = max(len(node) for node in nodes)
    spot: dict[tuple[int, ...], tuple[float, float]] = {}
    for node in sorted(nodes, key=len, reverse=True):
        below = [spot[child][0] for child in nodes if child and child[:-1] == node]
        across = sum(below) / len(below) if below else (order[node] + 0.5) / len(leaves) * (WIDTH - 20) + 10
        spot[node] = (across, 14 + len(node) * (HEIGHT - 28) / max(depth, 1))
    parts = []
    for node in nodes:
        x, y = spot[node]
        if node:
            to_x, to_y = spot[node[:-1]]
            parts.append(f'<line class="edge" x1="{to_x:.1f}" y1="{to_y:.1f}" x2="{x:.1f}" y2="{y:.1f}"/>')
    for node in nodes:
        x, y = spot[node]
        colour = (len(node) - 1) % COLOURS if node else COLOURS - 1
        rank = f"head {len(node) - 1}, guess {node[-1] + 1}" if node else "the model's own token"
        parts.append(
            f'<circle class="bar c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{_NODE}"><title>{rank}</title></circle>'
        )
    return _svg(label, parts)


class _Axis:
    """Places of values between two ends of the picture."""

    def __init__(self, low: float, high: float, begin: float, end: float) -> None:
        if low == high:
            low, high = low - 0.5, high + 0.5
        self.low, self.high, self._begin, self._end = low, high, begin, end

    def place(self, value: float) -> float:
        """Where a value is drawn."""
        return self._begin + (value - self.low) / (self.high - self.low) * (self._end - self._begin)

    def ticks(self) -> list[float]:
        """Values that the axis names."""
        return [self.low + (self.high - self.low) * number / (_TICKS - 1) for number in range(_TICKS)]


def _finite(points: Points) -> list[tuple[float, float]]:
    """The points that can be drawn, no more than can be told apart."""
    kept = [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    every = max(1, math.ceil(len(kept) / _MOST_POINTS))
    return kept[::every] if every == 1 or (len(kept) - 1) % every == 0 else [*kept[::every], kept[-1]]


def _colours(names: Mapping[str, object]) -> dict[str, int]:
    """Colours by name; an evaluation has that of what it evaluates."""
    bare = list(dict.fromkeys(name.removeprefix("eval_") for name in names))
    return {name: bare.index(name.removeprefix("eval_")) % COLOURS for name in names}


def _svg(label: str, parts: Sequence[str]) -> str:
    name = html.escape(label, quote=True)
    return f'<svg role="img" aria-label="{name}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'


def _legend(names: Mapping[str, object] | Sequence[str], colours: Mapping[str, int]) -> str:
    entries = "".join(
        f'<li><span class="key{" dashed" if name.startswith("eval_") else ""} c{colours[name]}"></span>{html.escape(name)}</li>'
        for name in names
    )
    return f'<ul class="legend">{entries}</ul>'


def _frame(x_axis: _Axis, y_axis: _Axis, x_name: str, y_name: str) -> str:
    below = "".join(_text(x_axis.place(x), HEIGHT - _BOTTOM + 16, f"{x:.4g}", "middle") for x in x_axis.ticks())
    return _vertical(y_axis, y_name) + below + _text(WIDTH - _RIGHT, HEIGHT - 4, x_name, "end")


def _vertical(axis: _Axis, name: str) -> str:
    lines = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{axis.place(y):.1f}" y2="{axis.place(y):.1f}"/>'
        + _text(_LEFT - 6, axis.place(y) + 4, f"{y:.3g}", "end")
        for y in axis.ticks()
    )
    return lines + _text(4, HEIGHT - 4, name, "start")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
